"""VOC: `JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val}.txt`.

A mask's pixel value (grey or palette PNG) is the class, 255 is ignored. Any other list in ImageSets/Segmentation is a
split as well. classes.txt beside the folders names the classes.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from segprune.data.listing import by_stem, check_present, class_names, first_file, read_lines, unique
from segprune.data.pixels import IMAGE_EXTENSIONS, palette_of
from segprune.data.samples import Pair, Source

LOOKED_FOR = "JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/Segmentation/{train,val}.txt"


def find(folder: Path) -> Path | None:
    """The folder that holds JPEGImages: `folder` itself, a VOC* in it, or a VOC* in its VOCdevkit.

    Raises ValueError where there are several.
    """
    if (folder / "JPEGImages").is_dir():
        return folder
    for parent in (folder, folder / "VOCdevkit"):
        found = [child for child in sorted(parent.glob("VOC*")) if (child / "JPEGImages").is_dir()]
        if len(found) > 1:
            names = ", ".join(child.name for child in found)
            raise ValueError(f"{parent} holds several data sets ({names}); give the path of one of them.")
        if found:
            return found[0]
    return None


def source(root: Path) -> Source:
    palette = palette_of(first_file(root / "SegmentationClass", (".png",)))
    return Source("voc", str(root), class_names(root), palette, partial(_split, root))


def _split(root: Path, split: str) -> tuple[Pair, ...]:
    names = _read_names(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    images = by_stem(root / "JPEGImages", IMAGE_EXTENSIONS)
    masks = by_stem(root / "SegmentationClass", (".png",))
    check_present(names, images, os.path.join(root, "JPEGImages", "{}.jpg"), "image", f"{split}.txt")
    check_present(names, masks, os.path.join(root, "SegmentationClass", "{}.png"), "mask", f"{split}.txt")
    return tuple(Pair(own, images[name], masks[name]) for own, name in zip(unique(names), names, strict=True))


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
