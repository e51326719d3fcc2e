"""Pictures that are damaged and lists that are empty: refused by name, or left out with --skip_bad."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.commands import HERE, SIZE, done, refused, results_in, training

SCORERS = ("eval", "prune")


def damaged(data: Path, folder: Path, split: str) -> tuple[Path, Path]:
    """A copy of the data in which one JPEG of the split is cut short, its header whole; and that picture."""
    root = shutil.copytree(data, folder) / "VOCdevkit/VOC2007"
    names = (root / f"ImageSets/Segmentation/{split}.txt").read_text(encoding="utf-8").split()
    path = root / f"JPEGImages/{names[1]}.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    return folder, path


def scoring(name: str, data: Path, path: Path, out: Path, *flags: object) -> tuple[object, ...]:
    here = ("--data", data, *SIZE, *HERE, *flags)
    if name == "eval":
        return ("eval", path, *here, "--json", out / "score.json")
    return ("prune", "--model_path", path, *here, "--pruning_rate", 0, "--save_dir", out)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_training_picture_is_named_and_left_out_on_demand(
    workers: int, data: Path, small: Path, tmp_path: Path
) -> None:
    folder, path = damaged(data, tmp_path / "data", "train")
    flags = ("--model_path", small, "--epochs", 1, "--batch_size", 1, "--num_workers", workers)
    said = refused(*training(folder, tmp_path / "out", *flags))
    message = rf"{re.escape(str(path))} cannot be read as an image \(.+\); replace it, or leave it out with --skip_bad\."
    assert re.fullmatch(message, said), said
    out = done(*training(folder, tmp_path / "out", *flags, "--skip_bad"))
    assert (
        f"Note: --skip_bad left out 1 of 8 in train: {path} cannot be read as an image (" in out
    )
    assert "Labels checked (voc): 7 in train, 3 in val" in out
    assert results_in(tmp_path / "out")["settings"]["skip_bad"] is True


@pytest.mark.parametrize("name", SCORERS)
def test_a_damaged_picture_to_score_is_named_and_left_out_on_demand(
    name: str, data: Path, small: Path, tmp_path: Path
) -> None:
    folder, path = damaged(data, tmp_path / "data", "val")
    said = refused(*scoring(name, folder, small, tmp_path / "out"))
    assert re.fullmatch(
        rf"{re.escape(str(path))} cannot be read .*, or leave it out with --skip_bad\.", said
    ), said
    out = done(*scoring(name, folder, small, tmp_path / "out", "--skip_bad"))
    assert (
        f"Note: --skip_bad left out 1 of 3 in val: {path} cannot be read as an image (" in out
    )
    where = (
        tmp_path / "out" / ("score.json" if name == "eval" else "l1/b0/pruning_results.json")
    )
    record = json.loads(where.read_text(encoding="utf-8"))
    assert (record if name == "eval" else record["pruned_model"])["num_images"] == 2


def test_a_split_of_damaged_pictures_alone_is_refused(
    data: Path, small: Path, tmp_path: Path
) -> None:
    folder, path = damaged(data, tmp_path / "data", "val")
    for other in path.parent.glob("*.jpg"):
        other.write_bytes(path.read_bytes()[:100])
    said = refused(*scoring("eval", folder, small, tmp_path, "--skip_bad"))
    assert said.startswith(
        "None of 3 images can be used; repair the data set, beginning with this: "
    )


@pytest.mark.parametrize("name", [*SCORERS, "train"])
def test_an_empty_split_is_refused(name: str, data: Path, small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    path = folder / "VOCdevkit/VOC2007/ImageSets/Segmentation/val.txt"
    path.write_text("\n")
    out = tmp_path / "out"
    if name == "train":
        said = refused(*training(folder, out, "--model_path", small))
    else:
        said = refused(*scoring(name, folder, small, out))
    assert said == f"{path} lists no image; write one image name per line, without extension."
    assert not out.exists()


@pytest.mark.parametrize("name", SCORERS)
def test_an_unknown_layout_is_refused(
    name: str, data: Path, small: Path, tmp_path: Path
) -> None:
    said = refused(*scoring(name, data, small, tmp_path / "out", "--layout", "coco"))
    assert (
        said
        == "The layout 'coco' is unknown; choose one of voc, cityscapes, camvid, ade20k, list, folders, hf."
    )
