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
    eval,
    export,
    info,
    predict,
    report,
    shapes,
    sweep,
)
from segprune.cli.console import accept_any_text, keep_freed_memory
from segprune.cli.flags import CONTEXT, Command, command
from segprune.cli.prune import command as prune
from segprune.cli.train import command as train

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
_COMMANDS: tuple[tuple[str, Callable[..., None], str], ...] = (  # with an example
    (
        "prune",
        prune.run,
        "--model_path logs/your_model.pth --pruning_rate 0.5 --data VOCdevkit --epochs 50",
    ),
    (
        "train",
        train.run,
        "--model_path b2_pruned_0.5.pth --teacher logs/your_model.pth --data VOCdevkit --save_dir logs_finetuned",
    ),
    ("eval", eval.run, "logs/your_model.pth --data VOCdevkit --mode slide --flip"),
    ("predict", predict.run, "logs/your_model.pth --input photos --kind all"),
    ("export", export.run, "b2_pruned_0.5.pth --format onnx --bake preprocess,argmax"),
    (
        "benchmark",
        benchmark.run,
        "logs/your_model.pth b2_pruned_0.5.pth --runtimes torch,onnxruntime",
    ),
    ("convert", convert.run, "b2_pruned_0.5.pth my_folder --to hf"),
    ("sweep", sweep.run, "logs/your_model.pth --data VOCdevkit --rates 0,0.3,0.5,0.7,0.9"),
    ("report", report.run, "logs_pruning/l1/b2"),
    ("info", info.run, "logs/your_model.pth"),
    ("shapes", shapes.run, "data/shapes --num_train 2000"),
)
for _name, _run, _example in _COMMANDS:
    _epilog = f"Example: segprune {_name} {_example}"
    app.command(_name, cls=Command, context_settings=CONTEXT, epilog=_epilog)(command(_run))


def main() -> None:
    accept_any_text()
    keep_freed_memory()
    app()


def door(name: str, script: str, settings: Mapping[str, Any]) -> None:
    """Run one command as a script of its own; `settings` replace the flags' defaults."""
    accept_any_text()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    # Typer would ignore a misspelt setting in silence.
    known = {parameter.name for parameter in commands[name].params}
    unknown = sorted(set(settings) - known)
    if unknown:
        sys.exit(
            f"Error: {script} has a setting {unknown[0]!r}, which is no flag of it; see {script} --help."
        )
    keep_freed_memory()
    # Settings are defaults here, so flags on the script's command line still win.
    commands[name].main(prog_name=script, default_map=dict(settings))
