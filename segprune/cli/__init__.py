"""The command line, one file per command: `segprune prune`, `train`, `eval`, `predict`, `export`, `benchmark`, …

A command's flags are the fields of its frozen config. Only here is anything printed, and only here are devices and
paths chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import typer

from segprune.cli import (
    benchmark,
    convert,
    evaluate,
    export,
    info,
    predict,
    prune,
    pruning,
    scan,
    settings,
    shapes,
    train,
)
from segprune.cli.common import CONTEXT, command, keep_freed_memory

app = typer.Typer(
    name="segprune",
    help="Prune a trained SegFormer: fewer channels, the same files, honest numbers.",
    epilog="Start with `segprune info FILE`, then `segprune prune --model_path FILE --pruning_rate 0.5`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=CONTEXT,
)
_COMMANDS: tuple[tuple[str, type[Any], Callable[[Any, frozenset[str]], None]], ...] = (
    ("prune", pruning.PruneConfig, prune.run),
    ("train", settings.TrainSettings, train.run),
    ("eval", evaluate.EvalConfig, evaluate.run),
    ("predict", predict.PredictConfig, predict.run),
    ("export", export.ExportConfig, export.run),
    ("benchmark", benchmark.BenchmarkConfig, benchmark.run),
    ("convert", convert.ConvertConfig, convert.run),
    ("scan", scan.ScanConfig, scan.run),
    ("info", info.InfoConfig, info.run),
    ("shapes", shapes.ShapesConfig, shapes.run),
)
for _name, _config, _run in _COMMANDS:
    app.command(_name, context_settings=CONTEXT)(command(_config, _run))


def main() -> None:
    keep_freed_memory()
    app()


def door(name: str, script: str, settings: Mapping[str, Any]) -> None:
    """Run one command as a script of its own; `settings` replace the flags' defaults."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {parameter.name for parameter in commands[name].params}
    unknown = sorted(set(settings) - known)
    if unknown:
        sys.exit(f"Error: {script} has a setting {unknown[0]!r}, which is no flag of it; see {script} --help.")
    keep_freed_memory()
    commands[name].main(prog_name=script, default_map=dict(settings))
