"""VOC: `JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val}.txt`.

A mask's pixel value (grey or palette PNG) is the class, 255 is ignored. Any other list in ImageSets/Segmentation is a
split as well. classes.txt beside the folders names the classes.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from segprune.data.listing import (
    check_present,
    find_first_file,
    list_by_stem,
    number_repeats,
    read_class_names,
    read_lines,
)
from segprune.data.pixels import IMAGE_EXTENSIONS, read_palette
from segprune.data.samples import Pair, Source

SIGNS = "JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/Segmentation/{train,val}.txt"


def find_root(folder: Path) -> Path | None:
    """Returns the folder that holds JPEGImages: `folder` itself, a VOC* in it, or a VOC* in its VOCdevkit.

    Raises ValueError where there are several.
    """
    if (folder / "JPEGImages").is_dir():
        return folder

    for parent in (folder, folder / "VOCdevkit"):
        roots = [child for child in sorted(parent.glob("VOC*")) if (child / "JPEGImages").is_dir()]
        if len(roots) > 1:
            names = ", ".join(child.name for child in roots)
            raise ValueError(f"{parent} holds several data sets ({names}); give the path of one of them.")
        if roots:
            return roots[0]

    return None


def open_root(root: Path) -> Source:
    palette = read_palette(find_first_file(root / "SegmentationClass", (".png",)))
    return Source("voc", str(root), read_class_names(root), palette, partial(_list_split, root))


def _list_split(root: Path, split: str) -> tuple[Pair, ...]:
    names = _read_names(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    images = list_by_stem(root / "JPEGImages", IMAGE_EXTENSIONS)
    masks = list_by_stem(root / "SegmentationClass", (".png",))

    check_present(names, images, os.path.join(root, "JPEGImages", "{}.jpg"), "image", f"{split}.txt")
    check_present(names, masks, os.path.join(root, "SegmentationClass", "{}.png"), "mask", f"{split}.txt")

    own_names = number_repeats(names)
    return tuple(Pair(own, images[name], masks[name]) for own, name in zip(own_names, names, strict=True))


def _read_names(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, the list of the split's images; "
            "write it with one image name per line, without extension."
        )

    names = [line.strip() for line in read_lines(path) if line.strip()]
    if not names:
        raise ValueError(f"{path} lists no image; write one image name per line, without extension.")

    return names
