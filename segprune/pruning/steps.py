"""Pruning in several steps: what each of them is to remove of the network that it starts from."""

from __future__ import annotations

from segprune.pruning.options import PruneOptions, RateOf
from segprune.spec import Spec, with_folded_head
from segprune.stats import count, removed_shares


def budgets_of_step(
    options: PruneOptions, dense: Spec, start: Spec, now: Spec, *, step: int, steps: int
) -> dict[RateOf, float]:
    """Returns the rates of step `step` (from 0) of `steps`, as shares of the network `now`.

    All steps take equal shares of the dense network, apart from what was removed before channels: branches (they are
    missing in `start`) and what folding the decode head saves.
    """
    shape = options.input_shape

    # The network whose channels the first step cuts: without the removed branches, and
    # folded unless its decode head is kept.
    keep_head = options.keep_decoder or options.uniform
    folded = start if keep_head else with_folded_head(start)

    # All shares are of the dense network: what was removed before channels, and up to now.
    whole = count(dense, shape)
    before = removed_shares(whole, count(folded, shape))
    already = removed_shares(whole, count(now, shape))

    budgets: dict[RateOf, float] = {}
    for unit, rate in options.budgets.items():
        # Channels and latency cannot be read off a spec: earlier steps count as having met
        # their share.
        if unit in ("params", "macs"):
            at_start, removed = before[unit], already[unit]
        else:
            at_start, removed = 0.0, rate * step / steps

        # What the channels still have to give is split evenly over the steps.
        aim = rate
        if rate > at_start:
            aim = at_start + (rate - at_start) * (step + 1) / steps

        # From a share of the dense network to one of the network now: what is kept
        # multiplies, 1 − aim = (1 − removed) · (1 − budget).
        budgets[unit] = 1.0 - (1.0 - aim) / (1.0 - removed)
    return budgets
