"""`segprune prune --max_drop`: trials shown as they come, what is recorded of them, and the neighbours saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segprune import checkpoint
from segprune.cli.console import console, progress_bar
from segprune.cli.prune.flags import TuneFlags
from segprune.data import Source
from segprune.inference.drop import DropScorer
from segprune.inference.label_maps import EvalMode
from segprune.inference.metrics import Score
from segprune.model import SegFormer
from segprune.pruning.budget import Search, Trial
from segprune.pruning.budget.latency import LatencyTable
from segprune.pruning.options import PruneOptions
from segprune.pruning.prune import make_pruner
from segprune.runs.records import network_size
from segprune.stats import count


def search_rate(
    dense: SegFormer,
    source: Source,
    batches: Sequence[Tensor],
    options: PruneOptions,
    tune: TuneFlags,
    table: LatencyTable | None,
    device: torch.device,
) -> tuple[Search, dict[str, Score], dict[str, Any] | None]:
    """Returns what was tried, the scores of the dense and the chosen network on all of val, and the record of its plan."""
    assert tune.num_workers is not None
    (unit,) = options.budgets

    # One bar for all that takes time: curves, repairs and scoring follow each other.
    with progress_bar("searching") as advance:
        scorer = DropScorer(
            dense,
            source.split("val"),
            dense.spec.num_classes,
            EvalMode(input_shape=options.input_shape),
            device=device,
            batch_size=tune.batch_size,
            num_workers=tune.num_workers,
            seed=options.seed,
            progress=advance,
        )
        console.print(
            f"\nDense: mIoU {scorer.score().miou:.4f} on {len(scorer.samples)} images. Searching the largest share of "
            f"the {unit} that can be removed for {options.max_drop:g} points; {scorer.num_part} images at first.",
            soft_wrap=True,
        )
        pruner = make_pruner(
            dense, images=batches, options=options, latency_table=table, progress=advance
        )
        search = pruner.search(scorer.drop, _show_trial)

    # What is told of the end differs from what the trials showed: whether it is sharp.
    chosen, smaller = search.chosen, search.smaller
    beyond = f"nothing smaller was tried, since {search.limit}"
    if smaller is not None:
        beyond = f"rate {smaller.rate:g} loses {smaller.drop.points:.2f}"
    console.print(
        f"Chosen: rate {chosen.rate:g}, which loses {chosen.drop.points:.2f} points on all of val; {beyond}. "
        "The budget holds before fine-tuning.",
        soft_wrap=True,
    )
    scores = {"dense": scorer.score(), "pruned": scorer.score(chosen.network)}
    return search, scores, pruner.record


def _show_trial(trial: Trial) -> None:
    drop = trial.drop
    margin = f" ± {drop.margin:.2f}" if drop.margin else ""
    console.print(
        f"  rate {trial.rate:.2f}: loses {drop.points:.2f}{margin} points on {drop.num_images} images"
    )


def save_neighbours(
    search: Search, path: Path, extra: Mapping[str, Any], how: Mapping[str, Any]
) -> dict[float, str]:
    """Saves the networks next to the chosen one, and returns their paths by rate; the chosen one's is `path`."""
    paths = {search.chosen.rate: str(path)}
    for trial in (search.larger, search.smaller):
        if trial is not None:
            beside = path.with_name(f"{path.stem}_at_{trial.rate:g}.pth")
            own = dict(extra) | {"pruning": dict(how) | {"pruning_rate": trial.rate}}
            checkpoint.save(_network(trial), beside, extra=own)
            paths[trial.rate] = str(beside)
    return paths


def search_record(
    search: Search, options: PruneOptions, paths: Mapping[float, str]
) -> dict[str, Any]:
    """Returns what pruning_results.json holds of the trials, in the order in which they were made."""
    trials = []
    for trial in search.trials:
        trials.append(
            {
                "rate": trial.rate,
                "chosen": trial.rate == search.chosen.rate,
                "drop_points": trial.drop.points,
                "margin_points": trial.drop.margin,
                "num_images": trial.drop.num_images,
                "removed": dict(trial.plan.removed),
                **network_size(count(_network(trial).spec, options.input_shape)),
                "path": paths.get(trial.rate),
            }
        )
    (unit,) = options.budgets
    return {
        "max_drop": search.max_drop,
        "rate_of": unit,
        "rate": search.chosen.rate,
        "limit": search.limit,
        "trials": trials,
    }


def _network(trial: Trial) -> SegFormer:
    assert isinstance(trial.network, SegFormer)
    return trial.network
