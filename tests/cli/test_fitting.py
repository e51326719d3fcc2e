"""A run's folder: best and last epoch, results, and the state from which a stopped run goes on."""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch

from segprune.checkpoint import read
from segprune.data import write_shapes
from segprune.inference.evaluate import Score
from segprune.runs.folder import Journal
from segprune.tensor_files import load_record, save_record
from segprune.training import loop
from tests.commands import (
    BEST,
    HERE,
    LAST,
    SIZE,
    done,
    interrupted,
    refused,
    results_in,
    rows_in,
    same,
    training,
)


def test_a_run_that_is_told_to_stop_goes_on_to_the_same_weights(
    data: Path, small: Path, tmp_path: Path
) -> None:
    flags = ("--model_path", small, "--epochs", 2)  # of 2 steps each
    done(*training(data, tmp_path / "whole", *flags))
    for step, by in ((1, signal.SIGINT), (2, signal.SIGTERM), (3, signal.SIGINT)):
        out = tmp_path / f"stopped in {step}"
        status, errors = interrupted(step, *training(data, out, *flags), by=by)
        assert status == 130
        stopped = re.fullmatch(
            r"Training was interrupted in epoch (\d) after (\d) batches\. Go on with: python -m segprune (.+)\n",
            errors,
        )
        assert stopped, errors
        assert 2 * (int(stopped[1]) - 1) + int(stopped[2]) == step
        done(*shlex.split(stopped[3]))
        for name in (BEST, LAST):
            whole, resumed = read(tmp_path / "whole" / name), read(out / name)
            assert same(resumed.state_dict, whole.state_dict)
            assert resumed.extra == whole.extra
        assert rows_in(out) == rows_in(tmp_path / "whole")


def test_resuming_a_run_that_ended_changes_nothing(
    data: Path, small: Path, tmp_path: Path
) -> None:
    done(*training(data, tmp_path / "out", "--model_path", small, "--epochs", 1))
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    out = done("train", "--resume", "--save_dir", tmp_path / "out")
    assert "Best epoch 1 on val" in out
    assert (
        "Note: This run is complete (1 of 1 epochs), so nothing is trained; to train on, start a new one with "
        f"--model_path {tmp_path}/out/{LAST} and another --save_dir."
    ) in out
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


OTHER_SETTINGS: list[tuple[tuple[object, ...], str]] = [
    (("--phi", "b1"), "The run to resume had --phi b0, now it is b1; leave the flag out."),
    (
        ("--num_classes", 5),
        "The run to resume had --num_classes 8, now it is 5; leave the flag out.",
    ),
    (
        ("--drop_path", 0.4),
        "The run to resume had --drop_path 0.1, now it is 0.4; leave the flag out.",
    ),
    (
        ("--lr_rule", "voc"),
        "The run to resume had --lr_rule none, now it is voc; leave the flag out.",
    ),
    (
        ("--epochs", 3),
        "The run to resume had --epochs 2, now it is 3; resume with the same settings, or start",
    ),
    (("--lr", 1), "The run to resume had --lr 0.001, now it is 1.0; leave the flag out."),
    (
        ("--input_shape", 64, 64),
        "The run to resume had --input_shape (32, 32), now it is (64, 64); resume with",
    ),
    (("--ema", 0.5), "The run to resume had --ema 0.0, now it is 0.5; resume with"),
    (
        ("--label_smoothing", 0.1),
        "The run to resume had --label_smoothing 0.0, now it is 0.1; resume with",
    ),
]


def test_a_run_is_resumed_only_with_its_own_settings_network_and_pictures(
    data: Path, small: Path, teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(
        1, *training(data, out, "--model_path", small, "--drop_path", 0.1, "--epochs", 2)
    )
    call = ("train", "--resume", "--save_dir", out)
    for flags, message in OTHER_SETTINGS:
        assert refused(*call, *flags).startswith(message)
    said = refused(*call, "--model_path", teacher)
    assert (
        said
        == f"The run to resume had --model_path {small}, now it is {teacher}; leave the flag out."
    )
    write_shapes(tmp_path / "others", num_train=7, num_val=3, size=(32, 32))
    assert refused(*call, "--data", tmp_path / "others") == (
        "The run to resume had other images (names, number or order of the train and val lists); give it the same "
        "data, or start anew without --resume."
    )


def test_a_state_that_is_not_of_its_network_is_refused(
    data: Path, small: Path, tmp_path: Path
) -> None:
    interrupted(1, *training(data, tmp_path / "out", "--model_path", small))
    path = tmp_path / "out/resume.pth"
    record = load_record(path)
    name = "decode_head.classifier.weight"
    record["state"]["model"][name] = record["state"]["model"][name][:5].clone()
    save_record(record, path)
    said = refused("train", "--resume", "--save_dir", path.parent)
    assert said.startswith(
        f"{name} has the shape 5 44 1 1 where its spec has 8 44 1 1; give a checkpoint of an"
    )


def test_the_averaged_weights_are_saved_and_scored_and_a_run_goes_on_from_its_own(
    data: Path, small: Path, tmp_path: Path
) -> None:
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    flags = ("--model_path", small, "--epochs", 2)
    done(*training(data, plain, *flags))
    done(*training(data, averaged, *flags, "--ema", 0.5))
    state = load_record(averaged / "resume.pth")["state"]
    saved = read(averaged / LAST).state_dict
    assert same(
        state["model"], read(plain / LAST).state_dict
    )  # averaging does not change the course
    assert same(saved, state["ema"]["averages"])
    assert not same(saved, state["model"])
    score = tmp_path / "score.json"
    done(
        "eval",
        averaged / LAST,
        "--data",
        data,
        *SIZE,
        *HERE,
        "--batch_size",
        4,
        "--json",
        score,
    )
    assert (
        json.loads(score.read_text(encoding="utf-8"))["miou"] == rows_in(averaged)[-1]["miou"]
    )


def test_only_a_folder_with_a_run_is_resumed(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "resume.pth"
    missing = f"{path} is missing, so no run can be resumed there; give the --save_dir of one."
    assert refused("train", "--resume", "--save_dir", tmp_path) == missing
    path.write_bytes(small.read_bytes())
    other = f"{path} is not the state of a run; give the --save_dir of one, or start anew."
    assert refused("train", "--resume", "--save_dir", tmp_path) == other
    torch.save({"weights": torch.ones(1)}, path)
    assert refused("train", "--resume", "--save_dir", tmp_path) == other
    path.write_bytes(b"")
    assert refused("train", "--resume", "--save_dir", tmp_path).startswith(
        f"{path} is empty; copy or download"
    )


def test_training_that_diverges_is_stopped_with_advice(
    data: Path, small: Path, tmp_path: Path
) -> None:
    flags = ("--model_path", small, "--lr", 1e20, "--warmup", 0, "--epochs", 3)
    message = (
        r"The loss became (nan|inf) in epoch 1, batch \d \(step \d of 6\); lower --lr \(it was 1e\+20\) and start "
        r"again; no epoch had been completed\."
    )
    assert re.fullmatch(message, refused(*training(data, tmp_path / "out", *flags)))


def test_training_that_diverges_later_names_the_last_good_checkpoint(
    data: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruin(self: Journal, done: int, total: int, loss: float, lr: float) -> None:
        if done == 3:  # of two per epoch
            next(self.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(Journal, "step_done", ruin)
    out = tmp_path / "out"
    assert refused(*training(data, out, "--model_path", small, "--epochs", 3)) == (
        "The loss became nan in epoch 2, batch 2 (step 4 of 6); lower --lr (it was 0.001) and start again; the last "
        f"good checkpoint is {out / LAST} of epoch 1."
    )
    assert read(out / LAST).extra["epoch"]["epoch"] == 1


def test_the_best_epoch_is_kept_and_every_epoch_recorded(
    data: Path, small: Path, tmp_path: Path
) -> None:
    out = done(
        *training(
            data, tmp_path / "out", "--model_path", small, "--epochs", 5, "--eval_every", 2
        )
    )
    results = results_in(tmp_path / "out")
    assert [row["epoch"] for row in results["epochs"]] == [1, 2, 3, 4, 5]
    scored = {row["epoch"]: row["miou"] for row in results["epochs"] if "miou" in row}
    assert list(scored) == [2, 4, 5]
    best = max(scored, key=scored.__getitem__)
    assert [row["epoch"] for row in results["epochs"] if row["best"]][-1] == best
    assert f"Best epoch {best} on val (3 images)" in out
    for name, epoch in ((BEST, best), (LAST, 5)):
        assert (
            read(tmp_path / "out" / name).extra["epoch"] == rows_in(tmp_path / "out")[epoch - 1]
        )
    score = tmp_path / "score.json"
    done(
        "eval",
        tmp_path / "out" / BEST,
        "--data",
        data,
        *SIZE,
        *HERE,
        "--batch_size",
        4,
        "--json",
        score,
    )
    assert json.loads(score.read_text(encoding="utf-8"))["miou"] == scored[best]


def test_the_best_epoch_stays_when_later_ones_are_worse(
    data: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mious = iter([0.1, 0.5, 0.5, 0.3])
    half = (0.5,) * 8
    monkeypatch.setattr(
        loop,
        "score",
        lambda counts, k, number: Score(next(mious), 0.5, 0.5, half, half, half, number),
    )
    assert "Best epoch 2 on val" in done(
        *training(data, tmp_path / "out", "--model_path", small, "--epochs", 4)
    )
    best, last = read(tmp_path / "out" / BEST), read(tmp_path / "out" / LAST)
    assert (best.extra["epoch"]["epoch"], last.extra["epoch"]["epoch"]) == (2, 4)
    assert not same(best.state_dict, last.state_dict)


def test_the_settings_are_saved_beside_the_results(
    data: Path, small: Path, tmp_path: Path
) -> None:
    done(*training(data, tmp_path / "out", "--model_path", small, "--epochs", 1))
    settings = results_in(tmp_path / "out")["settings"]
    expected = {
        "data": str(data),
        "model_path": str(small),
        "phi": "b0",
        "num_classes": 8,
        "input_shape": [32, 32],
    }
    assert expected.items() <= settings.items()
    assert {
        "epochs": 1,
        "batch_size": 4,
        "seed": 11,
        "save_dir": str(tmp_path / "out"),
    }.items() <= settings.items()


def test_of_kept_epochs_the_latest_stay_and_other_scripts_files_are_left_alone(
    data: Path, small: Path, tmp_path: Path
) -> None:
    theirs, old = "ep001-loss0.512-val_loss0.498.pth", "ep009-loss0.512-miou0.4980.pth"
    (tmp_path / "out").mkdir()
    for name in (theirs, old):
        (tmp_path / "out" / name).touch()
    done(*training(data, tmp_path / "out", "--model_path", small, "--epochs", 3, "--keep", 2))
    kept = sorted(path.name for path in (tmp_path / "out").glob("ep*.pth"))
    assert [re.sub(r"\d+\.\d+", "X", name) for name in kept if name != theirs] == [
        "ep002-lossX-miouX.pth",
        "ep003-lossX-miouX.pth",
    ]
    assert theirs in kept
