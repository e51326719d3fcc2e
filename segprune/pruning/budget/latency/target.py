"""From a predicted to a measured latency: cut, measure beside the dense network, correct, cut again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from segprune.pruning.budget.latency.steps import Place
from segprune.timing import Latency, measure_latency

TOLERANCE = 0.05  # how far, as a share of the target, the measured latency may be from it
MAX_TRIES = 3


@dataclass(frozen=True)
class Met:
    """A network cut for the target, and what was measured of it and the dense one in turns."""

    network: nn.Module
    predicted_ms: float
    dense: Latency
    pruned: Latency
    tries: int

    @property
    def share(self) -> float:
        """Of the dense network's latency."""
        return self.pruned.median_ms / self.dense.median_ms


def meet(
    target_share: float,
    dense: nn.Module,
    dense_ms: float,
    prune: Callable[[float], tuple[nn.Module, float]],
    input_shape: tuple[int, int],
    place: Place,
    *,
    at_most: bool = False,
    max_seconds: float = 5.0,
) -> Met:
    """Returns a network whose measured latency is `target_share` of the dense one's, within `TOLERANCE` of that.

    With `at_most` it may be lower, as where another budget asks for more.

    `dense_ms` is the dense network's latency in predicted ms (`dense_in_predicted_ms`). `prune` takes a latency in
    predicted ms, and gives the network cut for it and its predicted ms; a ValueError of its first call comes through.
    Each try corrects what is asked of it by what was measured. Both networks are measured in turns, so that a machine
    that slows down slows both; they are moved to the place's device and left in evaluation mode. Raises ValueError
    with the least latency that was reached if `MAX_TRIES` are not enough, or if a correction is out of reach.
    """
    if not 0.0 < target_share < 1.0:
        raise ValueError(
            f"The latency asked for is {target_share:g} of the dense network's; give a share between 0 and 1."
        )

    # The first try trusts the prediction. Later ones are corrected by what was measured.
    target_ms = target_share * dense_ms
    tried: list[Met] = []
    while len(tried) < MAX_TRIES:
        try:
            network, predicted_ms = prune(target_ms)
        except ValueError as error:
            # Out of reach from the start: the solver says
            # it best. Later, report what was reached.
            if not tried:
                raise
            raise ValueError(_refusal(target_share, tried)) from error

        before, after = measure_latency(
            [dense, network],
            input_shape,
            device=place.device,
            precision=place.precision,
            max_seconds=max_seconds,
        )
        met = Met(network, predicted_ms, before, after, tries=len(tried) + 1)
        excess = met.share / target_share - 1.0
        if abs(excess) <= TOLERANCE or (at_most and excess < 0.0):
            return met

        # Ask for as much less as the measured latency was above the target.
        tried.append(met)
        target_ms = predicted_ms * target_share / met.share

    raise ValueError(_refusal(target_share, tried))


def _refusal(target_share: float, tried: Sequence[Met]) -> str:
    """Says what was reached, and the rate that reaches it: one that was measured, and never below 0."""
    least = min(tried, key=lambda met: met.share)
    tries = "1 measured try" if len(tried) == 1 else f"{len(tried)} measured tries"
    unmet = (
        f"A latency of {target_share:.3f} of the dense network's could not be met within {TOLERANCE:.0%} in {tries}; "
        f"the least reached was {least.share:.3f} of it, {least.pruned.median_ms:.2f} of {least.dense.median_ms:.2f} ms"
    )

    rate = (
        math.floor(1000.0 * (1.0 - least.share)) / 1000.0
    )  # rounded down, so that it can be reached
    if rate <= 0.0:
        return f"{unmet}, so removing channels saves no time here: ask for a rate of params or macs instead."
    return f"{unmet}: ask for a rate of {rate:.3f}, or try again while nothing else runs."
