"""The doors as users run them: processes of their own in a copy of the clone, on generated data."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import segprune
from segprune.data import write_shapes
from tests.commands import BEST, HERE, SIZE

ROOT = Path(__file__).parents[1]


def run(clone: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """`python …` in the copy, where a warning is a failure."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, command)],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
    )


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def with_settings(clone: Path, door: str, settings: str) -> Path:
    """The door with its SETTINGS edited, under another name."""
    source = (ROOT / door).read_text(encoding="utf-8")
    empty = "SETTINGS: dict[str, object] = {}\n"
    assert source.count(empty) == 1
    path = clone / f"my_{door}"
    path.write_text(
        source.replace(empty, f"SETTINGS: dict[str, object] = {settings}\n"), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, the doors and a small data set; nothing else of the repository."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(
        ROOT / "segprune", folder / "segprune", ignore=shutil.ignore_patterns("__pycache__")
    )
    for door in ("prune_train.py", "train.py", "pruning.py"):
        shutil.copy(ROOT / door, folder)
    write_shapes(folder / "shapes", num_train=4, num_val=2, size=(32, 32), seed=5)
    return folder


@pytest.fixture(scope="module")
def pruned(clone: Path) -> Path:
    """What prune_train.py writes: settings in the script for rate, variant and place, a flag for the rate."""
    script = with_settings(
        clone,
        "prune_train.py",
        '{"phi": "b0", "pruning_rate": 0.3, "save_dir": "mine", "input_shape": (32, 32)}',
    )
    out = succeeded(run(clone, script.name, "--pruning_rate", 0.5))
    assert "THE WEIGHTS ARE RANDOM" in out
    return clone / "mine/l1/b0/b0_pruned_0.5.pth"


def test_prune_train_takes_settings_over_defaults_and_flags_over_settings(
    clone: Path, pruned: Path
) -> None:
    assert not (clone / "logs_pruning").exists()
    record = json.loads((pruned.parent / "pruning_results.json").read_text(encoding="utf-8"))
    assert record["pruning_config"]["pruning_rate"] == 0.5
    assert record["model_config"]["input_shape"] == [32, 32]
    assert record["model_save_path"] == "mine/l1/b0/b0_pruned_0.5.pth"
    assert record["reduction"]["parameters_reduction_percent"] == pytest.approx(50, abs=1)


def test_train_fine_tunes_the_pruned_file(clone: Path, pruned: Path) -> None:
    flags = (
        "--model_path",
        pruned,
        "--phi",
        "b0",
        "--num_classes",
        8,
        *SIZE,
        *HERE,
        "--data",
        "shapes",
        "--epochs",
        1,
    )
    assert "Best epoch 1 on val" in succeeded(run(clone, "train.py", *flags))
    assert segprune.load(clone / "logs" / BEST).spec == segprune.load(pruned).spec


def test_a_misspelt_setting_is_refused_by_name(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = with_settings(clone, "train.py", '{"epochs": 1, "learning_rate": 1e-4}')
    monkeypatch.setattr(sys, "argv", [script.name])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")

    # Python prints a text to exit with on stderr, and exits with status 1.
    message = "Error: train.py has a setting 'learning_rate', which is no flag of it; see train.py --help."
    assert (end.value.code, *capsys.readouterr()) == (message, "", "")


def test_the_package_is_a_command(clone: Path, pruned: Path) -> None:
    record = json.loads(succeeded(run(clone, "-m", "segprune", "info", pruned, "--json")))
    assert record["parameters"] == sum(p.numel() for p in segprune.load(pruned).parameters())


USE_PRUNER = """
import torch
from pruning import L1Pruner
import segprune
from segprune.spec import standard_spec

assert L1Pruner is segprune.L1Pruner
model = segprune.SegFormer(standard_spec("b0", 8))
sizes = [sum(p.numel() for p in model.parameters())]
for _ in range(2):  # iterative pruning is this in a loop
    pruner = L1Pruner(model, pruning_rate=0.2, ignored_layers=[model.encoder.stages[0]], repair=False)
    model = pruner.prune(torch.zeros(1, 3, 64, 64))
    sizes.append(sum(p.numel() for p in model.parameters()))
print(segprune.__file__, *sizes)
"""


def test_the_pruner_is_imported_from_the_clone_and_used_in_a_loop(clone: Path) -> None:
    place, *sizes = succeeded(run(clone, "-c", USE_PRUNER)).split()
    assert Path(place) == clone / "segprune/__init__.py"
    dense, once, twice = map(int, sizes)
    assert 1 - once / dense == pytest.approx(0.2, abs=0.01)
    assert 1 - twice / once == pytest.approx(0.2, abs=0.01)


WITHOUT_TORCH_PRUNING = """
import contextlib, io, json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch_pruning":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch
import segprune
from segprune.cli import app

path, logits = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(1)
with torch.inference_mode():
    torch.save(segprune.load(path)(torch.randn(2, 3, 64, 96)), logits)

def call(*flags):
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            app([*flags])
        except SystemExit as left:
            status = left.code or 0
    return [status, out.getvalue(), errors.getvalue()]

size = ["--input_shape", "32", "32"]
data = [*size, "--data", "shapes", "--num_workers", "0"]
print(json.dumps({
    "info": call("info", path, "--json"),
    "eval": call("eval", path, *data),
    "train": call("train", "--model_path", path, *data, "--epochs", "1", "--save_dir", "without"),
    "prune": call("prune", "--model_path", path, *size, "--save_dir", "without"),
    "rate 0": call("prune", "--pruning_rate", "0", "--model_path", path, *size, "--save_dir", "without"),
}))
"""


@pytest.fixture(scope="module")
def without_torch_pruning(clone: Path, pruned: Path) -> dict[str, Any]:
    """A process in which torch_pruning cannot be imported: each command's status and output."""
    return json.loads(
        succeeded(run(clone, "-c", WITHOUT_TORCH_PRUNING, pruned, clone / "logits.pt"))
    )


def test_a_pruned_file_gives_the_same_logits_without_torch_pruning(
    clone: Path, pruned: Path, without_torch_pruning: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    with torch.inference_mode():
        here = segprune.load(pruned)(torch.randn(2, 3, 64, 96))
    assert torch.equal(torch.load(clone / "logits.pt", weights_only=True), here)


@pytest.mark.parametrize("name", ["info", "eval", "train", "rate 0"])
def test_the_other_commands_work_without_torch_pruning(
    name: str, without_torch_pruning: dict[str, Any]
) -> None:
    status, out, errors = without_torch_pruning[name]
    assert (status, errors) == (0, "")
    assert {"info": '"parameters"', "eval": "mIoU", "train": BEST, "rate 0": "b0_pruned_0.pth"}[
        name
    ] in out


def test_pruning_without_torch_pruning_is_refused_with_the_pip_command(
    without_torch_pruning: dict[str, Any],
) -> None:
    status, _, errors = without_torch_pruning["prune"]
    assert status == 1
    assert errors == (
        "Error: Pruning needs torch-pruning, which is not installed; run: pip install torch-pruning==1.6.1\n"
    )
