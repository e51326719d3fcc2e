"""The flags of `segprune train` that are not options of training itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from typer import Option

from segprune.cli.flags import (
    Data,
    Dialect,
    InputFlags,
    Layout,
    SkipBad,
    ValShare,
    ValSplit,
    Verbose,
    refuse_without_effect,
    switch,
)
from segprune.training.objective import check_distilled
from segprune.training.options import TrainOptions


@dataclass(frozen=True)
class StartFlags:
    """What a run starts from."""

    PANELS: ClassVar[Mapping[str, str]] = {
        "data": "Data",
        "model_path": "The network",
        "teacher": "Learning from a teacher",
    }

    data: Data = "VOCdevkit"
    layout: Layout = None
    val_split: ValSplit = ""
    val_share: ValShare = None
    skip_bad: SkipBad = False
    model_path: Annotated[
        str,
        Option(
            "--model_path", help="Checkpoint to start from, pruned or not; empty: from scratch."
        ),
    ] = ""
    phi: Annotated[
        str | None,
        Option(
            "--phi",
            help="MiT variant b0 … b5; read off the checkpoint if there is one, else b2.",
        ),
    ] = None
    drop_path: Annotated[
        float | None,
        Option(
            "--drop_path",
            min=0.0,
            max=0.9,
            help="Stochastic depth of the last block; read off the checkpoint if there is one, else 0.1.",
        ),
    ] = None
    dialect: Dialect = None
    teacher: Annotated[
        str,
        Option(
            "--teacher", help="Dense checkpoint to learn from beside the labels (distillation)."
        ),
    ] = ""
    teacher_dialect: Annotated[
        str | None, Option("--teacher_dialect", help="As --dialect, for the --teacher.")
    ] = None


@dataclass(frozen=True)
class RunFlags:
    """How a run is kept, and where it runs."""

    PANELS: ClassVar[Mapping[str, str]] = {"keep": "What is saved, and when", "cuda": "The run"}

    keep: Annotated[
        int,
        Option("--keep", min=0, help="Keep the weights of this many latest epochs as files."),
    ] = 0
    tensorboard: Annotated[bool, switch("--tensorboard", "Write logs for TensorBoard too.")] = (
        False
    )
    cuda: Annotated[
        bool, switch("--cuda", "Use the GPU; several GPUs by torchrun train.py …")
    ] = False
    save_dir: Annotated[
        str, Option("--save_dir", help="Folder for checkpoints and results.")
    ] = "logs"
    resume: Annotated[
        bool,
        switch(
            "--resume", "Continue the run in --save_dir, with the settings it was started with."
        ),
    ] = False
    verbose: Verbose = False


@dataclass(frozen=True)
class TrainSettings:
    """All flags of a run together."""

    start: StartFlags
    options: TrainOptions
    run: RunFlags
    inputs: InputFlags

    def merged(self) -> dict[str, Any]:
        """Returns all of them by name, as they are printed and saved."""
        settings: dict[str, Any] = {}
        for record in (self.start, self.inputs, self.options, self.run):
            settings |= asdict(record)
        return settings


def check_effects(settings: TrainSettings, given: frozenset[str]) -> None:
    """Raises ValueError for a flag that was given and would change nothing."""
    start = settings.start
    check_distilled(settings.options, bool(start.teacher))
    refuse_without_effect(
        given,
        ("teacher_dialect", not start.teacher, "without --teacher"),
        ("tf32", bool(settings.options.tf32) and not settings.run.cuda, "on a CPU"),
    )
    if start.dialect is not None and not start.model_path:
        raise ValueError(
            "`dialect` was given without `model_path`; it says who wrote a checkpoint."
        )
