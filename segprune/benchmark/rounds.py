"""All cases in turns, and the rows that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from segprune.benchmark.cases import Case
from segprune.benchmark.opened import Opened
from segprune.timing import Progress, Spread, Turn, interleaved, product, spread


@dataclass(frozen=True)
class Row:
    """`macs` and `gmacs` are of one image and of one second; `peak_share` is the share of what a product of large
    float32 matrices reached with the same threads, in turns with the rest. `faster` compares images per second with
    the first row's."""

    case: Case
    runtime: str  # with its version
    latency: Spread
    images_per_second: float
    macs: int | None
    gmacs_per_second: float | None
    peak_share: float | None
    faster: float


def measure(
    opened: Sequence[Opened], *, max_rounds: int, max_seconds: float, progress: Progress | None = None
) -> tuple[list[Row], dict[int, float]]:
    """A row for each, in order, and the machine's GMAC/s by threads. All of them stay open at once."""
    device = torch.device(opened[0].case.device)
    threads = sorted({one.case.threads for one in opened})
    products = [product(device, partial(torch.set_num_threads, number)) for number in threads]
    turns = [Turn(one.run, one.ready, device.type == "cuda") for one in opened] + [turn for turn, _ in products]
    times = interleaved(turns, max_rounds=max_rounds, max_seconds=max_seconds, settle=True, progress=progress)
    peaks = {
        number: macs / median(row) / 1e6  # per ms -> G per s
        for number, (_, macs), row in zip(threads, products, times[len(opened) :], strict=True)
    }
    spreads = [spread(row) for row in times[: len(opened)]]
    speeds = [one.case.batch / s.median_ms * 1e3 for one, s in zip(opened, spreads, strict=True)]
    rows = []
    for one, s, speed in zip(opened, spreads, speeds, strict=True):
        gmacs = None if one.macs is None else one.macs * speed / 1e9
        share = None if gmacs is None else gmacs / peaks[one.case.threads]
        rows.append(Row(one.case, one.name, s, speed, one.macs, gmacs, share, speed / speeds[0]))
    return rows, peaks
