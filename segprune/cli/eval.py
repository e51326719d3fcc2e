"""`segprune eval FILE`: the scores of any checkpoint or exported file on a data set, as a table, files and plots."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Argument, Option

from segprune import api, checkpoint
from segprune.cli.console import (
    choose_device,
    console,
    open_data,
    progress_bar,
    show_notes,
    show_score,
    show_settings,
)
from segprune.cli.flags import (
    Compile,
    Cuda,
    Data,
    Dialect,
    InputFlags,
    Layout,
    LoaderProcesses,
    SkipBad,
    Trust,
    Verbose,
    refuse_without_effect,
    switch,
)
from segprune.cli.report import make_page
from segprune.compiler import CompiledParts
from segprune.data import DataChoices
from segprune.export.runtimes import PROGRAMS, is_exported, open_exported
from segprune.files import check_writable, write_json
from segprune.inference.label_maps import EvalMode, Predict
from segprune.machine import fit_to_machine
from segprune.model import check_input
from segprune.runs.records import environment, score_record
from segprune.runs.scores import MATRIX, SCORES, TABLE, save_scores
from segprune.spec import Preprocessing, preprocessing_of


@dataclass(frozen=True)
class EvalFlags:
    model_path: Annotated[
        str,
        Argument(
            metavar="FILE",
            help=".pth, .pt, .safetensors, a Hugging Face folder or hub name, or what segprune export wrote.",
        ),
    ]
    data: Data = "VOCdevkit"
    layout: Layout = None
    split: Annotated[
        str, Option("--split", help="The part to score: val, train or what else the data has.")
    ] = "val"
    skip_bad: SkipBad = False
    mode: Annotated[
        str,
        Option(
            "--mode",
            help="letterbox: each image fitted whole into --input_shape; whole: at its own size; "
            "slide: in windows of --input_shape.",
        ),
    ] = "letterbox"
    input_shape: Annotated[
        tuple[int, int],
        Option("--input_shape", metavar="H W", help="Size of the letterbox or of the window."),
    ] = (512, 512)
    stride: Annotated[
        tuple[int, int] | None,
        Option(
            "--stride",
            metavar="H W",
            help="From window to window; if not given, two thirds of the window.",
        ),
    ] = None
    scales: Annotated[
        str,
        Option("--scales", help="Average over these sizes, as in 0.5,0.75,1 or '0.5 0.75 1'."),
    ] = "1"
    flip: Annotated[bool, switch("--flip", "Average with the mirrored image.")] = False
    no_boundary: Annotated[
        bool, switch("--no_boundary", "Leave out boundary IoU, which takes some time.")
    ] = False
    batch_size: Annotated[
        int, Option("--batch_size", min=1, help="Images, or windows, at a time.")
    ] = 8
    num_workers: LoaderProcesses = None
    cuda: Cuda = False
    compile: Compile = False
    dialect: Dialect = None
    trust: Trust = False
    json_path: Annotated[
        str, Option("--json", metavar="PATH", help="Save the score there as JSON.")
    ] = ""
    save_dir: Annotated[
        str, Option("--save_dir", help="Save scores as JSON and CSV there, and the plots.")
    ] = ""
    verbose: Verbose = False


def run(flags: EvalFlags, inputs: InputFlags, given: frozenset[str]) -> None:
    """Score a checkpoint on a data set: per class IoU, recall, precision and boundary IoU, and their means.

    The score is that of the original pixels: logits are resized to each mask's own size. Every image counts once.
    """
    device = choose_device(flags.cuda)
    flags, chosen = fit_to_machine(flags, device)

    # Open the network, and find out how images go through it.
    opened = _open_network(flags, inputs, given, device)
    # An exported file may take one size alone, which then is the default.
    if opened.shape is not None and "input_shape" not in given:
        flags = replace(flags, input_shape=opened.shape)
    how = _eval_mode(flags, given)
    read = opened.read | {"num_classes": opened.num_classes}
    if flags.mode != "whole":
        read["input_shape"] = flags.input_shape
    settings = asdict(flags) | asdict(inputs)
    show_settings("Evaluation", settings, given, read)
    show_notes((*opened.notes, *chosen))
    # Scoring takes long, so find out now whether its results can be saved.
    if flags.save_dir:
        check_writable(flags.save_dir)

    # Open the data, and check its labels.
    assert flags.num_workers is not None
    source, _ = open_data(
        flags.data,
        flags.layout,
        opened.num_classes,
        (flags.split,),
        choices=DataChoices(inputs.label_offset, expected=opened.preprocessing),
        skip_bad=flags.skip_bad,
        num_workers=flags.num_workers,
    )
    names = source.class_names

    # Score.
    # Built only now, when everything that can be refused has been.
    network = opened.build()
    with progress_bar("scoring") as advance:
        score = api.evaluate(
            network,
            source,
            split=flags.split,
            num_classes=opened.num_classes,
            device=device,
            batch_size=flags.batch_size,
            num_workers=flags.num_workers,
            progress=advance,
            **vars(how),
        )
    if isinstance(network, CompiledParts):
        show_notes(tuple(network.notes))
    show_score(f"{flags.model_path} on {flags.split}", score, names)

    # Save.
    record = score_record(score) | {
        "confusion": [list(row) for row in score.confusion],
        "class_names": list(names),
    }
    record |= {
        "settings": settings,
        "num_classes": opened.num_classes,
        "environment": environment(),
    }
    if flags.json_path:
        write_json(record, flags.json_path)
        console.print(f"Saved: {flags.json_path}", soft_wrap=True)
    if flags.save_dir:
        save_scores(record, score, names, Path(flags.save_dir))
        console.print(
            f"Saved: {SCORES}, {TABLE}, {MATRIX} and plots in {flags.save_dir}", soft_wrap=True
        )
        make_page(Path(flags.save_dir), device)


@dataclass(frozen=True)
class _Opened:
    """What there is to score: `build` makes it ready to run; `shape` is the only H, W that it takes, if it has one."""

    build: Callable[[], Predict]
    num_classes: int
    preprocessing: Preprocessing
    read: dict[str, Any]
    notes: tuple[str, ...] = ()
    shape: tuple[int, int] | None = None


def _open_network(
    flags: EvalFlags, inputs: InputFlags, given: frozenset[str], device: torch.device
) -> _Opened:
    runs_nothing = not flags.model_path.endswith(PROGRAMS)
    refuse_without_effect(
        given, ("trust", runs_nothing, "on a file that runs no code when it is opened")
    )
    # A checkpoint is read now and built later, hence a function.
    if not is_exported(flags.model_path):
        opened = inputs.apply(checkpoint.read(flags.model_path, dialect=flags.dialect))
        read = {"dialect": opened.dialect, "variant": opened.spec.variant}

        def build() -> Predict:
            model = checkpoint.build(opened).to(device)
            return CompiledParts(model) if flags.compile else model

        return _Opened(
            build,
            opened.spec.num_classes,
            preprocessing_of(opened),
            read,
            opened.notes,
        )

    where = "on an exported file, which runs on the CPU"
    refuse_without_effect(
        given, ("dialect", True, where), ("cuda", True, where), ("compile", True, where)
    )
    fixed = "on an exported file, which was written for its own; export the checkpoint again with it"
    refuse_without_effect(given, *((name, True, fixed) for name in ("mean", "std", "channels")))
    # What the file takes stands in its manifest.
    runtime = open_exported(flags.model_path, trust=flags.trust)
    manifest = runtime.manifest
    read = {
        "runtime": runtime.name,
        "variant": manifest.variant,
        "precision": manifest.precision,
    }

    # Most files take images of one size only.
    shape = None if manifest.shape is None else manifest.shape[1:]
    if shape is not None and flags.mode == "whole":
        raise ValueError(
            f"The file takes images of {shape[0]}×{shape[1]} alone, where --mode whole gives every image's own size; "
            "choose another --mode, or export it again with --dynamic."
        )
    # The data is opened with this; the network reads pixels as its manifest says.
    own = inputs.overrule(preprocessing_of(runtime))
    return _Opened(lambda: runtime, manifest.num_classes, own, read, shape=shape)


def _eval_mode(flags: EvalFlags, given: frozenset[str]) -> EvalMode:
    """Returns how images go through the network. ValueError for flags that contradict each other."""
    # Commas and blanks both divide, as in other lists of numbers.
    words = re.split(r"[,\s]+", flags.scales.strip(", "))
    try:
        scales = tuple(map(float, words))
    except ValueError as error:
        raise ValueError(
            f"--scales is {flags.scales!r}; give numbers such as 0.75,1,1.25."
        ) from error

    where = "with --mode whole, which takes every image's own size"
    refuse_without_effect(given, ("input_shape", flags.mode == "whole", where))
    check_input((1, 3, *flags.input_shape))
    return EvalMode(
        mode=flags.mode,  # type: ignore[arg-type]
        input_shape=flags.input_shape,
        stride=flags.stride,
        scales=scales,
        flip=flags.flip,
        boundary=not flags.no_boundary,
    )
