"""The files in a run's folder: kept epochs, logs, curves and pictures, names and colours."""

from __future__ import annotations

import csv
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from segprune.checkpoint import load, read
from segprune.data import load_mask, open_source
from segprune.data.shapes import CLASS_NAMES
from segprune.inference.draw import paint
from tests.commands import (
    BEST,
    LAST,
    SIZE,
    done,
    interrupted,
    invoke,
    refused,
    results_in,
    same,
    training,
)


@pytest.fixture
def run_of_four(data: Path, small: Path, tmp_path: Path) -> Path:
    """Four epochs, scored after the second and the last, of which the two latest are kept; with TensorBoard's logs."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "ep009-loss0.100.pth").write_bytes(b"of a run that is written over")
    flags = ("--epochs", 4, "--eval_every", 2, "--keep", 2, "--tensorboard")
    done(*training(data, out, "--model_path", small, *flags))
    return out


def scalars_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_a_runs_folder_holds_what_the_manual_says(run_of_four: Path) -> None:
    rows = results_in(run_of_four)["epochs"]
    kept = sorted(path.name for path in run_of_four.glob("ep0*"))
    assert kept == [
        f"ep003-loss{rows[2]['loss']:.3f}.pth",
        f"ep004-loss{rows[3]['loss']:.3f}-miou{rows[3]['miou']:.4f}.pth",
    ]
    third, fourth, last = (read(run_of_four / name) for name in (*kept, LAST))
    assert same(fourth.state_dict, last.state_dict)
    assert not same(third.state_dict, last.state_dict)
    assert load(run_of_four / kept[0]).spec == third.spec

    with (run_of_four / "training_log.csv").open(newline="", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    assert [int(line["epoch"]) for line in log] == [1, 2, 3, 4]
    for line, row in zip(log, rows, strict=True):
        assert (float(line["loss"]), float(line["lr"])) == (row["loss"], row["lr"])
        assert line["miou"] == ("" if "miou" not in row else str(row["miou"]))

    scalars = scalars_in(run_of_four / "tensorboard")
    assert [step for step, _ in scalars["train/loss"]] == list(
        range(1, 9)
    )  # two steps per epoch
    losses = [value for _, value in scalars["train/loss"]]
    assert [np.mean(losses[i : i + 2]) for i in (0, 2, 4, 6)] == pytest.approx(
        [row["loss"] for row in rows]
    )
    assert [value for _, value in scalars["train/lr"]][1::2] == pytest.approx(
        [row["lr"] for row in rows]
    )
    assert scalars["val/miou"] == [
        (4, pytest.approx(rows[1]["miou"])),
        (8, pytest.approx(rows[3]["miou"])),
    ]

    sizes = {}
    for name in ("epoch_loss.png", "epoch_miou.png", "contact_sheet.png"):
        with Image.open(run_of_four / name) as image:
            image.load()
            sizes[name] = image.size
    assert sizes["contact_sheet.png"][1] > 3 * 32  # three validation pictures below each other
    assert not list(run_of_four.glob(".*"))


def test_the_checkpoint_carries_the_datas_names_and_colours_to_predict(
    data: Path, small: Path, tmp_path: Path
) -> None:
    done(*training(data, tmp_path / "out", "--model_path", small, "--epochs", 1))
    extra = read(tmp_path / "out" / BEST).extra
    assert tuple(extra["class_names"]) == CLASS_NAMES
    palette = open_source(data).palette
    assert tuple(extra["palette"]) == palette
    pictures = data / "VOCdevkit/VOC2007/JPEGImages"
    done(
        "predict",
        tmp_path / "out" / BEST,
        "--input",
        pictures,
        *SIZE,
        "--kind",
        "mask",
        "--save_dir",
        tmp_path / "p",
    )
    record = json.loads((tmp_path / "p/predictions.json").read_text(encoding="utf-8"))
    assert tuple(record["class_names"]) == CLASS_NAMES
    path = next((tmp_path / "p/mask").glob("*.png"))
    with Image.open(path) as mask:
        assert np.array_equal(np.asarray(mask.convert("RGB")), paint(load_mask(path), palette))


def test_after_a_stop_no_step_stands_twice_in_tensorboard_and_every_epoch_is_kept_once(
    data: Path, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--model_path", small, "--epochs", 3, "--tensorboard", "--keep", 9)
    interrupted(5, *training(data, out, *flags))
    state = (out / "resume.pth").read_bytes()
    done("train", "--resume", "--save_dir", out)
    (out / "resume.pth").write_bytes(
        state
    )  # as a kill leaves it: the logs are ahead of the state
    done("train", "--resume", "--save_dir", out)
    scalars = scalars_in(out / "tensorboard")
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in scalars["val/miou"]] == [2, 4, 6]
    assert [path.name[:5] for path in sorted(out.glob("ep0*"))] == ["ep001", "ep002", "ep003"]


def test_a_run_that_is_started_anew_hides_the_old_ones_steps(
    data: Path, small: Path, tmp_path: Path
) -> None:
    for epochs in (2, 1):
        done(
            *training(
                data,
                tmp_path / "out",
                "--model_path",
                small,
                "--epochs",
                epochs,
                "--tensorboard",
            )
        )
    assert [step for step, _ in scalars_in(tmp_path / "out/tensorboard")["train/loss"]] == [
        1,
        2,
    ]


def test_without_tensorboard_the_flag_is_refused_with_the_pip_command(
    data: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, errors = invoke(
        *training(data, tmp_path / "out", "--model_path", small, "--tensorboard")
    )
    assert (status, errors) == (
        1,
        "Error: --tensorboard needs TensorBoard, which is not installed; run: pip install tensorboard\n",
    )


def test_a_disk_that_fills_up_is_told_with_the_way_on(
    data: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "my out"
    flags = ("--model_path", small, "--epochs", 3)
    done(*training(data, whole, *flags))
    room, write = iter([True, False]), Path.write_bytes

    def full(path: Path, content: Any) -> int:
        if LAST in path.name and not next(room):  # in the second epoch
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        said = refused(*training(data, out, *flags))
    assert said.startswith(
        f"{out / LAST} could not be written (No space left on device); give another place"
    )
    assert said.endswith(
        f"; the last good checkpoint is {out / LAST} of epoch 1, and the run can be resumed with "
        f"python -m segprune train --resume --save_dir '{out}'."
    )
    assert read(out / LAST).extra["epoch"]["epoch"] == 1
    done("train", "--resume", "--save_dir", out)
    assert same(read(out / LAST).state_dict, read(whole / LAST).state_dict)
