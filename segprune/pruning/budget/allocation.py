"""Widths for a budget, from curves and prices: the least loss that the budget leaves.

With a price per unit of cost, every group takes the width at which its loss and what it costs are least together
(Lagrange; "Optimal Brain Damage" spends channels so, and video encoders bits: Shoham and Gersho 1988). Groups share
layers, so what one costs depends on the others: they are gone through in turn until none moves. The price is then
found by bisection, and what is left of the budget is spent in single steps, those of the least loss per cost first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from segprune.pruning.budget.costs import Costs
from segprune.pruning.budget.rate import AIM, Limit
from segprune.pruning.curves.measure import Curve
from segprune.pruning.plan import Widths

MAX_SWEEPS = 20
Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


def allocate(
    curves: Sequence[Curve],
    limits: Sequence[Limit],
    allowed: Sequence[Sequence[int]],
    charge: Costs,
) -> Widths:
    """Returns the widths of all groups that meet every limit, the tightest within a step.

    `allowed` has the widths that each group may take, ascending; `charge` is what channels cost when groups are
    compared, as a share of the network.
    """
    # Each curve becomes a table over the widths that its group may take.
    options = [np.array(widths, dtype=np.int64) for widths in allowed]
    losses = [
        np.array([curve.at(int(w)) for w in ws])
        for curve, ws in zip(curves, options, strict=True)
    ]

    # Bisection on the logarithm of the price, for the
    # highest one at which something is still to be removed.
    low, high = 1e-9, 1e3
    widths = np.array([ws[-1] for ws in options], dtype=np.int64)
    for _ in range(50):
        price = (low * high) ** 0.5
        trial = _settle(price, losses, options, charge)
        if missing(limits, trial) > 0.0:
            low, widths = price, trial
        else:
            high = price

        # Close enough: single steps spend the rest.
        if high / low < 1.03:
            break
    return _spend_rest(limits, losses, options, charge, widths)


def missing(limits: Sequence[Limit], widths: Widths) -> float:
    """How much, as a share of its whole, the limit furthest from being met still asks; below 0 all are exceeded."""
    return max(limit.rate - limit.removed(widths) for limit in limits)


def _settle(price: float, losses: list[Floats], options: list[Widths], charge: Costs) -> Widths:
    """Returns the widths at which loss + price · cost is least in each group, given those of the others."""
    widths = np.array([ws[-1] for ws in options], dtype=np.int64)
    dims = charge.dims(widths)

    # Coordinate descent: each group in turn takes its best
    # width, given those of the others, until none moves.
    for _ in range(MAX_SWEEPS):
        before = widths.copy()
        for g, (loss, ws) in enumerate(zip(losses, options, strict=True)):
            # The slope, cost per slot, is that at the present widths of the layers beside it.
            width = ws[int(np.argmin(loss + price * charge.slope(dims, g) * ws))]
            if width != widths[g]:
                widths[g] = width
                dims = charge.dims(widths)
        if bool((widths == before).all()):
            break
    return widths


def _spend_rest(
    limits: Sequence[Limit],
    losses: list[Floats],
    options: list[Widths],
    charge: Costs,
    widths: Widths,
) -> Widths:
    """Takes single steps while one overshoots by no more than `AIM`; where all do, the one that lands nearest."""
    while missing(limits, widths) > AIM:
        dims = charge.dims(widths)
        steps = []
        for g, (loss, ws) in enumerate(zip(losses, options, strict=True)):
            i = int(np.searchsorted(ws, widths[g]))
            if i == 0:
                continue
            narrower = widths.copy()
            narrower[g] = ws[i - 1]

            # Loss per cost of this step. 1e-15 is for a step that saves nothing.
            saved = max(charge.slope(dims, g) * float(ws[i] - ws[i - 1]), 1e-15)
            steps.append(((loss[i - 1] - loss[i]) / saved, g, narrower))

        # Prefer the cheapest step that does not overshoot. Where all do, land nearest.
        in_order = [narrower for *_, narrower in sorted(steps, key=lambda step: step[:2])]
        gentle = next(
            (narrower for narrower in in_order if missing(limits, narrower) >= -AIM), None
        )
        if gentle is None:
            return min([widths, *in_order], key=lambda trial: abs(missing(limits, trial)))
        widths = gentle
    return widths
