"""Branches removed before channels are: those whose absence the network's output shows least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor

from segprune.model import SegFormer
from segprune.pruning.budget.rate import check_least, limit_of
from segprune.pruning.depth.choice import choose
from segprune.pruning.depth.removal import remove
from segprune.pruning.depth.scores import branch_scores, noise
from segprune.pruning.options import PruneOptions
from segprune.pruning.pruner import Pruner
from segprune.stats import Unit


def prune_depth(
    dense: SegFormer,
    depth: float,
    options: PruneOptions,
    images: Sequence[Tensor] = (),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SegFormer, list[str]]:
    """Returns a network without the least needed branches, at most the share `depth` of its cost, and their names.

    The share is of the unit of the options' first rate. Noise stands in for missing images. Raises ValueError where
    what is removed with them already exceeds a rate that channels are to meet afterwards.
    """
    # Refuse before the branches are scored, which is the expensive part.
    check_depth(depth, options)
    pruner = Pruner(dense, options=options, images=images)
    whole = pruner.prepare()
    for unit, rate in options.budgets.items():
        check_least(limit_of(whole, unit, rate), whole.groups, options)

    # Branches that hold something protected are kept.
    device = next(dense.parameters()).device
    seen = images or [batch.to(device) for batch in noise(whole.input_shape)]
    scores = branch_scores(dense, seen, progress=progress)
    protected = pruner.protected_names()
    free = {
        branch: score
        for branch, score in scores.items()
        if not any(f"{name}.".startswith(f"{branch}.") for name in protected)
    }

    # Depth takes its share first; channels then have to give what is missing.
    unit = cast(Unit, next(iter(options.budgets), "params"))
    names = choose(dense.spec, free, depth, unit=unit, input_shape=whole.input_shape)
    model = remove(dense, names, images)

    # Shares are of the network as it was, so that folding may exceed them only now.
    # Sensitivities may name blocks that are removed now.
    options = replace(options, sensitivity=None)
    left = Pruner(model, options=options, images=images).prepare()
    for unit_of_rate, rate in options.budgets.items():
        limit = replace(limit_of(left, unit_of_rate, rate), whole=whole.wholes[unit_of_rate])
        check_least(limit, left.groups, options, depth=depth)
    return model, names


def check_depth(depth: float, options: PruneOptions) -> None:
    """Raises ValueError for a share that is out of range, or cannot be combined with the options."""
    if not 0.0 < depth < 1.0:
        raise ValueError(f"`depth` is {depth:g}; it must be above 0 and below 1.")

    # Branches have a cost in parameters and MACs only, and a plan leaves no rate to share.
    if options.plan is not None or {"latency", "channels"} & options.budgets.keys():
        raise ValueError(
            "`depth` needs a rate of params or macs, and no plan; leave one of them out."
        )
    if options.uniform:
        raise ValueError(
            "`depth` removes parts of blocks, which `uniform` keeps; leave one of them out."
        )
    for unit, rate in options.budgets.items():
        # The share of depth is a part of the rate: it must leave something for the
        # channels.
        if depth >= rate > 0.0:
            raise ValueError(
                f"`depth` is {depth:g}, a part of the rate of the {unit}, {rate:g}; it must be below it."
            )
