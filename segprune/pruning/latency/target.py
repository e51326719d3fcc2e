"""From a predicted to a measured latency: cut, measure beside the dense network, correct, cut again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from segprune.stats import Latency, measure_latency

TOLERANCE = 0.05  # how far, as a share of the target, the measured latency may be from it


@dataclass(frozen=True)
class Met:
    """The network that met the target, and what was measured of it and the dense one in turn."""

    network: nn.Module
    predicted_ms: float
    dense: Latency
    pruned: Latency
    rounds: int

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
    *,
    device: torch.device | str = "cpu",
    batch: int = 1,
    rounds: int = 3,
    at_most: bool = False,
    measure: Callable[..., Sequence[Latency]] = measure_latency,
    max_seconds: float = 5.0,
) -> Met:
    """A network whose measured latency is `target_share` of the dense one's, within `TOLERANCE` of that target.

    With `at_most` it may be lower, as where another budget asks for more.

    `dense_ms` is the dense network's latency in predicted ms (`dense_in_predicted_ms`). `prune` takes a latency in
    predicted ms and gives the network cut for it and its predicted ms; a ValueError of its first call comes through.
    Each round corrects what is asked of it by what was measured. Both networks are measured in turn, so that a machine
    that slows down slows both; they are moved to `device` and left in eval mode. ValueError with the nearest share
    found if `rounds` are not enough, or if what a correction asks for cannot be reached.
    """
    if not 0.0 < target_share < 1.0:
        raise ValueError(
            f"The latency asked for is {target_share:g} of the dense network's; give a share between 0 and 1."
        )
    asked_ms = target_share * dense_ms
    tried: list[Met] = []
    for i in range(rounds):
        try:
            network, predicted_ms = prune(asked_ms)
        except ValueError as error:
            if not tried:
                raise
            raise ValueError(_refusal(target_share, tried)) from error
        before, after = measure([dense, network], input_shape, device=device, batch=batch, max_seconds=max_seconds)
        met = Met(network, predicted_ms, before, after, i + 1)
        off = met.share / target_share - 1.0
        if abs(off) <= TOLERANCE or (at_most and off < 0.0):
            return met
        tried.append(met)
        asked_ms = predicted_ms * target_share / met.share
    raise ValueError(_refusal(target_share, tried))


def _refusal(target_share: float, tried: Sequence[Met]) -> str:
    nearest = min(tried, key=lambda met: abs(met.share - target_share))
    return (
        f"A latency of {target_share:.3f} of the dense network's could not be met within {TOLERANCE:.0%} in "
        f"{len(tried)} measured tries; the nearest was {nearest.share:.3f} ({nearest.pruned.median_ms:.1f} of "
        f"{nearest.dense.median_ms:.1f} ms): ask for a rate of {1.0 - nearest.share:.3f}, or try again on a quieter "
        "machine."
    )
