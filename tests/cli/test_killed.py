"""Real processes that are killed, told to stop, or come in pairs: what they leave goes on, and ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segprune.checkpoint import load, read
from tests.commands import BEST, HERE, LAST, SIZE, done, rows_in, same, training

ROOT = Path(__file__).parents[2]
KILLS = 3

# Imports once, then forks a process for every command, since importing takes longer than the runs. A run that is to be
# killed gets SIGKILL some saved states later, wherever it is then.
NURSERY = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
import segprune.cli, segprune.inference.draw, segprune.plots

torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1)])  # imports more

def start(flags):
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        segprune.cli.app([*flags])  # ends the process
    return child

def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def version(path):
    return path.stat().st_mtime_ns if path.exists() else 0

def wait_for_saves(path, number):
    deadline = time.monotonic() + 300
    last = version(path)
    while number and time.monotonic() < deadline:
        time.sleep(0.002)
        if version(path) != last:
            last, number = version(path), number - 1

whole, broken = json.loads(sys.argv[1])
assert status(start(whole)) == 0
out = Path(broken[broken.index("--save_dir") + 1])
random.seed(1)
seen, steps = [], []
for number in range(int(sys.argv[2])):
    child = start(broken if number == 0 else ["train", "--resume", "--save_dir", str(out)])
    wait_for_saves(out / "resume.pth", 2 if number == 0 else random.randint(1, 3))
    time.sleep(random.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    seen.append(status(child))
    state = torch.load(out / "resume.pth", weights_only=True)["state"]
    steps.append(state["steps_done"])
seen.append(status(start(["train", "--resume", "--save_dir", str(out)])))
print(json.dumps([seen, steps]))
"""


def process(*command: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    data: Path, small: Path, teacher: Path, tmp_path: Path
) -> None:
    flags = (
        "--model_path",
        small,
        "--teacher",
        teacher,
        "--ema",
        0.8,
        "--freeze_epochs",
        1,
        "--epochs",
        4,
    )
    whole, out = tmp_path / "whole", tmp_path / "out"
    commands = [
        [
            str(word)
            for word in training(data, folder, *flags, "--batch_size", 2, "--save_steps", 1)
        ]
        for folder in (whole, out)
    ]
    result = process("-c", NURSERY, json.dumps(commands), KILLS)
    assert (result.returncode, result.stderr) == (0, "")
    statuses, steps = json.loads(result.stdout)
    assert statuses == [-9] * KILLS + [0]
    assert steps == sorted(steps)
    assert (
        steps[0] < 4 <= steps[-1] < 16
    )  # the first kill came within the first epoch, the last before the end
    for name in (BEST, LAST):
        assert same(read(out / name).state_dict, read(whole / name).state_dict)
        assert read(out / name).extra == read(whole / name).extra
    assert rows_in(out) == rows_in(whole)
    assert {path.name for path in out.iterdir()} >= {path.name for path in whole.iterdir()}


def test_two_processes_train_one_network_and_leave_one_set_of_files(
    data: Path, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    result = process(
        *launcher,
        ROOT / "train.py",
        *training(data, out, "--model_path", small, "--epochs", 1)[1:],
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Best epoch 1 on val (3 images)") == 1
    assert {path.name for path in out.iterdir()} == {
        BEST,
        LAST,
        "contact_sheet.png",
        "epoch_loss.png",
        "epoch_miou.png",
        "report.html",
        "resume.pth",
        "training_log.csv",
        "training_results.json",
    }
    assert load(out / BEST).spec == read(small).spec
    score = tmp_path / "score.json"
    done("eval", out / BEST, "--data", data, *SIZE, *HERE, "--batch_size", 4, "--json", score)
    miou = json.loads(score.read_text(encoding="utf-8"))["miou"]
    assert f"mIoU {miou:.4f}, " in result.stdout
    assert rows_in(out)[0]["miou"] == miou
