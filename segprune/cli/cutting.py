"""What the flags of pruning ask for, carried out: branches first, then channels, in one step or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segprune.cli.console import console, progress_bar
from segprune.cli.machine import choose_precision
from segprune.cli.plans import read_plan, read_sensitivity
from segprune.cli.pruning import PruneConfig, asked_rates, split_names
from segprune.model import SegFormer
from segprune.pruning.depth import branch_scores, choose, noise, remove
from segprune.pruning.latency import LatencyTable, default_folder
from segprune.pruning.patterns import parse_values
from segprune.pruning.plan import check_least
from segprune.pruning.pruner import Pruner
from segprune.pruning.pruner_l1 import L1Pruner
from segprune.spec import with_folded_head
from segprune.stats import count


def cut_network(
    dense: SegFormer,
    config: PruneConfig,
    given: frozenset[str],
    images: list[Tensor],
    trained: Callable[[SegFormer, str], SegFormer],
) -> SegFormer:
    """The network as the flags ask for it; `trained` trains it on, named by what for, between steps."""
    x = torch.empty(1, 3, *config.input_shape, device="meta")
    images = [batch.to(next(dense.parameters()).device) for batch in images]
    start = model = _without_branches(dense, config, given, images) if config.depth else dense
    for step in range(config.steps):
        text = "pruning" if config.steps == 1 else f"pruning, step {step + 1} of {config.steps}"
        with progress_bar(text) as advance:
            rates = _rates_of_step(step, dense, start, model, config, asked_rates(config, given))
            pruner = pruner_of(config, given, model, images, rates, advance, thinned=bool(config.depth))
            pruned = pruner.prune(x)
            assert isinstance(pruned, SegFormer)
            model = pruned
        if config.step_epochs and step + 1 < config.steps:
            model = trained(model, f"step{step + 1}")
    return model


def _without_branches(dense: SegFormer, config: PruneConfig, given: frozenset[str], images: list[Tensor]) -> SegFormer:
    """The network without the branches whose absence its output shows least; noise stands in for missing pictures."""
    x, rates = torch.empty(1, 3, *config.input_shape, device="meta"), asked_rates(config, given)
    pruner = pruner_of(config, given, dense, images, None)
    whole = pruner.prepare(x)
    for unit, rate in rates.items():
        check_least(whole.limit(unit, rate), whole.groups, pruner.options)
    seen = images or [batch.to(next(dense.parameters()).device) for batch in noise(config.input_shape)]
    with progress_bar("skipping one branch at a time") as advance:
        scores = branch_scores(dense, seen, progress=advance)
    stay = pruner.protected_names()
    free = {n: score for n, score in scores.items() if not any(f"{name}.".startswith(f"{n}.") for name in stay)}
    of: Any = next(iter(rates), "params")
    names = choose(dense.spec, free, config.depth, unit=of, input_shape=config.input_shape)
    model = remove(dense, names, images)
    left = pruner_of(config, given, model, images, None, thinned=True).prepare(x)
    for unit, rate in rates.items():
        limit = replace(left.limit(unit, rate), whole=whole.wholes[unit])
        check_least(limit, left.groups, pruner.options, depth=config.depth)
    console.print(f"Branches that go: {', '.join(name.removeprefix('encoder.') for name in names)}.", soft_wrap=True)
    return model


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
    folded = count(start.spec if config.keep_decoder or config.uniform else with_folded_head(start.spec), shape)
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


def pruner_of(
    config: PruneConfig,
    given: frozenset[str],
    model: SegFormer,
    images: list[Tensor],
    rates: Mapping[str, float] | None,
    progress: Callable[[int, int], None] | None = None,
    *,
    thinned: bool = False,
) -> Pruner:
    """The pruner that the flags ask for; `rates` by unit, None for those of the flags.

    `thinned`: branches of the network that a scan may name are gone.
    """
    asked = asked_rates(config, given) if rates is None else rates
    pruner: Any = L1Pruner if config.pruning_method == "l1" else Pruner  # which refuses unknown words itself
    return pruner(
        model,
        asked,
        method=config.pruning_method,
        data=images,
        repaired=config.repair if config.repair is not None else bool(images),
        scope=config.scope,
        round_to=config.round_to,
        heads=config.heads,
        keep_decoder=config.keep_decoder,
        uniform=config.uniform,
        max_rate=parse_values(config.max_rate, "--max_rate"),
        rates=parse_values(config.rates, "--rates"),
        ignore=split_names(config.ignore),
        sensitivity=_sensitivity(config.sensitivity, model, thinned) if config.sensitivity else {},
        widths=read_plan(Path(config.plan)) if config.plan else None,
        seed=config.seed,
        latency_table=_latency_table(model, config.amp) if "latency" in asked else None,
        progress=progress,
    )


def _sensitivity(path: str, model: SegFormer, thinned: bool) -> dict[str, float]:
    """What a scan measured; of a network that is `thinned` only for what is left."""
    factors = read_sensitivity(Path(path))
    left = {name for name, _ in model.named_modules()}
    return {name: f for name, f in factors.items() if not thinned or name.rpartition(".")[0] in left}


def _latency_table(model: SegFormer, amp: str) -> LatencyTable:
    device = next(model.parameters()).device
    return LatencyTable(device, choose_precision(amp, device), default_folder())
