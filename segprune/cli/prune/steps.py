"""The cut in several steps: the plain cut again and again, each of a network that may have been trained in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from segprune import checkpoint
from segprune.checkpoint import Checkpoint
from segprune.cli.console import console, progress_bar
from segprune.cli.prune.closing import finetuned_folder
from segprune.cli.train.command import fit_with
from segprune.cli.train.flags import TrainSettings
from segprune.data import Source
from segprune.model import SegFormer
from segprune.pruning.budget.latency import LatencyTable
from segprune.pruning.options import PruneOptions
from segprune.pruning.prune import make_pruner
from segprune.pruning.steps import budgets_of_step


@dataclass(frozen=True)
class Tuning:
    """All that a fine-tuning needs beside the network."""

    settings: TrainSettings
    source: Source
    pixels: tuple[int, ...]  # labelled ones of each class
    extra: dict[str, Any]
    teacher: Checkpoint | None


def prune_in_steps(
    dense: SegFormer,
    start: SegFormer,
    options: PruneOptions,
    images: Sequence[Tensor],
    steps: int,
    *,
    epochs: int,
    tuning: Tuning | None,
    path: Path,
    latency_table: LatencyTable | None = None,
) -> SegFormer:
    """Returns `start` pruned so that, after the last step, it lacks what the options ask of `dense`.

    `start` is the dense network, or what removing whole branches left of it. With `epochs` the network is fine-tuned
    between two steps, in folders named after `path`.
    """
    model = start
    for step in range(steps):
        # The options are shares of the dense network; a step needs shares of its own.
        budgets = budgets_of_step(
            options, dense.spec, start.spec, model.spec, step=step, steps=steps
        )
        shares: dict[str, float] = dict(budgets.items())
        # The shares name their units, so `rate_of`, which names a single one, is cleared.
        own_options = replace(options, pruning_rate=shares, rate_of=None)

        text = "pruning" if steps == 1 else f"pruning, step {step + 1} of {steps}"
        with progress_bar(text) as advance:
            pruner = make_pruner(
                model,
                images=images,
                options=own_options,
                latency_table=latency_table,
                progress=advance,
            )
            pruned = pruner.prune()
        assert isinstance(pruned, SegFormer)
        model = pruned

        # Not after the last step: what follows it is the command's own fine-tuning.
        if epochs and step + 1 < steps:
            assert tuning is not None
            model = _train_between(model, step + 1, epochs, tuning, path)
    return model


def _train_between(
    model: SegFormer, step: int, epochs: int, tuning: Tuning, path: Path
) -> SegFormer:
    console.print(f"\nFine-tuning after step {step}", style="bold")
    device = next(model.parameters()).device
    # The run's settings name the network that it starts from, so that file is written.
    start = path.with_name(f"{path.stem}_step{step}.pth")
    checkpoint.save(model, start, extra=tuning.extra)

    # Like the last fine-tuning, but with its own epochs and in a folder of its own.
    settings = replace(
        tuning.settings,
        start=replace(tuning.settings.start, model_path=str(start)),
        options=replace(tuning.settings.options, epochs=epochs),
        run=replace(tuning.settings.run, save_dir=str(finetuned_folder(start))),
    )
    # A part of the whole command, which --resume could not take up.
    fit = fit_with(
        settings,
        model,
        tuning.source,
        tuning.pixels,
        tuning.extra,
        tuning.teacher,
        resumable=False,
    )
    return checkpoint.load(fit.path).to(device)
