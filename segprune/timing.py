"""Times of several functions that take turns, so that a drift of the machine hits all of them alike.

Units: milliseconds for one call, MACs per second in thousands of millions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_ROUNDS = 3  # so that a median is none of the extremes
PRODUCT_SIDE = 2048  # of the square float32 matrices whose product is the machine's peak

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Turn:
    """One of those that take turns. `ready` is called before each turn and is not timed."""

    call: Callable[[], object]
    ready: Callable[[], object] = lambda: None
    cuda: bool = False  # the GPU is waited for before the clock is read


def interleaved(
    turns: Sequence[Turn],
    *,
    max_rounds: int,
    max_seconds: float,
    settle: bool = False,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Milliseconds of every call, a list for each turn.

    In a round each has its turn once. There are at least `MIN_ROUNDS`, at most `max_rounds`, and no new one begins
    once `max_seconds` have passed. `settle` puts a call that is not counted before the one that is: it finds the
    caches filled by another network and the cores taken by threads of another runtime that still wait for work.
    """
    times: list[list[float]] = [[] for _ in turns]
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - start > max_seconds:
            break
        for turn, row in zip(turns, times, strict=True):
            turn.ready()
            if settle:
                turn.call()
            row.append(_timed_ms(turn))
        if progress is not None:
            progress(done + 1, max_rounds)
    return times


def _timed_ms(turn: Turn) -> float:
    if turn.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    turn.call()
    if turn.cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


@dataclass(frozen=True)
class Spread:
    """The middle of some times and how far they reach; of fewer than a hundred, the 99th percentile is near the
    longest."""

    median_ms: float
    p90_ms: float
    p99_ms: float
    runs: int


def spread(times_ms: Sequence[float]) -> Spread:
    """Percentiles between the times, at least two of them, by linear interpolation."""
    cuts = statistics.quantiles(times_ms, n=100, method="inclusive")
    return Spread(statistics.median(times_ms), cuts[89], cuts[98], len(times_ms))


def product(device: torch.device, ready: Callable[[], object]) -> tuple[Turn, int]:
    """A large product of float32 matrices, which no network outruns by much, and its MACs."""
    side = PRODUCT_SIDE
    a, b = torch.randn(2, side, side, device=device)
    out = torch.empty(side, side, device=device)

    def call() -> Tensor:
        return torch.mm(a, b, out=out)

    return Turn(call, ready, device.type == "cuda"), side**3
