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

from segprune.data.listing import ALIASES, aliases, class_names, first_file, pairs, read_lines, subfolder
from segprune.data.pixels import IMAGE_EXTENSIONS, palette_of
from segprune.data.samples import Pair, Source

IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "labels", "label", "annotations", "annotation", "gt")
LOOKED_FOR = "images/{train,val} and masks/{train,val}, or {train,val}/images and {train,val}/masks"


def find(folder: Path) -> Path | None:
    """The folder itself, if it or a split's folder in it holds images and masks."""
    parents = [os.fspath(folder), *(path for split in ALIASES if (path := subfolder(folder, aliases(split))))]
    both = any(subfolder(parent, IMAGES) and subfolder(parent, MASKS) for parent in parents)
    return folder if both else None


def source(root: Path) -> Source:
    return Source("folders", str(root), class_names(root), palette_of(_first_mask(root)), partial(_split, root))


def _first_mask(root: Path) -> str | None:
    parents = [os.fspath(root), *(path for split in ALIASES if (path := subfolder(root, aliases(split))))]
    folders = (subfolder(parent, MASKS) for parent in parents)
    return next((path for folder in folders if folder and (path := first_file(folder))), None)


def _split(root: Path, split: str) -> tuple[Pair, ...]:
    images, masks = subfolder(root, IMAGES), subfolder(root, MASKS)
    if images and masks:
        if of_split := subfolder(images, aliases(split)):
            return pairs(of_split, subfolder(masks, aliases(split)) or os.path.join(masks, os.path.basename(of_split)))
        for name in aliases(split):
            if (root / f"{name}.txt").is_file():
                return pairs(images, masks, _read_names(root / f"{name}.txt"), listed_in=f"{name}.txt")
    parent = subfolder(root, aliases(split))
    images, masks = (subfolder(parent, names) if parent else None for names in (IMAGES, MASKS))
    if images and masks:
        return pairs(images, masks)
    raise FileNotFoundError(_missing(root, split))


def _missing(root: Path, split: str) -> str:
    remedy = f"name them in {root / 'train.txt'} and {root / f'{split}.txt'}, one image name per line"
    if split == "val":
        remedy = (
            f"set about a tenth of the pictures aside to score on: move them into images/val and masks/val, or {remedy}"
        )
    else:
        remedy = f"move its pictures into images/{split} and masks/{split}, or {remedy}"
    looked = f"neither a folder {' nor '.join(aliases(split))} nor a list {split}.txt"
    return f"{root} has no {split} split ({looked}); {remedy}."


def _read_names(path: Path) -> list[str]:
    """Names without their extensions."""
    lines = [line.strip().replace("\\", "/") for line in read_lines(path) if line.strip()]
    if not lines:
        raise ValueError(f"{path} lists no image; write one image name per line.")
    split = [os.path.splitext(line) for line in lines]
    return [stem if extension.lower() in IMAGE_EXTENSIONS else stem + extension for stem, extension in split]
