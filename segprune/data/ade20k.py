"""ADE20K as downloaded, the 150 classes of the scene parsing benchmark (ADEChallengeData2016).

    images/{training,validation}/*.jpg    annotations/{training,validation}/*.png    objectInfo150.txt

In the files 0 means no label and classes count from 1; as everywhere in the literature, 0 becomes 255 and n becomes
n - 1 (the "reduced zero label" of SegFormer's ADE20K checkpoints). 255 stays ignored.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from segprune.data.listing import aliases, pairs, read_lines, subfolder
from segprune.data.pixels import voc_palette
from segprune.data.samples import Pair, Source

LOOKED_FOR = (
    "ADEChallengeData2016 with images/{training,validation}, annotations/{training,validation}, objectInfo150.txt"
)
REDUCED = bytes([255, *range(254), 255])  # by the value in the file
_INFO = "objectInfo150.txt"


def find(folder: Path, named: bool = False) -> Path | None:
    """The folder itself, or the ADEChallengeData2016 in it; `named` says that the user called it ADE20K.

    Raises ValueError for what has its folders, but neither its name nor its list of objects: whether to shift the
    labels cannot be told from that.
    """
    for root in (folder, folder / "ADEChallengeData2016"):
        shaped = all((root / kind / "training").is_dir() for kind in ("images", "annotations"))
        if shaped and (named or (root / _INFO).is_file() or root.name.startswith("ADEChallengeData")):
            return root
        if shaped:
            raise ValueError(
                f"{root} has the folders of ADE20K but no {_INFO}, so it cannot be told what the label 0 is; give the "
                "layout ade20k (0 is ignored, n is class n - 1) or folders (n is class n)."
            )
    return None


def source(root: Path) -> Source:
    return Source("ade20k", str(root), _class_names(root / _INFO), voc_palette(), partial(_split, root), False)


def _class_names(path: Path) -> tuple[str, ...]:
    """The first synonym of the last column, as it stands in the list by number; () without the list."""
    if not path.is_file():
        return ()
    rows = [line.split("\t") for line in read_lines(path) if line.strip()]
    return tuple(row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit())


def _split(root: Path, split: str) -> tuple[Pair, ...]:
    images, masks = (subfolder(root / kind, aliases(split)) for kind in ("images", "annotations"))
    if images is None or masks is None:
        raise FileNotFoundError(
            f"{root} has no {split} split in both images and annotations; download ADEChallengeData2016 again, or give "
            "another split."
        )
    return pairs(images, masks, table=REDUCED)
