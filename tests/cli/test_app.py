"""`segprune` itself: its commands' help, and the doors' settings between defaults and flags."""

import dataclasses
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

from segprune.cli import _COMMANDS, app, door
from segprune.cli.prune.flags import merge_settings
from tests.commands import invoke

MANUAL = {
    "model_path": "",
    "num_classes": None,  # 8, where no checkpoint says otherwise
    "phi": None,  # b2, likewise
    "input_shape": (512, 512),
    "pruning_method": "l1",
    "pruning_rate": None,  # 0.5, where nothing else says what to remove
    "cuda": False,
    "seed": 11,
    "save_dir": "logs_pruning",
}


FLAG_TYPES = (
    "Annotated",
    "Layout",
    "Trust",
    "Heads",
    "Weights",
    "LabelOffset",
    "ValSplit",
    "ValShare",
    "SkipBad",
    "Dialect",
    "Cuda",
    "Compile",
    "LoaderProcesses",
    "Amp",
    "Verbose",
    "Data",
    "ModelFile",
)


def records_of(name: str) -> list[type]:
    """The records that a command's `run` takes."""
    run = next(run for known, run, _ in _COMMANDS if known == name)
    signature = inspect.signature(run, eval_str=True).parameters
    return [
        parameter.annotation
        for parameter in signature.values()
        if dataclasses.is_dataclass(parameter.annotation)
    ]


@pytest.mark.parametrize("name", [name for name, *_ in _COMMANDS])
def test_the_help_of_a_command_lists_every_flag(name: str) -> None:
    status, out, errors = invoke(name, "--help")
    assert (status, errors) == (0, "")
    shown = set(re.findall(r"^│ +(?:\* +)?--(\w+)", out, re.MULTILINE))
    names = {"json_path": "json", "as_json": "json"}
    takes_file = ("info", "eval", "predict", "export")
    arguments = {
        "shapes": {"folder"},
        "benchmark": {"model_paths"},
        "sweep": {"model_paths"},
        "convert": {"model_path", "target"},
        "report": {"folder"},
    }.get(name, {"model_path"} if name in takes_file else set())
    fields = set()
    for record in records_of(name):
        for field in dataclasses.fields(record):
            if field.metadata or str(field.type).startswith(
                FLAG_TYPES
            ):  # others are for Python alone
                fields.add(field.name)
    assert shown == {names.get(field, field) for field in fields} - arguments | {"help"}
    assert ("─ Arguments ─" in out) == bool(arguments)


@pytest.mark.parametrize(
    ("name", "example"), [(name, example) for name, *_, example in _COMMANDS]
)
def test_the_example_in_a_command_s_help_can_be_typed_as_it_stands(
    name: str, example: str
) -> None:
    _, out, _ = invoke(name, "--help")
    assert " ".join(out.split()).endswith(f"Example: segprune {name} {example}")
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, shlex.split(example))


@pytest.mark.parametrize("name", ["prune", "train"])
def test_many_flags_come_under_titles(name: str) -> None:
    _, out, _ = invoke(name, "--help")
    expected = ["Options"]
    for record in records_of(name):
        panels = getattr(record, "PANELS", {})
        assert panels.keys() <= {field.name for field in dataclasses.fields(record)}
        expected += panels.values()
        expected += [
            field.metadata["panel"]
            for field in dataclasses.fields(record)
            if field.metadata.get("panel")
        ]
    titles = re.findall(r"^╭─ (.+?) ─+╮$", out, re.MULTILINE)
    assert len(titles) > 5
    assert sorted(titles) == sorted(set(expected))


def test_prune_has_few_enough_flags_to_read() -> None:
    assert len(typer.main.get_command(app).commands["prune"].params) <= 44  # type: ignore[attr-defined]


def test_the_help_lists_every_command_and_comes_without_one_too() -> None:
    _, out, _ = invoke("--help")
    assert all(re.search(rf"│ {name} +\w", out) for name, *_ in _COMMANDS)
    _, bare, errors = invoke()
    assert out.split() in (bare.split(), errors.split())


def test_the_manuals_flags_have_the_manuals_defaults() -> None:
    defaults = merge_settings(*(record() for record in records_of("prune")))
    assert {name: defaults[name] for name in MANUAL} == MANUAL


def through_the_door(settings: dict[str, object], *flags: object) -> int:
    """Exit status of prune_train.py with those settings, called with those flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prune_train.py", *map(str, flags)])
        with pytest.raises(SystemExit) as left:
            door("prune", "prune_train.py", settings)
    assert left.value.code is None or isinstance(left.value.code, int), left.value.code
    return left.value.code or 0


def test_settings_replace_defaults_and_flags_replace_settings(
    dense: Path, tmp_path: Path
) -> None:
    settings = {
        "model_path": str(dense),
        "pruning_rate": 0.0,
        "input_shape": [32, 64],
        "save_dir": str(tmp_path),
    }
    assert through_the_door(settings, "--input_shape", 64, 32) == 0
    record = json.loads((tmp_path / "l1/b0/pruning_results.json").read_text(encoding="utf-8"))
    assert (record["settings"]["pruning_rate"], record["settings"]["input_shape"]) == (
        0.0,
        [64, 32],
    )
    assert record["settings"]["seed"] == 11


def test_a_setting_of_the_wrong_kind_is_a_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert through_the_door({"round_to": "half"}) == 2
    assert "Invalid value for '--round_to'" in capsys.readouterr().err
    assert through_the_door({"pruning_rate": "half"}) == 1
    assert "--pruning_rate is 'half'; write it as 0.5" in capsys.readouterr().err


def test_a_setting_without_effect_is_refused_like_the_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert through_the_door({"lr": 1e-4}) == 1
    assert (
        capsys.readouterr().err == "Error: --lr has no effect without --epochs; leave it out.\n"
    )


def test_a_misspelt_setting_is_refused_by_name() -> None:
    with pytest.raises(SystemExit) as left:
        door("prune", "prune_train.py", {"pruning_rat": 0.5})
    message = "Error: prune_train.py has a setting 'pruning_rat', which is no flag of it; see prune_train.py --help."
    assert left.value.code == message
