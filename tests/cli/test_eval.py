"""`segprune eval`: the scores that the library gives, printed and saved."""

import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segprune.checkpoint import load, save
from segprune.data import open_source
from segprune.inference.evaluate import EvalMode, Score, evaluate
from segprune.model import SegFormer
from tests.commands import HERE, SIZE, done, refused

PLOTS = {"mIoU.png", "mPA.png", "mRecall.png", "mPrecision.png", "confusion_matrix.png"}


def score_of(dense: Path, data: Path, how: EvalMode, split: str = "val") -> Score:
    return evaluate(load(dense), open_source(data).split(split), 8, how)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_score_is_the_librarys_and_is_saved_as_json(
    split: str, data: Path, dense: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "score.json"
    out = done("eval", dense, "--data", data, "--split", split, *SIZE, *HERE, "--json", path)
    score = score_of(dense, data, EvalMode(input_shape=(32, 32), boundary=True), split)
    record = json.loads(path.read_text(encoding="utf-8"))
    expected = json.loads(json.dumps(asdict(score)))
    assert {name: record[name] for name in expected} == expected
    assert record["class_names"][-1] == "bar"
    assert (record["num_classes"], record["settings"]["split"]) == (8, split)
    assert f"{dense} on {split} ({score.num_images} images)" in out
    assert (
        f"mIoU {score.miou:.4f}, mPA {score.mean_accuracy:.4f}, pixel accuracy {score.pixel_accuracy:.4f}, "
        f"boundary mIoU {score.boundary_miou:.4f}"
    ) in out
    assert "│ 7 bar │" in out  # named by the data's classes.txt
    assert f"Saved: {path}" in out


def test_compiled_it_scores_the_same(
    data: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_for = []

    def compile_nothing(function: object, **_: object) -> object:
        compiled_for.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    path = tmp_path / "score.json"
    done("eval", dense, "--data", data, *SIZE, *HERE, "--compile", "--json", path)
    expected = score_of(dense, data, EvalMode(input_shape=(32, 32)))
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["pixel_accuracy"] == pytest.approx(expected.pixel_accuracy, abs=1e-3)
    assert len(compiled_for) == 1  # three images in one batch


@pytest.mark.parametrize(
    ("flags", "how"),
    [
        (("--mode", "whole"), EvalMode("whole")),
        (("--mode", "slide", *SIZE), EvalMode("slide", (32, 32))),
        (
            ("--mode", "slide", "--input_shape", 32, 40, "--stride", 16, 9),
            EvalMode("slide", (32, 40), (16, 9)),
        ),
        (
            ("--scales", "1,1.5", "--flip", *SIZE),
            EvalMode(input_shape=(32, 32), scales=(1.0, 1.5), flip=True),
        ),
        (
            ("--mode", "whole", "--scales", " 0.5, 2 1.25"),
            EvalMode("whole", scales=(0.5, 2.0, 1.25)),
        ),
    ],
)
def test_the_flags_say_how_images_go_through_the_network(
    flags: tuple[object, ...], how: EvalMode, data: Path, dense: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    root = tmp_path / "data" / "VOCdevkit" / "VOC2007"
    name = open_source(root).split("val")[0].name
    big = Image.open(root / "JPEGImages" / f"{name}.jpg").resize((75, 50))
    big.save(root / "JPEGImages" / f"{name}.jpg")
    Image.open(root / "SegmentationClass" / f"{name}.png").resize(
        (75, 50), Image.Resampling.NEAREST
    ).save(root / "SegmentationClass" / f"{name}.png")
    path = tmp_path / "score.json"
    out = done("eval", dense, "--data", root, *flags, *HERE, "--no_boundary", "--json", path)
    record = json.loads(path.read_text(encoding="utf-8"))
    score = score_of(dense, root, how)
    assert record["confusion"] == [list(row) for row in score.confusion]
    assert "boundary_iou" not in record
    assert "boundary mIoU" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--mode", "crop"),
            "--mode 'crop' is unknown; choose one of letterbox, whole, slide.",
        ),
        (
            ("--stride", 16, 16),
            "--stride has no effect in mode letterbox; leave it out, or choose the mode slide.",
        ),
        (
            ("--mode", "slide", *SIZE, "--stride", 33, 16),
            "--stride is 33×16, where 1×1 to the window",
        ),
        (("--scales", "1;2"), "--scales is '1;2'; give numbers such as 0.75,1,1.25."),
        (("--scales", ""), "--scales is ''; give numbers such as 0.75,1,1.25."),
        (("--scales", "1,-1"), "--scales is 1 -1; give at least one, each above 0"),
        (
            ("--mode", "whole", *SIZE),
            "--input_shape has no effect with --mode whole, which takes every image's own size; leave it out.",
        ),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    flags: tuple[object, ...], message: str, data: Path, dense: Path, tmp_path: Path
) -> None:
    assert refused(
        "eval", dense, "--data", data, *flags, "--save_dir", tmp_path / "out"
    ).startswith(message)
    assert not (tmp_path / "out").exists()


def rows_in(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_a_folder_gets_json_tables_and_plots(data: Path, dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "scores"
    out = done("eval", dense, "--data", data, *SIZE, *HERE, "--save_dir", folder)
    assert f"Saved: scores.json, scores.csv, confusion_matrix.csv and plots in {folder}" in out
    assert {path.name for path in folder.iterdir()} == PLOTS | {
        "scores.json",
        "scores.csv",
        "confusion_matrix.csv",
    }
    record = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    head, *rows = rows_in(folder / "scores.csv")
    assert head == ["class", "name", "iou", "recall", "precision", "boundary_iou", "pixels"]
    assert [row[:2] for row in rows] == [
        [str(k), name] for k, name in enumerate(record["class_names"])
    ]
    for number, name in enumerate(head[2:-1], start=2):
        assert [float(row[number]) if row[number] else None for row in rows] == record[name]
    head, *rows = rows_in(folder / "confusion_matrix.csv")
    assert head == ["label \\ predicted", *record["class_names"]]
    assert [row[0] for row in rows] == record["class_names"]
    assert [[int(cell) for cell in row[1:]] for row in rows] == record["confusion"]
    for name in PLOTS:
        with Image.open(folder / name) as image:
            assert min(image.size) > 200


def test_the_bars_titles_are_the_means(
    data: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: dict[str, str] = {}
    monkeypatch.setattr(
        "segprune.plots.bars",
        lambda values, names, title, path: titles.update({path.name: title}),
    )
    done("eval", dense, "--data", data, *SIZE, *HERE, "--save_dir", tmp_path)
    record = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    precisions = [value for value in record["precision"] if value is not None]
    assert titles == {
        "mIoU.png": f"mIoU {record['miou']:.4f}",
        "mPA.png": f"mPA {record['mean_accuracy']:.4f}",
        "mRecall.png": f"mRecall {record['mean_accuracy']:.4f}",
        "mPrecision.png": f"mPrecision {sum(precisions) / len(precisions):.4f}",
    }


def test_classes_without_names_are_numbered_in_the_tables(
    data: Path, dense: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "VOCdevkit" / "VOC2007" / "classes.txt").write_text(
        "背景\nsea, deep", encoding="utf-8"
    )
    done(
        "eval",
        dense,
        "--data",
        tmp_path / "data",
        *SIZE,
        *HERE,
        "--no_boundary",
        "--save_dir",
        tmp_path / "out",
    )
    head, *rows = rows_in(tmp_path / "out" / "scores.csv")
    assert "boundary_iou" not in head
    assert [row[1] for row in rows] == ["背景", "sea, deep", "", "", "", "", "", ""]
    assert rows_in(tmp_path / "out" / "confusion_matrix.csv")[0][1:] == [
        "背景",
        "sea, deep",
        *"234567",
    ]


def test_without_a_place_to_save_nothing_is_written(data: Path, dense: Path) -> None:
    before = set(dense.parent.iterdir())
    assert "Saved" not in done("eval", dense, "--data", data, *SIZE, *HERE)
    assert set(dense.parent.iterdir()) == before


def test_a_folder_that_cannot_be_written_is_refused_before_scoring(
    data: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "segprune.api.score_samples", lambda *args, **kwargs: pytest.fail("it scored")
    )
    (tmp_path / "file").touch()
    said = refused("eval", dense, "--data", data, *SIZE, *HERE, "--save_dir", tmp_path / "file")
    assert said.startswith(f"{tmp_path}/file/.writable could not be written")


def test_a_split_that_is_not_listed_is_refused(data: Path, dense: Path) -> None:
    said = refused("eval", dense, "--data", data, "--split", "test", *SIZE)
    assert "ImageSets/Segmentation/test.txt is missing, the list of the split's images" in said


def test_only_the_masks_that_are_scored_are_checked(
    data: Path, dense: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    mask = open_source(tmp_path / "data").split("train")[2].mask
    Image.fromarray(np.full((32, 32), 200, dtype=np.uint8)).save(mask)
    done("eval", dense, "--data", tmp_path / "data", *SIZE, *HERE)
    said = refused("eval", dense, "--data", tmp_path / "data", "--split", "train", *SIZE, *HERE)
    assert said.startswith(
        f"Mask {mask} holds the label 200, where 0..7 and 255 (ignored) are allowed"
    )


def test_a_network_with_fewer_classes_than_the_masks_is_refused(
    data: Path, small_model: SegFormer, tmp_path: Path
) -> None:
    save(small_model.float(), tmp_path / "five.pth")
    said = refused("eval", tmp_path / "five.pth", "--data", data, *SIZE)
    assert "where 0..4 and 255 (ignored) are allowed with 5 classes; " in said
    assert "; relabel the masks, or give a network that was trained for these classes (" in said


def test_a_dialect_that_contradicts_the_file_is_refused(data: Path, dense: Path) -> None:
    said = refused("eval", dense, "--data", data, "--dialect", "smp")
    assert said.endswith(
        "The file is segprune's own, but --dialect smp was given; leave --dialect out."
    )
