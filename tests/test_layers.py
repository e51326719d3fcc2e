"""Imports point down the rows only, only the command line prints, and importing does nothing."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOORS = ("prune_train", "train", "pruning")
ROWS = (
    ("spec", "files", "timing", "options", "stand_ins", "shapes_only"),
    ("model", "data", "plots", "machine", "tensor_files"),
    ("stats", "fold", "compare", "inference"),
    ("compiler",),
    ("checkpoint", "training"),
    ("pruning", "export"),
    ("benchmark", "formats"),
    ("runs",),
    ("report",),
    ("api",),
    ("cli",),
    ("doors",),
)
ROW = {room: number for number, rooms in enumerate(ROWS) for room in rooms}
NEVER = {  # though they point down: what a room must work without
    ("data", "model"): "pictures are read for any network",
    ("inference", "model"): "any function from pixels to logits can be scored",
    ("training", "model"): "any module can be trained",
    ("pruning", "data"): "pruning takes batches",
    ("pruning", "training"): "pruning takes batches",
    ("pruning", "checkpoint"): "pruning takes a network, and gives one",
    ("export", "checkpoint"): "exporting takes a network",
    ("pruning", "tensor_files"): "only checkpoint reads and writes networks",
    ("export", "training"): "an exported file runs without the training code",
    ("benchmark", "training"): "times need no pictures",
    ("benchmark", "data"): "times need no pictures",
    ("checkpoint", "data"): "a network loads without pictures",
    ("checkpoint", "training"): "a network loads without its training",
}
SPARED = {
    (
        "segprune.pruning.pruner",
        "segprune.checkpoint.hf_memory",
    ),  # networks of transformers in memory
    ("segprune.pruning.prune", "segprune.checkpoint.hf_memory"),
    (
        "segprune.pruning.budget.uniform",
        "segprune.checkpoint.published",
    ),  # widths that others can hold
    ("segprune.pruning.synthetic", "segprune.data"),  # what draws images reads no data set
    ("segprune.pruning.images", "segprune.data"),  # nor does what normalises them
    (
        "segprune.checkpoint.hf_out",
        "segprune.data",
    ),  # mean and deviation stand in a Hugging Face folder
    ("segprune.checkpoint.write", "segprune.data"),  # an image to compare with
}
MODULES = {
    path.relative_to(ROOT)
    .with_suffix("")
    .as_posix()
    .removesuffix("/__init__")
    .replace("/", "."): path
    for path in [*ROOT.glob("segprune/**/*.py"), *(ROOT / f"{door}.py" for door in DOORS)]
}


def room_of(module: str) -> str | None:
    """The room a module belongs to; None for the package's front and for what is not ours."""
    parts = module.split(".")
    if parts[0] in DOORS:
        return "doors"
    if parts[0] != "segprune" or len(parts) == 1:
        return None
    return "cli" if parts[1] == "__main__" else parts[1]


def imports_of(source: str) -> Iterator[str]:
    """Every module that the source imports anywhere, in functions too; of `from a import b` also a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_imports(module: str, source: str) -> list[str]:
    """What the module imports from its own row, from above or against NEVER."""
    mine = room_of(module)
    assert mine in ROW, f"{module} is in no row; give it one in tests/test_layers.py"
    wrong = []
    for target in imports_of(source):
        room = room_of(target)
        if room in (None, mine) or (
            target not in MODULES and target.rpartition(".")[0] in MODULES
        ):
            continue  # not ours, inside the room, or a name in a module that is yielded itself
        spared = any(
            module == here and f"{target}.".startswith(f"{there}.") for here, there in SPARED
        )
        if ROW[str(room)] >= ROW[mine] or ((mine, room) in NEVER and not spared):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"segprune"}))
def test_a_module_imports_only_from_rows_below(module: str) -> None:
    assert wrong_imports(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("segprune.spec", "from segprune.model import SegFormer", ["segprune.model"]),
        ("segprune.stats", "def f():\n    import segprune.fold", ["segprune.fold"]),
        ("segprune.checkpoint", "from segprune import benchmark", ["segprune.benchmark"]),
        (
            "segprune.pruning.plan",
            "from segprune.data.samples import Sample",
            ["segprune.data.samples"],
        ),
        ("segprune.checkpoint", "from segprune.data import MEAN", ["segprune.data"]),
        ("segprune.checkpoint.write", "from segprune.data import MEAN", []),
        (
            "segprune.pruning.plan",
            "from segprune.checkpoint import load",
            ["segprune.checkpoint"],
        ),
        (
            "segprune.pruning.pruner",
            "from segprune.checkpoint import load",
            ["segprune.checkpoint"],
        ),
        (
            "segprune.pruning.groups",
            "from segprune.tensor_files import save_record",
            ["segprune.tensor_files"],
        ),
        ("segprune.pruning.budget.latency.table", "from segprune.files import write_json", []),
        (
            "segprune.data.voc",
            "from segprune.training import loop",
            ["segprune.training", "segprune.training.loop"],
        ),
        ("segprune.training.loop", "from segprune.data.samples import Sample", []),
        (
            "segprune.pruning.plan",
            "from segprune.pruning.groups import Group\nimport torch",
            [],
        ),
        ("pruning", "from segprune import L1Pruner", []),
    ],
)
def test_the_check_finds_what_points_up_or_sideways(
    module: str, source: str, wrong: list[str]
) -> None:
    assert wrong_imports(module, source) == wrong


def test_every_room_in_the_rows_is_there_and_files_and_spec_stand_alone() -> None:
    assert {room_of(module) for module in MODULES} - {None} == set(ROW)
    for name in ("spec", "files"):
        imported = imports_of(MODULES[f"segprune.{name}"].read_text(encoding="utf-8"))
        assert not [target for target in imported if target.startswith("segprune")]


@pytest.mark.parametrize(
    "module", sorted(name for name in MODULES if room_of(name) not in ("cli", "doors"))
)
def test_the_library_neither_prints_nor_parses_nor_chooses_a_device(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    tools = {"rich", "typer", "click", "argparse", "logging", "tqdm"}
    assert not {target.split(".")[0] for target in imports_of(source)} & tools
    forbidden = {
        "print",
        "sys.stdout",
        "sys.stderr",
        "sys.argv",
        "sys.exit",
        "torch.cuda.is_available",
    }
    used = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name | ast.Attribute)
    }
    assert not used & forbidden


IMPORT_ALL = """
import json, logging, random, signal, sys, warnings
import segprune
alone = sorted(name for name in sys.modules if name.startswith(("segprune.", "torch")))

import accelerate, numpy, rich.progress, torch, torch_pruning, typer  # what these do to the process is theirs
import transformers.modeling_utils
def state():
    return {
        "random": repr(random.getstate()),
        "numpy": repr(numpy.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "torch flags": [
            str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
        ],
        "logging": [repr(logging.root.handlers), logging.root.level],
        "warnings": repr(warnings.filters),
        "signals": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
    }

before = state()
for name in json.loads(sys.argv[1]):
    __import__(name)
after = state()
changed = [key for key in before if before[key] != after[key]]
sys.stdout.write(json.dumps({"alone": alone, "changed": changed, "loaded": sorted(sys.modules)}))
"""


IMPORT_EACH = """
import importlib, json, sys

for package in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.split(".")[0] == "segprune"]:
        del sys.modules[name]
    importlib.import_module(package)
"""


def test_every_package_can_be_imported_first() -> None:
    """Two that need each other fail only where the wrong one comes first."""
    packages = sorted(name for name in MODULES if MODULES[name].name == "__init__.py")
    assert "segprune.pruning.curves" in packages
    subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, json.dumps(packages)], cwd=ROOT, check=True
    )


def test_importing_does_nothing() -> None:
    """One fresh process imports all: nothing printed, seeded, set up; and the front alone imports not even torch."""
    modules = sorted(MODULES.keys() - {"segprune.__main__"})
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_ALL, json.dumps(modules)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)  # nothing else was printed
    assert report["alone"] == []
    assert report["changed"] == []
    assert set(modules) <= set(report["loaded"])
