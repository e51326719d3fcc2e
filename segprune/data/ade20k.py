"""ADE20K as downloaded, the 150 classes of the scene parsing benchmark (ADEChallengeData2016).

    images/{training,validation}/*.jpg    annotations/{training,validation}/*.png    objectInfo150.txt

In the files 0 means no label and classes count from 1; as everywhere in the literature, 0 becomes 255 and n becomes
n - 1 (the "reduced zero label" of SegFormer's ADE20K checkpoints). 255 stays ignored.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from segprune.data.listing import find_subfolder, list_aliases, pair_folders
from segprune.data.pixels import voc_palette
from segprune.data.samples import MissingSplitError, Pair, Source
from segprune.data.text import read_lines

SIGNS = "ADEChallengeData2016 with images/{training,validation}, annotations/{training,validation}, objectInfo150.txt"
REDUCED = bytes([255, *range(254), 255])  # label by the value in the file
_INFO = "objectInfo150.txt"


def find_root(folder: Path, named: bool = False) -> Path | None:
    """Returns the folder itself, or the ADEChallengeData2016 in it; `named` says that the user called it ADE20K.

    Raises ValueError for a folder that has ADE20K's folders, but neither its name nor its list of objects: nothing
    there tells whether the labels have to be shifted.
    """
    # The archive unpacks into a folder of its own name, so its parent is accepted too.
    for root in (folder, folder / "ADEChallengeData2016"):
        # Only the training folders are asked for: the layout is clear without validation.
        if not all((root / kind / "training").is_dir() for kind in ("images", "annotations")):
            continue

        # Plain folders look the same, and there 0 is a class; something must say ADE20K.
        if named or (root / _INFO).is_file() or root.name.startswith("ADEChallengeData"):
            return root
        raise ValueError(
            f"{root} has the folders of ADE20K but no {_INFO}, so it cannot be told what the label 0 is; give the "
            "layout ade20k (0 is ignored, n is class n - 1) or folders (n is class n)."
        )

    return None


def open_root(root: Path) -> Source:
    names = _read_class_names(root / _INFO)
    return Source("ade20k", str(root), names, voc_palette(), partial(_list_split, root), False)


def _read_class_names(path: Path) -> tuple[str, ...]:
    """Returns the first synonym of each row's last column; () without the list. Rows stand in order of the classes."""
    # The names are a convenience; a set without its list can still be trained on.
    if not path.is_file():
        return ()

    rows = [line.split("\t") for line in read_lines(path) if line.strip()]
    # The heading has no number in its first column.
    return tuple(row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit())


def _list_split(root: Path, split: str) -> tuple[Pair, ...]:
    images = find_subfolder(root / "images", list_aliases(split))
    masks = find_subfolder(root / "annotations", list_aliases(split))
    # Both must be there: with one alone the other's files would all count as missing.
    if images is None or masks is None:
        raise MissingSplitError(
            f"{root} has no {split} split in both images and annotations; download ADEChallengeData2016 again, or give "
            "another split."
        )

    return pair_folders(images, masks, table=REDUCED)
