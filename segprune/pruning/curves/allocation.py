"""Widths for a budget, from curves and prices: the least loss that the budget leaves.

With a price per unit of cost, every group takes the width at which its loss and what it costs are least together
(Lagrange; "Optimal Brain Damage" spends channels so, and video encoders bits: Shoham and Gersho 1988). Groups share
layers, so what one costs depends on the others: they are gone through in turn until none moves. The price is then
found by bisection, and what is left of the budget is spent in single steps, those of the least loss per cost first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from segprune.pruning.budget.costs import Cost
from segprune.pruning.budget.rate import AIM, Limit
from segprune.pruning.curves.measure import Curve
from segprune.pruning.plan import Widths

MAX_SWEEPS = 20
Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


def allocate(
    curves: Sequence[Curve],
    limits: Sequence[Limit],
    allowed: Sequence[Sequence[int]],
    prices: Sequence[tuple[float, Cost]],
) -> Widths:
    """Widths of all groups that meet every limit, those of the tightest within a step.

    `allowed` has the widths that each group may take, ascending; `prices` are weights and costs, whose weighted sum of
    shares is what a group's channels are charged.
    """
    options = [np.array(widths, dtype=np.int64) for widths in allowed]
    losses = [np.array([curve.at(int(w)) for w in ws]) for curve, ws in zip(curves, options, strict=True)]
    bill = _Bill(prices)

    # Bisection on the logarithm of the price; the dearest that still leaves something to remove.
    low, high = 1e-9, 1e3
    widths = np.array([ws[-1] for ws in options], dtype=np.int64)
    for _ in range(50):
        price = (low * high) ** 0.5
        trial = _settle(price, losses, options, bill)
        if missing(limits, trial) > 0.0:
            low, widths = price, trial
        else:
            high = price
        if high / low < 1.01:
            break
    return _spend_rest(limits, losses, options, bill, widths)


def missing(limits: Sequence[Limit], widths: Widths) -> float:
    """How much, as a share of its whole, the limit furthest from being met still asks; below 0 all are exceeded."""
    return max(limit.rate - limit.removed(widths) for limit in limits)


class _Bill:
    """What widths cost, as the weighted sum of shares of several costs."""

    def __init__(self, prices: Sequence[tuple[float, Cost]]) -> None:
        self.parts = [(weight / cost.total(cost.full), cost) for weight, cost in prices]

    def total(self, widths: Widths) -> float:
        return sum(weight * cost.total(widths) for weight, cost in self.parts)

    def slope(self, widths: Widths, g: int, low: int, high: int) -> float:
        """Cost of one slot of group `g`, the others as they are."""
        if low == high:
            return 0.0
        at = [widths.copy(), widths.copy()]
        at[0][g], at[1][g] = low, high
        return (self.total(at[1]) - self.total(at[0])) / (high - low)


def _settle(price: float, losses: list[Floats], options: list[Widths], bill: _Bill) -> Widths:
    widths = np.array([ws[-1] for ws in options], dtype=np.int64)
    for _ in range(MAX_SWEEPS):
        before = widths.copy()
        for g, (loss, ws) in enumerate(zip(losses, options, strict=True)):
            slope = bill.slope(widths, g, int(ws[0]), int(ws[-1]))
            widths[g] = ws[int(np.argmin(loss + price * slope * ws))]
        if bool((widths == before).all()):
            break
    return widths


def _spend_rest(
    limits: Sequence[Limit], losses: list[Floats], options: list[Widths], bill: _Bill, widths: Widths
) -> Widths:
    """Single steps while one overshoots by no more than `AIM`; where all do, the one that lands nearest."""
    while missing(limits, widths) > AIM:
        steps = []
        for g, (loss, ws) in enumerate(zip(losses, options, strict=True)):
            i = int(np.searchsorted(ws, widths[g]))
            if i == 0:
                continue
            trial = widths.copy()
            trial[g] = ws[i - 1]
            saved = max(bill.total(widths) - bill.total(trial), 1e-15)
            steps.append(((loss[i - 1] - loss[i]) / saved, g, trial))
        in_order = [trial for *_, trial in sorted(steps, key=lambda entry: entry[:2])]
        gentle = next((trial for trial in in_order if missing(limits, trial) >= -AIM), None)
        if gentle is None:
            return min([widths, *in_order], key=lambda trial: abs(missing(limits, trial)))
        widths = gentle
    return widths
