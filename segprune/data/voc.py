"""VOC: `JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val}.txt`.

A mask's pixel value (grey or palette PNG) is the class, 255 is ignored; with a labelmap.txt, as CVAT writes it, a
mask's colour is the class. Lines of a list name an image, or an image and its mask. Any list in ImageSets/Segmentation
is a split. A set without lists for train, val and test, as CVAT and labelme2voc write it, is one pool: the split "all".
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from segprune.data import lists
from segprune.data.classes import ClassTable, read_classes
from segprune.data.listing import (
    ALIASES,
    MASK_EXTENSIONS,
    check_present,
    find_first_file,
    list_aliases,
    list_by_stem,
    number_repeats,
)
from segprune.data.pixels import IMAGE_EXTENSIONS, read_palette
from segprune.data.samples import MissingSplitError, Pair, Source
from segprune.data.text import describe_encoding, read_names

SIGNS = "JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/Segmentation/{train,val}.txt"
MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug", "SegmentationClassPNG")


def find_root(folder: Path) -> Path | None:
    """Returns the folder that holds JPEGImages: `folder` itself, a VOC* in it, or a VOC* in its VOCdevkit.

    Not where two-column lists lie beside JPEGImages, as in PaddleSeg's sets. Raises ValueError where there are several.
    """
    # PaddleSeg's sets share the folder names, but their lists name the masks themselves.
    if (folder / "JPEGImages").is_dir():
        is_list = not (folder / "ImageSets").is_dir() and lists.find_root(folder) is not None
        return None if is_list else folder

    # The archive unpacks to VOCdevkit/VOC2012, and users give any folder on the way.
    for parent in (folder, folder / "VOCdevkit"):
        roots = [
            child for child in sorted(parent.glob("VOC*")) if (child / "JPEGImages").is_dir()
        ]
        if len(roots) > 1:
            names = ", ".join(child.name for child in roots)
            raise ValueError(
                f"{parent} holds several data sets ({names}); give the path of one of them."
            )
        if roots:
            return roots[0]

    return None


def open_root(root: Path) -> Source:
    classes = read_classes(root)
    palette = classes.palette
    # Without a table, the palette inside the first mask tells the colours.
    if not classes.colours:
        firsts = (find_first_file(root / name, (".png",)) for name in MASK_FOLDERS)
        palette = read_palette(next((path for path in firsts if path), None))

    lister = partial(_list_split, root, classes)
    return Source(
        "voc", str(root), classes.names, palette, lister, own_numbering=not classes.colours
    )


def _list_split(root: Path, classes: ClassTable, split: str) -> tuple[Pair, ...]:
    images = list_by_stem(root / "JPEGImages", IMAGE_EXTENSIONS)
    listed = _find_list(root, split)
    # Without a list, every image that has a mask belongs to the pool.
    if listed is None:
        rows = [[name] for name in sorted(_list_masks(root, []))]
        listed_in = ""
    else:
        rows = read_names(listed, images)
        listed_in = listed.name

    # A list of two columns, such as those for the augmented VOC, names the masks too.
    names = [columns[0] for columns in rows]
    if listed is not None and all(len(columns) == 2 for columns in rows):
        masks, _ = lists.locate([columns[1] for columns in rows], listed.parent)
        lists.check_files(masks, listed)
        paths = dict(zip(names, masks, strict=True))
    else:
        paths = _list_masks(root, names)

    # A wrong encoding turns names into others, which then seem to be missing.
    remark = "" if listed is None else describe_encoding(listed)
    check_present(
        names, images, os.path.join(root, "JPEGImages", "{}.jpg"), "image", listed_in, remark
    )
    check_present(
        names, paths, os.path.join(root, MASK_FOLDERS[0], "{}.png"), "mask", listed_in
    )

    # A list may repeat an image on purpose, to give it more weight.
    own_names = number_repeats(names)
    return tuple(
        Pair(own, images[name], paths[name], None, classes.colours)
        for own, name in zip(own_names, names, strict=True)
    )


def _list_masks(root: Path, names: list[str]) -> dict[str, str]:
    """Returns the masks of the first folder that has all of the names, else of the first that has any mask."""
    fallback: dict[str, str] = {}
    for folder in MASK_FOLDERS:
        # The augmented set has more masks in a second folder, and a list may need them all.
        masks = list_by_stem(root / folder, MASK_EXTENSIONS)
        if masks and all(name in masks for name in names):
            return masks
        fallback = fallback or masks

    return fallback


def _find_list(root: Path, split: str) -> Path | None:
    """Returns the split's list; of the pool its only list, or None if there is no list at all."""
    folder = root / "ImageSets" / "Segmentation"
    for name in (split, *list_aliases(split)):
        if (folder / f"{name}.txt").is_file():
            return folder / f"{name}.txt"

    # Without a list for train, val or test all images are one pool, listed or not.
    known: list[str] = []
    for aliases in ALIASES.values():
        known.extend(aliases)
    others = sorted(folder.glob("*.txt"))
    is_pool = not any(path.stem in known for path in others)
    if split == "all" and is_pool and len(others) <= 1:
        return others[0] if others else None

    # Name the lists that are there: the user may only have to choose one.
    remedy = "write it with one image name per line, without extension"
    if split == "val" or (split == "train" and is_pool):
        remedy += ", or train with `val_share` 0.1 or another `val_split`"
    there = f" (there are {', '.join(path.name for path in others)})" if others else ""
    raise MissingSplitError(
        f"{folder / f'{split}.txt'} is missing, the list of the split's images{there}; {remedy}."
    )
