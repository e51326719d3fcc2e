"""Cityscapes as downloaded: leftImg8bit_trainvaltest and gtFine_trainvaltest unpacked into one folder.

    leftImg8bit/{train,val}/CITY/*_leftImg8bit.png    gtFine/{train,val}/CITY/*_gtFine_labelIds.png

The 34 label ids of the files become the 19 train ids that are scored, all others 255. *_labelTrainIds.png are taken
where a split has no labelIds. Ids, names and colours as the data set's authors define them (arXiv 1604.01685).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from segprune.data.listing import check_present, list_by_stem
from segprune.data.pixels import voc_palette
from segprune.data.samples import MissingSplitError, Pair, Source

SIGNS = "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png"

_CLASSES = (  # in the order of the train ids: label id, name, colour
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
_TRAIN_IDS = {label_id: train_id for train_id, (label_id, _, _) in enumerate(_CLASSES)}
TRAIN_IDS = bytes(
    _TRAIN_IDS.get(value, 255) for value in range(256)
)  # by the value in *_labelIds.png
_IMAGE, _MASK = "_leftImg8bit", "_gtFine_"


def find_root(folder: Path) -> Path | None:
    """Returns the folder itself, or a cityscapes folder in it."""
    for root in (folder, folder / "cityscapes", folder / "Cityscapes"):
        if (root / "leftImg8bit").is_dir():
            return root

    return None


def open_root(root: Path) -> Source:
    names = tuple(name for _, name, _ in _CLASSES)

    # Colours of the classes first, then VOC's up to 256 colours.
    palette: list[int] = []
    for _, _, colour in _CLASSES:
        palette.extend(colour)
    palette.extend(voc_palette()[len(palette) :])

    return Source(
        "cityscapes", str(root), names, tuple(palette), partial(_list_split, root), False
    )


def _list_split(root: Path, split: str) -> tuple[Pair, ...]:
    # The official folders have one more level, the city, below each split.
    image_folder, mask_folder = root / "leftImg8bit" / split, root / "gtFine" / split
    images = _list_by_key(image_folder, _IMAGE)
    if not images:
        raise MissingSplitError(
            f"{image_folder} holds no CITY/*{_IMAGE}.png; unpack leftImg8bit_trainvaltest.zip into {root}, "
            "or give another split."
        )

    # labelTrainIds, which need no table, are read only where a split has no labelIds.
    table: bytes | None = TRAIN_IDS
    kind = "labelIds"
    masks = _list_by_key(mask_folder, _MASK + kind)
    if not masks:
        table, kind = None, "labelTrainIds"
        masks = _list_by_key(mask_folder, _MASK + kind)
    if not masks:
        raise FileNotFoundError(
            f"{mask_folder} holds no CITY/*{_MASK}labelIds.png; unpack gtFine_trainvaltest.zip into {root}."
        )

    # Sort by city and name, so that the order does not depend on the file system.
    keys = sorted(images)
    check_present(keys, masks, str(mask_folder / f"{{}}{_MASK}{kind}.png"), "mask", "")
    return tuple(Pair(key.rpartition("/")[2], images[key], masks[key], table) for key in keys)


def _list_by_key(folder: Path, ending: str) -> dict[str, str]:
    """Returns the files by CITY/NAME, the part of their paths that images and masks share."""
    paths = list_by_stem(folder, (".png",), deep=True)
    # gtFine also holds instanceIds and colour images, which end differently.
    return {
        stem.removesuffix(ending): path for stem, path in paths.items() if stem.endswith(ending)
    }
