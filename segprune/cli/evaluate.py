"""`segprune eval FILE`: the scores of any checkpoint on a data set, as a table, files and plots.

scores.json           all numbers and the settings, the confusion matrix too
scores.csv            a row per class: IoU, recall, precision, boundary IoU, labelled pixels
confusion_matrix.csv  pixel counts, rows are labels; confusion_matrix.png has them as shares of each row
mIoU.png, mPA.png, mRecall.png, mPrecision.png   bars per class, the mean in the title
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Argument, Option

from segprune import checkpoint
from segprune.cli.console import choose_device, console, open_data, progress_bar, show_notes, show_score, show_settings
from segprune.cli.flags import Layout, LoaderProcesses, SkipBad, switch
from segprune.export.runtimes import is_exported, open_exported
from segprune.files import check_writable, write_csv, write_json
from segprune.inference.evaluate import EvalMode, Predict, Score, evaluate
from segprune.machine import fit_to_machine
from segprune.model import check_input
from segprune.runs.records import environment, score_record

SCORES, TABLE, MATRIX = "scores.json", "scores.csv", "confusion_matrix.csv"


@dataclass(frozen=True)
class EvalConfig:
    model_path: Annotated[
        str,
        Argument(
            metavar="FILE",
            help=".pth, .pt, .safetensors, a Hugging Face folder or hub name, or what segprune export wrote.",
        ),
    ]
    data: Annotated[str, Option("--data", help="Data set: a folder, a list file or a Hugging Face name.")] = "VOCdevkit"
    layout: Layout = None
    split: Annotated[str, Option("--split", help="The part to score: val, train or what else the data has.")] = "val"
    skip_bad: SkipBad = False
    mode: Annotated[
        str,
        Option(
            "--mode",
            help="letterbox: each picture fitted whole into --input_shape; whole: at its own size; "
            "slide: in windows of --input_shape.",
        ),
    ] = "letterbox"
    input_shape: Annotated[
        tuple[int, int], Option("--input_shape", metavar="H W", help="Size of the letterbox or of the window.")
    ] = (512, 512)
    stride: Annotated[
        tuple[int, int] | None,
        Option("--stride", metavar="H W", help="From window to window; if not given, two thirds of the window."),
    ] = None
    scales: Annotated[str, Option("--scales", help="Average over these sizes, as in 0.5,0.75,1 or '0.5 0.75 1'.")] = "1"
    flip: Annotated[bool, switch("--flip", "Average with the mirrored picture.")] = False
    no_boundary: Annotated[bool, switch("--no_boundary", "Leave out boundary IoU, which takes some time.")] = False
    batch_size: Annotated[int, Option("--batch_size", min=1, help="Pictures, or windows, at a time.")] = 8
    num_workers: LoaderProcesses = None
    cuda: Annotated[bool, switch("--cuda", "Use the GPU.")] = False
    dialect: Annotated[str | None, Option("--dialect", help="Overrules the dialect that is recognised.")] = None
    json_path: Annotated[str, Option("--json", metavar="PATH", help="Save the score there as JSON.")] = ""
    save_dir: Annotated[str, Option("--save_dir", help="Save scores as JSON and CSV there, and the plots.")] = ""


def run(config: EvalConfig, given: frozenset[str]) -> None:
    """Score a checkpoint on a data set: per class IoU, recall, precision and boundary IoU, and their means.

    The score is that of the original pixels: logits are resized to each mask's own size. Every picture counts once.
    """
    device = choose_device(config.cuda)
    config, chosen = fit_to_machine(config, device)
    found = _find(config, given, device)
    if found.shape is not None and "input_shape" not in given:
        config = replace(config, input_shape=found.shape)
    how = _eval_mode(config, given)
    num_classes = found.num_classes
    show_settings("Evaluation", asdict(config) | found.read | {"num_classes": num_classes})
    show_notes((*found.notes, *chosen))
    if config.save_dir:
        check_writable(config.save_dir)
    assert config.num_workers is not None
    source, _ = open_data(
        config.data,
        config.layout,
        num_classes,
        (config.split,),
        skip_bad=config.skip_bad,
        num_workers=config.num_workers,
    )
    samples, names = source.split(config.split), source.class_names
    model = found.network()
    with progress_bar("scoring") as advance:
        score = evaluate(
            model,
            samples,
            num_classes,
            how,
            device=device,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            progress=advance,
        )
    show_score(f"{config.model_path} on {config.split}", score, names)
    record = score_record(score) | {"confusion": [list(row) for row in score.confusion], "class_names": list(names)}
    record |= {"settings": asdict(config), "num_classes": num_classes, "environment": environment()}
    if config.json_path:
        write_json(record, config.json_path)
        console.print(f"Saved: {config.json_path}", soft_wrap=True)
    if config.save_dir:
        _save(record, score, names, Path(config.save_dir))
        console.print(f"Saved: {SCORES}, {TABLE}, {MATRIX} and plots in {config.save_dir}", soft_wrap=True)


@dataclass(frozen=True)
class _Found:
    """What there is to score; `shape` is the only H, W that it takes, if there is one."""

    network: Callable[[], Predict]
    num_classes: int
    read: dict[str, Any]
    notes: tuple[str, ...] = ()
    shape: tuple[int, int] | None = None


def _find(config: EvalConfig, given: frozenset[str], device: torch.device) -> _Found:
    if not is_exported(config.model_path):
        found = checkpoint.read(config.model_path, dialect=config.dialect)
        read = {"dialect": found.dialect, "variant": found.spec.variant}
        return _Found(lambda: checkpoint.build(found).to(device), found.spec.num_classes, read, found.notes)
    for flag in ("dialect", "cuda"):
        if flag in given:
            raise ValueError(f"--{flag} has no effect on an exported file, which runs on the CPU; leave it out.")
    runtime = open_exported(config.model_path)
    manifest = runtime.manifest
    read = {"runtime": runtime.name, "variant": manifest.variant, "precision": manifest.precision}
    shape = None if manifest.shape is None else manifest.shape[1:]
    if shape is not None and config.mode == "whole":
        raise ValueError(
            f"The file takes pictures of {shape[0]}×{shape[1]} alone, where --mode whole gives every picture's own "
            "size; choose another --mode, or export it again with --dynamic."
        )
    return _Found(lambda: runtime, manifest.num_classes, read, shape=shape)


def _eval_mode(config: EvalConfig, given: frozenset[str]) -> EvalMode:
    """What the flags say; ValueError where they contradict each other."""
    words = re.split(r"[,\s]+", config.scales.strip(", "))
    try:
        scales = tuple(map(float, words))
    except ValueError as error:
        raise ValueError(f"--scales is {config.scales!r}; give numbers such as 0.75,1,1.25.") from error
    if config.mode == "whole" and "input_shape" in given:
        raise ValueError(
            "--input_shape has no effect with --mode whole, which takes every picture's own size; leave it out."
        )
    check_input((1, 3, *config.input_shape))
    return EvalMode(
        mode=config.mode,  # type: ignore[arg-type]
        input_shape=config.input_shape,
        stride=config.stride,
        scales=scales,
        flip=config.flip,
        boundary=not config.no_boundary,
    )


def _save(record: dict[str, Any], score: Score, names: tuple[str, ...], folder: Path) -> None:
    from segprune import plots  # here, since drawing takes a second to import and most commands draw nothing

    write_json(record, folder / SCORES)
    numbers = range(len(score.iou))
    named = [names[k] if k < len(names) else "" for k in numbers]
    columns: dict[str, Iterable[Any]] = {"class": numbers, "name": named, "iou": score.iou, "recall": score.recall}
    columns["precision"] = score.precision
    if score.boundary_iou is not None:
        columns["boundary_iou"] = score.boundary_iou
    columns["pixels"] = [sum(row) for row in score.confusion]
    write_csv([list(columns), *zip(*columns.values(), strict=True)], folder / TABLE)
    titles = [name or str(k) for k, name in zip(numbers, named, strict=True)]
    matrix = [[title, *row] for title, row in zip(titles, score.confusion, strict=True)]
    write_csv([["label \\ predicted", *titles], *matrix], folder / MATRIX)
    for name, values in (
        ("mIoU", score.iou),
        ("mPA", score.recall),
        ("mRecall", score.recall),
        ("mPrecision", score.precision),
    ):
        known = [value for value in values if value is not None]
        plots.bars(values, names, f"{name} {sum(known) / len(known):.4f}", folder / f"{name}.png")
    plots.confusion(score.confusion, names, folder / "confusion_matrix.png")
