"""The command line as the tests drive it: in this process, what it prints and what it refuses kept apart."""

import json
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from typer.testing import CliRunner

from segprune.cli import app
from segprune.model import SegFormer
from segprune.runs.folder import Journal
from segprune.training.options import TrainOptions
from segprune.training.state import Splits

SIZE = ("--input_shape", "32", "32")
HERE = ("--num_workers", "0")  # pictures are loaded in this process
BEST, LAST = "best_epoch_weights.pth", "last_epoch_weights.pth"


def invoke(*flags: object) -> tuple[int, str, str]:
    """Exit status, standard output, standard error; an error that a user would see as a trace is raised."""
    result = CliRunner().invoke(app, [str(flag) for flag in flags])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def done(*flags: object) -> str:
    """What a command prints that has to succeed, white space reduced to single blanks."""
    status, out, errors = invoke(*flags)
    assert (status, errors) == (0, "")
    return " ".join(out.split())


def refused(*flags: object) -> str:
    """The one sentence in which a command with a mistake has to end."""
    status, _, errors = invoke(*flags)
    assert status == 1
    sentence = re.fullmatch(r"Error: (.+\.)\n", errors)
    assert sentence, errors
    assert not re.search(r"[.!?] +[A-Z]", sentence[1]), f"more than one sentence: {sentence[1]}"
    return sentence[1]


def interrupted(
    step: int, *flags: object, by: signal.Signals = signal.SIGINT
) -> tuple[int, str]:
    """Exit status and stderr of a command in which Ctrl-C comes in that step of training."""
    step_done = Journal.step_done

    def press(self: Journal, done: int, total: int, loss: float, lr: float) -> None:
        step_done(self, done, total, loss, lr)
        if done == step:
            signal.raise_signal(by)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "step_done", press)
        status, _, errors = invoke(*flags)
    return status, errors


@dataclass
class Told:
    """What a command printed until it came to train, and what the loop would have got."""

    out: str
    model: SegFormer
    config: TrainOptions
    splits: Splits
    options: dict[str, Any]


def told(*flags: object) -> Told:
    """A command that trains, stopped before the first step."""
    caught: list[Told] = []

    def stop(model: SegFormer, config: TrainOptions, splits: Splits, **options: Any) -> None:
        caught.append(Told("", model, config, splits, options))
        raise ValueError("Seen.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segprune.runs.fit.train", stop)
        status, out, errors = invoke(*flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (status, errors) == (1, "Error: Seen.\n")
    return replace(caught[0], out=" ".join(out.split()))


def training(data: Path, out: Path, *flags: object) -> tuple[object, ...]:
    return ("train", "--data", data, *SIZE, *HERE, "--batch_size", 4, "--save_dir", out, *flags)


def results_in(out: Path) -> dict[str, Any]:
    return json.loads((out / "training_results.json").read_text(encoding="utf-8"))


def rows_in(out: Path) -> list[dict[str, Any]]:
    """What is known of every epoch, without its speed, which no two runs share."""
    return [
        {name: row[name] for name in row if name != "images_per_second"}
        for row in results_in(out)["epochs"]
    ]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) for name in one
    )
