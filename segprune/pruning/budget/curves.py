"""Decides widths by curves: what each group loses after the repair, against what it costs.

For each weight of time, `allocate` finds the least loss that meets the budgets. Of these plans, those that lose at most
`UNFELT`, or `GROWTH` times the least loss, are good enough, and the fastest of them is taken: hidden layers at high
resolution cost passes over memory that neither parameters nor MACs show (work.py estimates the time).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from segprune.model import SegFormer
from segprune.pruning.budget.allocation import allocate
from segprune.pruning.budget.costs import Costs, mix_costs
from segprune.pruning.budget.rate import (
    Limit,
    allowed_widths,
    check_least,
    check_met,
    check_reach,
    limit_of,
    with_shares,
)
from segprune.pruning.budget.widths import by_widths
from segprune.pruning.budget.work import time_costs
from segprune.pruning.curves import Curve, measure_curves
from segprune.pruning.groups import Group
from segprune.pruning.images import checked_images
from segprune.pruning.importance import Scores
from segprune.pruning.options import PruneOptions
from segprune.pruning.plan import Plan, Widths, check_widths, keep_best, read_plan
from segprune.pruning.prepare import Prepared
from segprune.timing import Progress

UNFELT = 1e-4  # nats per pixel: a loss below this counts as none
GROWTH = 1.25  # a plan may lose this many times the least loss if it is faster

# A channel is charged w · (share of the time) + (1 − w) · (mean share of the budgeted units). Above 1 the second term is
# negative: parameters that take no time are kept, and slow channels go instead.
TIME_WEIGHTS = (0.6, 0.9, 1.1, 1.15, 1.2, 1.25, 1.3)

Solver = Callable[[Sequence[Limit]], Plan]


def by_curves(prepared: Prepared, solver: Solver, options: PruneOptions) -> Plan:
    """Returns the plan that meets every budget with the least loss expected; the tightest closely.

    `solver` is that of `solve_by_curves`.
    """
    limits = [limit_of(prepared, unit, rate) for unit, rate in options.budgets.items()]
    return with_shares(prepared, solver(limits), limits)


def solve_by_curves(
    prepared: Prepared,
    scores: Mapping[str, Scores],
    images: Sequence[Tensor],
    options: PruneOptions,
    progress: Progress | None = None,
) -> Solver:
    """Measures the curves once, and returns what makes a plan of budgets with them.

    `scores` rank channels only in groups whose kept channels the repair replaces by directions. The solver raises
    ValueError as `rate.solve` does.
    """
    # All that is expensive happens here, once. `solve` can then be called for many budgets.
    groups = prepared.groups
    allowed = allowed_widths(groups, options)
    measured = _measure(prepared, images, allowed, options, progress)
    ranks = _with_orders(scores, groups, measured)
    time = time_costs(prepared.rows, groups)

    def solve(limits: Sequence[Limit]) -> Plan:
        # Refuse what no choice of widths can meet before searching.
        narrowest = np.array([widths[0] for widths in allowed], dtype=np.int64)
        for limit in limits:
            check_reach(limit, narrowest, options)
            check_least(limit, groups, options)

        # Without a budget every group takes the widest width that the shares by name allow.
        widths = np.array([widths[-1] for widths in allowed], dtype=np.int64)
        if limits:
            widths = choose_widths(measured, limits, allowed, time)
        check_met(limits, groups, widths, options)
        losses = {
            g.name: curve.at(int(w))
            for g, curve, w in zip(groups, measured, widths, strict=True)
        }
        return replace(keep_best(groups, ranks, widths), decided_by="curves", losses=losses)

    return solve


def by_widths_and_curves(
    prepared: Prepared,
    scores: Mapping[str, Scores],
    images: Sequence[Tensor],
    options: PruneOptions,
    progress: Progress | None = None,
) -> Plan:
    """Carries out given widths, but keeps the channels that curves would keep at them."""
    assert options.plan is not None
    given = read_plan(options.plan) if isinstance(options.plan, str) else options.plan
    widths = check_widths(given, prepared.groups)

    # Two widths per group are enough to learn which channels are needed least at the given one.
    pairs = [sorted({int(w), g.slots}) for g, w in zip(prepared.groups, widths, strict=True)]
    measured = _measure(prepared, images, pairs, options, progress)
    return by_widths(prepared, _with_orders(scores, prepared.groups, measured), options)


def _measure(
    prepared: Prepared,
    images: Sequence[Tensor],
    widths: Sequence[Sequence[int]],
    options: PruneOptions,
    progress: Progress | None,
) -> list[Curve]:
    model = prepared.model
    assert isinstance(model, SegFormer)
    batches = checked_images(model, images)
    return measure_curves(
        model, prepared.groups, batches, widths, seed=options.seed, progress=progress
    )


def _with_orders(
    scores: Mapping[str, Scores], groups: Sequence[Group], curves: Sequence[Curve]
) -> dict[str, Scores]:
    """Returns the scores; where elimination gave an order, a channel's place in it: what went last is highest."""
    ranks = dict(scores)
    for group, curve in zip(groups, curves, strict=True):
        if curve.order is not None:
            # argsort of a permutation is its inverse: a
            # channel's position in the order is its score.
            ranks[group.name] = np.argsort(np.array(curve.order)).astype(np.float64)
    return ranks


def choose_widths(
    curves: Sequence[Curve],
    limits: Sequence[Limit],
    allowed: Sequence[Sequence[int]],
    time: Costs,
) -> Widths:
    """Returns the fastest of several allocations whose loss is not felt, or hardly larger than the least."""
    formulas = [limit.cost for limit in limits if isinstance(limit.cost, Costs)]
    # A latency budget is time itself, so it adds no charge, and weights make no difference.
    weights = TIME_WEIGHTS if formulas else (1.0,)

    # The more time weighs, the faster the plan tends to be and the more it loses.
    trials = []
    for weight in weights:
        charges = [((1.0 - weight) / len(formulas), cost) for cost in formulas]
        widths = allocate(curves, limits, allowed, mix_costs([*charges, (weight, time)]))
        loss = sum(curve.at(int(w)) for curve, w in zip(curves, widths, strict=True))
        trials.append((loss, time.total(widths), widths))

    # Of the plans whose loss is negligible, or close to the least, take the fastest.
    bound = max(UNFELT, GROWTH * min(loss for loss, _, _ in trials))
    near = [trial for trial in trials if trial[0] <= bound]
    return min(near, key=lambda trial: trial[1])[2]
