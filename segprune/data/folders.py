"""Image and mask folders with matching names.

    images/{train,val}/*.jpg    masks/{train,val}/*.png          or
    {train,val}/images/*.jpg    {train,val}/masks/*.png          or
    images/*.jpg                masks/*.png       {train,val}.txt with one image name per line

Masks may end in one of `MASK_ENDINGS`; their pixel value is the class, 255 is ignored.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from segprune.data.listing import (
    ALIASES,
    find_first_file,
    find_subfolder,
    list_aliases,
    pair_folders,
    read_class_names,
    read_lines,
)
from segprune.data.pixels import IMAGE_EXTENSIONS, read_palette
from segprune.data.samples import Pair, Source

IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "labels", "label", "annotations", "annotation", "gt")
SIGNS = "images/{train,val} and masks/{train,val}, or {train,val}/images and {train,val}/masks"


def find_root(folder: Path) -> Path | None:
    """Returns the folder itself, if it or a split's folder in it holds images and masks."""
    for parent in _list_parents(folder):
        if find_subfolder(parent, IMAGES) and find_subfolder(parent, MASKS):
            return folder

    return None


def open_root(root: Path) -> Source:
    # The palette is that of the first mask, wherever it lies.
    first_mask = None
    for parent in _list_parents(root):
        folder = find_subfolder(parent, MASKS)
        if folder and first_mask is None:
            first_mask = find_first_file(folder)

    palette = read_palette(first_mask)
    return Source("folders", str(root), read_class_names(root), palette, partial(_list_split, root))


def _list_parents(root: Path) -> list[str]:
    """Returns the folders in which those of images and masks may lie."""
    parents = [os.fspath(root)]
    for split in ALIASES:
        if folder := find_subfolder(root, list_aliases(split)):
            parents.append(folder)

    return parents


def _list_split(root: Path, split: str) -> tuple[Pair, ...]:
    images = find_subfolder(root, IMAGES)
    masks = find_subfolder(root, MASKS)
    if images and masks:
        # images/train and masks/train
        if split_images := find_subfolder(images, list_aliases(split)):
            split_masks = find_subfolder(masks, list_aliases(split))
            return pair_folders(split_images, split_masks or os.path.join(masks, os.path.basename(split_images)))

        # images, masks and train.txt
        for name in list_aliases(split):
            if (root / f"{name}.txt").is_file():
                return pair_folders(images, masks, _read_names(root / f"{name}.txt"), listed_in=f"{name}.txt")

    # train/images and train/masks
    if parent := find_subfolder(root, list_aliases(split)):
        images = find_subfolder(parent, IMAGES)
        masks = find_subfolder(parent, MASKS)
        if images and masks:
            return pair_folders(images, masks)

    raise FileNotFoundError(_describe_missing(root, split))


def _describe_missing(root: Path, split: str) -> str:
    looked_for = f"neither a folder {' nor '.join(list_aliases(split))} nor a list {split}.txt"
    remedy = f"move its images into images/{split} and masks/{split}"
    if split == "val":
        remedy = "set about a tenth of the images aside to score on: move them into images/val and masks/val"

    return (
        f"{root} has no {split} split ({looked_for}); {remedy}, or name them in {root / 'train.txt'} and "
        f"{root / f'{split}.txt'}, one image name per line."
    )


def _read_names(path: Path) -> list[str]:
    """Returns the names without their extensions."""
    lines = [line.strip().replace("\\", "/") for line in read_lines(path) if line.strip()]
    if not lines:
        raise ValueError(f"{path} lists no image; write one image name per line.")

    names = []
    for line in lines:
        stem, extension = os.path.splitext(line)
        names.append(stem if extension.lower() in IMAGE_EXTENSIONS else line)

    return names
