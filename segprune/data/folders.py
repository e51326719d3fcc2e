"""Image and mask folders with matching names.

    images/{train,val}/*.jpg    masks/{train,val}/*.png          or
    {train,val}/images/*.jpg    {train,val}/masks/*.png          or
    {train,val}/*.jpg           {train,val}_labels/*.png         or
    {train,val}/a.jpg           {train,val}/a_mask.png           or
    images/*.jpg                masks/*.png       {train,val}.txt with one image name per line

Masks may end in one of `MASK_ENDINGS`; their pixel value is the class, 255 is ignored. Folders of images and masks
without any split are one pool: the split "all".
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from segprune.data.classes import ClassTable, read_classes
from segprune.data.listing import (
    ALIASES,
    find_first_file,
    find_subfolder,
    list_aliases,
    list_by_stem,
    pair_folders,
    pair_side_by_side,
)
from segprune.data.pixels import IMAGE_EXTENSIONS, read_palette
from segprune.data.samples import MissingSplitError, Pair, Source
from segprune.data.text import read_names

IMAGES = ("images", "image", "imgs", "img", "img_dir")
MASKS = (
    "masks",
    "mask",
    "labels",
    "label",
    "annotations",
    "annotation",
    "gt",
    "ann_dir",
    "anns",
    "segmentation",
)
SIGNS = (
    "images/{train,val} and masks/{train,val}, or {train,val}/images and {train,val}/masks, or {train,val} and "
    "{train,val}_labels, or NAME_mask.png beside each image"
)
_SUFFIXES = (
    "annot",
    *MASKS,
)  # of a mask folder's name behind a split's, with one of the marks between them
_MARKS = ("_", "-", "")


def find_root(folder: Path) -> Path | None:
    """Returns the folder itself, if it or a split's folder in it holds images and masks."""
    # Folders are quick to find by name; for masks beside images all files are listed.
    if _find_folders(folder) or any(_find_split_folders(folder, split) for split in ALIASES):
        return folder

    return (
        folder
        if any(_find_side_by_side(folder, split) for split in (*ALIASES, "all"))
        else None
    )


def open_root(root: Path) -> Source:
    # Roboflow writes the classes into each split's folder.
    split_folders = (find_subfolder(root, list_aliases(split)) for split in ALIASES)
    classes = read_classes(root, *(folder for folder in split_folders if folder))

    # Colours in a file decide the classes; a mask's palette only how masks are drawn.
    return Source(
        "folders",
        str(root),
        classes.names,
        classes.palette if classes.colours else read_palette(_find_first_mask(root)),
        partial(_list_split, root, classes),
        own_numbering=not classes.colours,
    )


def _find_first_mask(root: Path) -> str | None:
    # Any mask will do: the palettes of one set are taken to be equal.
    pairs = [_find_folders(root), *(_find_split_folders(root, split) for split in ALIASES)]
    for folders in pairs:
        if folders and (first := find_first_file(folders[1])):
            return first

    return None


def _find_folders(parent: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Returns a folder of images and one of masks in `parent`, whose names say so."""
    images = find_subfolder(parent, IMAGES)
    masks = find_subfolder(parent, MASKS)
    return (images, masks) if images and masks else None


def _find_split_folders(root: Path, split: str) -> tuple[str, str] | None:
    """Returns the folders of a split's images and masks where the split's name comes before theirs."""
    for alias in list_aliases(split):
        # train/images and train/masks
        if (parent := find_subfolder(root, [alias])) and (inside := _find_folders(parent)):
            return inside

        # train and trainannot, train and train_labels, train_images and train_masks
        image_names, mask_names = [alias], list[str]()
        for mark in _MARKS:
            image_names.extend(alias + mark + name for name in IMAGES)
            mask_names.extend(alias + mark + name for name in _SUFFIXES)
        images = find_subfolder(root, image_names)
        masks = find_subfolder(root, mask_names)
        if images and masks:
            return images, masks

    return None


def _find_side_by_side(root: Path, split: str) -> str | None:
    """Returns the split's folder if it holds images with their masks; the root itself for the split "all".

    Not where Hugging Face's metadata says which image belongs to which.
    """
    # Such metadata pairs the files itself, maybe in other ways than by name.
    folder = os.fspath(root) if split == "all" else find_subfolder(root, list_aliases(split))
    if folder is None or any(
        os.path.isfile(os.path.join(folder, f"metadata.{kind}")) for kind in ("jsonl", "csv")
    ):
        return None

    try:
        return folder if pair_side_by_side(folder) else None
    except FileNotFoundError:  # some have one: raised again where the split is read
        return folder


def _list_split(root: Path, classes: ClassTable, split: str) -> tuple[Pair, ...]:
    if folders := _find_folders(root):
        images, masks = folders

        # images/train and masks/train
        if split_images := find_subfolder(images, list_aliases(split)):
            split_masks = find_subfolder(masks, list_aliases(split))
            # If there is no such folder, its path makes the message about missing masks.
            split_masks = split_masks or os.path.join(masks, os.path.basename(split_images))
            return pair_folders(split_images, split_masks, colours=classes.colours)

        # images, masks and train.txt
        for name in list_aliases(split):
            if (root / f"{name}.txt").is_file():
                # The list names images with or without their folders and extensions.
                rows = read_names(
                    root / f"{name}.txt", list_by_stem(images, IMAGE_EXTENSIONS, deep=True)
                )
                names = [columns[0] for columns in rows]
                return pair_folders(
                    images, masks, names, listed_in=f"{name}.txt", colours=classes.colours
                )

        # With splits, one pool would mix what is trained on with what is scored on.
        if split == "all" and not _has_splits(root, images):
            return pair_folders(images, masks, colours=classes.colours)

    if folders := _find_split_folders(root, split):
        return pair_folders(*folders, colours=classes.colours)

    if folder := _find_side_by_side(root, split):
        return pair_side_by_side(folder, classes.colours)

    raise MissingSplitError(_describe_missing(root, split))


def _has_splits(root: Path, images: str) -> bool:
    """Returns whether folders in `images` or lists beside it are those of splits."""
    for split in ALIASES:
        aliases = list_aliases(split)
        if find_subfolder(images, aliases) or any(
            (root / f"{alias}.txt").is_file() for alias in aliases
        ):
            return True

    return False


def _describe_missing(root: Path, split: str) -> str:
    looked_for = f"neither a folder {' nor '.join(list_aliases(split))} nor a list {split}.txt"
    # Only train and val have a remedy without moving files: a share set aside.
    remedy = f"move its images into images/{split} and masks/{split}"
    if split == "train":
        remedy = (
            "train with `val_share` 0.1 if there are no splits at all, or move its images into images/train and "
            "masks/train"
        )
    if split == "val":
        remedy = (
            "set about a tenth of the images aside to score on: train with `val_share` 0.1 or another `val_split`, or "
            "move them into images/val and masks/val"
        )

    return (
        f"{root} has no {split} split ({looked_for}); {remedy}, or name them in {root / 'train.txt'} and "
        f"{root / f'{split}.txt'}, one image name per line."
    )
