"""The flags of `segprune prune` that are not options of pruning itself, and what cannot be combined across records."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from typer import Option

from segprune.cli.flags import (
    Amp,
    Dialect,
    Layout,
    LoaderProcesses,
    SkipBad,
    ValShare,
    ValSplit,
    Verbose,
    refuse_without_effect,
    switch,
)
from segprune.machine import AUTO
from segprune.pruning.importance import NEED_IMAGES
from segprune.pruning.options import PLANNING, PruneOptions
from segprune.pruning.plan import read_settings


@dataclass(frozen=True)
class NetworkFlags:
    PANELS: ClassVar[Mapping[str, str]] = {"model_path": "The network"}

    model_path: Annotated[
        str,
        Option(
            "--model_path",
            help="Trained checkpoint: .pth, .pt, .safetensors, a Hugging Face folder or hub name. "
            "Empty: random weights, which is only a dry run.",
        ),
    ] = ""
    num_classes: Annotated[
        int | None,
        Option(
            "--num_classes",
            help="Channels of the logits, background included; read off the checkpoint, else 8.",
        ),
    ] = None
    phi: Annotated[
        str | None,
        Option("--phi", help="MiT variant b0 … b5; read off the checkpoint, else b2."),
    ] = None
    dialect: Dialect = None


@dataclass(frozen=True)
class ImageFlags:
    PANELS: ClassVar[Mapping[str, str]] = {"images": "Images, without labels"}

    images: Annotated[
        str,
        Option(
            "--images",
            help="Folder of images for the plan, the repair and methods that need some. If not given: the train part "
            "of --data; without either, synthetic images.",
        ),
    ] = ""
    num_images: Annotated[
        int, Option("--num_images", min=1, help="How many of them are used.")
    ] = 64


@dataclass(frozen=True)
class TuneFlags:
    PANELS: ClassVar[Mapping[str, str]] = {"data": "Scoring and fine-tuning"}

    data: Annotated[
        str,
        Option(
            "--data",
            help="Data set, in any layout of docs/data.md: score on its val part before and after.",
        ),
    ] = ""
    layout: Layout = None
    val_split: ValSplit = ""
    val_share: ValShare = None
    skip_bad: SkipBad = False
    epochs: Annotated[
        int, Option("--epochs", min=0, help="Fine-tune this many epochs on --data; 0: do not.")
    ] = 0
    batch_size: Annotated[
        int, Option("--batch_size", min=1, help="Images per step, of fine-tuning and scoring.")
    ] = 8
    lr: Annotated[
        float | None,
        Option(
            "--lr",
            help="Of fine-tuning. If not given: a tenth of what a file of ours was trained with from scratch, else "
            "what it was fine-tuned with, else 6e-5.",
        ),
    ] = None
    no_distill: Annotated[
        bool,
        switch(
            "--no_distill",
            "Fine-tune on the labels alone; else the dense network is the teacher.",
        ),
    ] = False
    num_workers: LoaderProcesses = None
    amp: Amp = AUTO


@dataclass(frozen=True)
class RunFlags:
    PANELS: ClassVar[Mapping[str, str]] = {"plan_only": "The run"}

    plan_only: Annotated[
        bool, switch("--plan_only", "Only decide: show the widths and save them as plan.json.")
    ] = False
    cuda: Annotated[bool, switch("--cuda", "Use the GPU; without it the CPU.")] = False
    save_dir: Annotated[
        str, Option("--save_dir", help="Files are written to SAVE_DIR/METHOD/PHI.")
    ] = "logs_pruning"
    verbose: Verbose = False

    @staticmethod
    def list_repeated(flags: Mapping[str, Any], given: Collection[str]) -> list[str]:
        """Returns the flags that a plan was made with, so that its command can be run again with --plan."""
        if "plan" not in given:
            return []
        made_with = read_settings(flags["plan"])

        # Read as the record reads them, and written as JSON writes them.
        names = [name for name in PLANNING if name in given]
        read = asdict(PruneOptions(**{name: flags[name] for name in names}))
        now = json.loads(json.dumps({name: read[name] for name in names}))
        if "plan_only" in given:
            now["plan_only"] = flags["plan_only"]
        return [name for name in now if name in made_with and made_with[name] == now[name]]


def merge_settings(*records: Any) -> dict[str, Any]:
    """Returns the fields of all records, by the names of their flags."""
    settings: dict[str, Any] = {}
    for record in records:
        settings |= asdict(record)
    return settings


def needs_images(options: PruneOptions, run: RunFlags) -> bool:
    """Returns whether images, if there are some, are of use: to plan, repair or method."""
    will_repair = options.repair is not False and not run.plan_only
    return will_repair or options.may_use_curves or options.pruning_method in NEED_IMAGES


def may_draw_images(options: PruneOptions, images: ImageFlags, tune: TuneFlags) -> bool:
    """Returns whether synthetic images stand in: where none were given, and something is done with images."""
    used = options.repair is not False or options.pruning_method in NEED_IMAGES
    return used and not images.images and not tune.data


def check_flags(
    given: frozenset[str],
    network: NetworkFlags,
    options: PruneOptions,
    images: ImageFlags,
    tune: TuneFlags,
    run: RunFlags,
) -> None:
    """Raises ValueError for flags that contradict those of other records, or would have no effect."""
    # First what is missing, then what cannot be combined, then what has no effect.
    some_images = bool(tune.data or images.images)
    if not (some_images or network.model_path):
        if options.pruning_method in NEED_IMAGES:
            raise ValueError(
                f"`pruning_method` {options.pruning_method} needs images, and on random weights none are drawn; give "
                "`model_path`, or `images` DIR, labels are not needed."
            )
        if options.repair or options.plan_by == "curves":
            name = "repair" if options.repair else "plan_by"
            raise ValueError(
                f"`{name}` has no effect on random weights without images; give `model_path`."
            )
    if tune.epochs and not tune.data:
        raise ValueError("`epochs` was given without `data`; say what to fine-tune on.")
    if options.max_drop is not None:
        if not (tune.data and network.model_path):
            missing = "data" if network.model_path else "model_path"
            raise ValueError(
                f"`max_drop` needs `{missing}`: trained networks are scored on val."
            )
        if run.plan_only:
            raise ValueError(
                "`max_drop` cannot be combined with `plan_only`; leave one of them out."
            )
    if run.plan_only and options.plan is not None:
        raise ValueError(
            "`plan_only` has no effect with `plan`, which is decided already; leave one of them out."
        )

    # Images serve the ranking, the plan and the repair, and nothing else.
    unused = not needs_images(options, run)
    refuse_without_effect(
        given,
        ("epochs", run.plan_only, "with `plan_only`, which cuts nothing"),
        (
            "repair",
            run.plan_only and options.repair is True,
            "with `plan_only`, which cuts nothing",
        ),
        ("lr", not tune.epochs, "without `epochs`"),
        ("amp", not (tune.epochs or run.cuda), "on a CPU without `epochs`"),
        ("no_distill", not tune.epochs, "without `epochs`"),
        ("layout", not tune.data, "without `data`"),
        ("label_offset", not tune.data, "without `data`"),
        ("ignore_index", not tune.data, "without `data`"),
        ("val_split", not tune.data, "without `data`"),
        ("val_share", not tune.data, "without `data`"),
        ("skip_bad", not tune.data, "without `data`"),
        ("batch_size", not tune.data, "without `data`"),
        ("num_workers", not tune.data, "without `data`"),
        (
            "num_images",
            not (some_images or network.model_path),
            "on random weights, without `images` or `data`",
        ),
        ("images", unused, "where nothing is repaired or ranked by images"),
        ("num_images", unused, "where nothing is repaired or ranked by images"),
    )
