"""What the flags of pruning ask for, carried out: branches first, then channels, in one step or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from segprune.cli.common import console, progress_bar
from segprune.cli.pruning import PruneConfig, asked_rates, pruner_of, split_names
from segprune.model import SegFormer
from segprune.stats import count


def cut_network(
    dense: SegFormer,
    config: PruneConfig,
    given: frozenset[str],
    images: list[Tensor],
    trained: Callable[[SegFormer, int], SegFormer] | None = None,
) -> SegFormer:
    """The network as the flags ask for it; `trained` trains it on between two steps, whose number from 1 it gets."""
    x = torch.empty(1, 3, *config.input_shape, device="meta")
    images = [batch.to(next(dense.parameters()).device) for batch in images]
    start = model = _without_branches(dense, config, given, images) if config.depth else dense
    for step in range(config.steps):
        text = "pruning" if config.steps == 1 else f"pruning, step {step + 1} of {config.steps}"
        with progress_bar(text) as advance:
            rates = _rates_of_step(step, dense, start, model, config, asked_rates(config, given))
            model = pruner_of(config, given, model, images, rates, advance).prune(x)
        if trained is not None and step + 1 < config.steps:
            model = trained(model, step + 1)
    return model


def _without_branches(dense: SegFormer, config: PruneConfig, given: frozenset[str], images: list[Tensor]) -> SegFormer:
    """The network without the branches whose absence its output shows least; noise stands in for missing pictures."""
    from segprune.pruning.depth import branch_scores, choose, noise, remove
    from segprune.pruning.patterns import matches

    rates = asked_rates(config, given)
    unit = next(iter(rates), "params")
    if rates and config.depth >= rates[unit]:
        raise ValueError(
            f"--depth {config.depth:g} is part of the rate of the {unit}; it must be below {rates[unit]:g}."
        )
    seen = images or [batch.to(next(dense.parameters()).device) for batch in noise(config.input_shape)]
    with progress_bar("skipping one branch at a time") as advance:
        scores = branch_scores(dense, seen, progress=advance)
    ignored = split_names(config.ignore)
    free = {name: score for name, score in scores.items() if not any(matches(pattern, name) for pattern in ignored)}
    names = choose(dense.spec, free, config.depth, unit=unit, input_shape=config.input_shape)  # type: ignore[arg-type]
    console.print(f"Branches that go: {', '.join(name.removeprefix('encoder.') for name in names)}.", soft_wrap=True)
    return remove(dense, names, images)


def _rates_of_step(
    step: int, dense: SegFormer, start: SegFormer, model: SegFormer, config: PruneConfig, rates: Mapping[str, float]
) -> Mapping[str, float]:
    """What this step removes of the network it finds.

    All steps take equal shares of the dense network, apart from what branches (in `start`) and folding took before.
    """
    if config.steps == 1 and not config.depth:
        return rates
    shape = config.input_shape
    whole, now = count(dense.spec, shape), count(model.spec, shape)
    folded = count(
        start.spec if config.keep_decoder or config.uniform else replace(start.spec, branch_dims=None), shape
    )
    found = {}
    for unit, rate in rates.items():
        before, gone = 0.0, rate * step / config.steps
        if unit in ("params", "macs"):
            size = {"params": "parameters"}.get(unit, unit)
            before = 1.0 - getattr(folded, size) / getattr(whole, size)
            gone = 1.0 - getattr(now, size) / getattr(whole, size)
        aim = rate if rate <= before else before + (rate - before) * (step + 1) / config.steps
        found[unit] = 1.0 - (1.0 - aim) / (1.0 - gone)
    return found
