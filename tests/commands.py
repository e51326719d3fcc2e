"""The command line as the tests drive it: in this process, what it prints and what it refuses kept apart."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typer.testing import CliRunner

from segprune.cli import app

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


def training(data: Path, out: Path, *flags: object) -> tuple[object, ...]:
    return ("train", "--data", data, *SIZE, *HERE, "--batch_size", 4, "--save_dir", out, *flags)


def results_in(out: Path) -> dict[str, Any]:
    return json.loads((out / "training_results.json").read_text(encoding="utf-8"))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
