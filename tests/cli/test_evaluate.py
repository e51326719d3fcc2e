"""`segprune eval`: the score that the library gives, printed and saved."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segprune.checkpoint import load, save
from segprune.data import open_source
from segprune.model import SegFormer
from segprune.training.evaluate import evaluate
from tests.commands import HERE, SIZE, done, refused


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_score_is_the_librarys_and_is_saved_as_json(split: str, data: Path, dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "score.json"
    out = done("eval", dense, "--data", data, "--split", split, *SIZE, *HERE, "--json", path)
    samples = open_source(data).split(split)
    score = evaluate(load(dense), samples, 8, (32, 32))
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (record["miou"], record["pixel_accuracy"]) == (score.miou, score.pixel_accuracy)
    assert record["iou"] == list(score.iou)
    assert record["num_images"] == len(samples)
    assert (record["num_classes"], record["settings"]["split"]) == (8, split)
    assert f"{dense} on {split} ({len(samples)} images)" in out
    assert f"│ mIoU │ {score.miou:.4f} │" in out
    assert "│ 7 bar │" in out  # named by the data's classes.txt
    assert f"Saved: {path}" in out


def test_without_json_nothing_is_written(data: Path, dense: Path) -> None:
    before = set(dense.parent.iterdir())
    assert "Saved" not in done("eval", dense, "--data", data, *SIZE, *HERE)
    assert set(dense.parent.iterdir()) == before


def test_a_split_that_is_not_listed_is_refused(data: Path, dense: Path) -> None:
    said = refused("eval", dense, "--data", data, "--split", "test", *SIZE)
    assert "ImageSets/Segmentation/test.txt is missing, the list of the split's images; write it with" in said


def test_only_the_masks_that_are_scored_are_checked(data: Path, dense: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    mask = open_source(tmp_path / "data").split("train")[2].mask
    Image.fromarray(np.full((32, 32), 200, dtype=np.uint8)).save(mask)
    done("eval", dense, "--data", tmp_path / "data", *SIZE, *HERE)
    said = refused("eval", dense, "--data", tmp_path / "data", "--split", "train", *SIZE, *HERE)
    assert said.startswith(f"Mask {mask} holds the label 200, where 0..7 and 255 (ignored) are allowed")


def test_a_network_with_fewer_classes_than_the_masks_is_refused(
    data: Path, small_model: SegFormer, tmp_path: Path
) -> None:
    save(small_model.float(), tmp_path / "five.pth")
    said = refused("eval", tmp_path / "five.pth", "--data", data, *SIZE)
    assert "where 0..4 and 255 (ignored) are allowed with 5 classes; raise --num_classes or relabel the masks" in said


def test_a_dialect_that_contradicts_the_file_is_refused(data: Path, dense: Path) -> None:
    said = refused("eval", dense, "--data", data, "--dialect", "smp")
    assert said.endswith("The file is segprune's own, but --dialect smp was given; leave --dialect out.")
