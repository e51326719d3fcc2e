"""SIGTERM and SIGINT to the whole group of a run's processes, as systemd, Slurm, `timeout` and terminals send them."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

import pytest

from segprune.checkpoint import read, save
from tests.commands import BEST, LAST, SIZE, rows_in, same
from tests.training.tiny import tiny_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")

ROOT = Path(__file__).parents[2]
LOADING = ("--num_workers", 2, "--batch_size", 1)
EPOCHS, STEPS = 8, 8  # of an epoch
MOMENTS = 6
BOTH = (SIGTERM, SIGINT)

# Imports once, since that takes longer than the runs, then forks every run into a session of its own.
NURSERY = """
import json, os, sys, time, warnings
from pathlib import Path
import pydantic, torch, typer._adapters
import segprune.cli, segprune.inference.draw, segprune.plots, segprune.pruning.pruner

torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1)])  # imports more
warnings.filterwarnings("ignore", message="This DataLoader will create 2 worker processes")  # on one core

def start(job):
    child = os.fork()
    if not child:
        os.setsid()
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job["output"] + "." + name, os.O_WRONLY | os.O_CREAT), number)
        segprune.cli.app(job["flags"])  # ends the process
    return child

def version(path):
    return path.stat().st_mtime_ns if path.exists() else None

def num_running(group):
    number = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, its_group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        number += int(its_group) == group and state != "Z"
    return number

def wait(child, state, before):
    # Until workers run, or where a file of the run's state is given, until that is written; or until the run ends.
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if version(state) != before if state else Path(f"/proc/{child}/task/{child}/children").read_text():
            return
        time.sleep(0.005)

endings = []
for job in json.loads(sys.argv[1]):
    state = job["state"] and Path(job["state"])
    before = state and version(state)
    child = start(job)
    if job["signal"]:
        wait(child, state, before)
        time.sleep(job["seconds"])
        (os.killpg if job["group"] else os.kill)(child, job["signal"])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    deadline = time.monotonic() + 3
    while (number := num_running(child)) and time.monotonic() < deadline:
        time.sleep(0.05)
    endings.append([status, number])
print(json.dumps(endings))
"""


@dataclass(frozen=True)
class Job:
    """A run, and the signal it gets: so many seconds after it started workers, or after it wrote `state`."""

    flags: Sequence[object]
    output: Path  # with .out and .err behind it
    signal: Signals | int = 0  # 0: none
    seconds: float = 0.0
    state: Path | None = None
    group: bool = True  # rather than the one process


@dataclass(frozen=True)
class Ending:
    """How a run ended: its status, what it wrote to stderr, and how many processes it left running."""

    status: int
    errors: str
    num_running: int = 0


def endings(jobs: Sequence[Job]) -> list[Ending]:
    """Of the jobs, which are run one after another."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = json.dumps(
        [asdict(job) | {"flags": list(map(str, job.flags))} for job in jobs], default=str
    )
    result = subprocess.run(
        [sys.executable, "-c", NURSERY, words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return [
        Ending(status, job.output.with_suffix(".err").read_text(encoding="utf-8"), num_running)
        for job, (status, num_running) in zip(jobs, json.loads(result.stdout), strict=True)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    save(tiny_model(), path)
    return path


@pytest.fixture(scope="module")
def runs(
    data: Path, tiny: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Ending]]:
    """Where the runs of all tests wrote, and how they ended: `TRAINED`, then `SCORED`, then `PRUNED`."""
    folder = tmp_path_factory.mktemp("runs")
    rng = random.Random(1)

    # One run, broken off six times soon after it saved a state by itself, which it does in every third step.
    out = folder / "broken"
    flags = (
        "train",
        "--model_path",
        tiny,
        "--data",
        data,
        *SIZE,
        *LOADING,
        "--epochs",
        EPOCHS,
        "--eval_every",
        2,
    )
    resume = ("train", "--resume", "--save_dir", out)
    jobs = [Job((*flags, "--save_dir", folder / "whole"), folder / "whole run")]
    for number in range(MOMENTS):
        command = resume if number else (*flags, "--save_steps", 3, "--save_dir", out)
        output = folder / f"training {number}"
        jobs.append(
            Job(
                command,
                output,
                BOTH[number % 2],
                rng.uniform(0, 0.06),
                state=out / "resume.pth",
            )
        )
    jobs.append(Job(resume, folder / "last run"))

    flags = ("eval", tiny, "--split", "train", "--data", data, *SIZE, *LOADING)
    for number in range(6):
        output, group = folder / f"scoring {number}", number >= 2
        jobs.append(Job(flags, output, BOTH[number % 2], rng.uniform(0, 0.06), group=group))

    flags = (
        "prune",
        "--model_path",
        dense,
        "--no_repair",
        "--save_dir",
        folder,
        "--data",
        data,
        *SIZE,
        *LOADING,
    )
    for number in range(2):
        jobs.append(
            Job(flags, folder / f"pruning {number}", BOTH[number % 2], rng.uniform(0, 0.2))
        )

    return folder, endings(jobs)


TRAINED, SCORED, PRUNED = (
    slice(0, MOMENTS + 2),
    slice(MOMENTS + 2, MOMENTS + 8),
    slice(MOMENTS + 8, None),
)


def test_training_saves_its_state_whenever_its_group_is_signalled_and_ends_with_the_same_bits(
    runs: tuple[Path, list[Ending]],
) -> None:
    folder = runs[0]
    first, *stopped, last = runs[1][TRAINED]
    assert first == last == Ending(0, "")

    steps = []
    for ending in stopped:
        told = re.fullmatch(
            r".* in epoch (\d+) after (\d) batches\. .*--resume.*\n", ending.errors
        )
        assert told, ending
        assert (ending.status, ending.num_running) == (130, 0)
        steps.append((int(told[1]) - 1) * STEPS + int(told[2]))
    assert steps == sorted(set(steps))
    assert any(step % STEPS % 3 for step in steps)  # not only states that --save_steps saves

    whole, broken = folder / "whole", folder / "broken"
    for name in (BEST, LAST):
        assert same(read(broken / name).state_dict, read(whole / name).state_dict)
        assert read(broken / name).extra == read(whole / name).extra
    assert rows_in(broken) == rows_in(whole)


def test_scoring_ends_as_if_only_its_own_process_was_signalled(
    runs: tuple[Path, list[Ending]],
) -> None:
    terminated, interrupted, *signalled = runs[1][SCORED]
    assert terminated == Ending(-SIGTERM, "")
    assert (interrupted.status, interrupted.num_running) == (130, 0)
    assert "Interrupted" in interrupted.errors
    assert signalled == [terminated, interrupted] * 2
    assert runs[1][PRUNED] == [terminated, interrupted]
