"""All cases in turns, and the rows that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from segprune.benchmark.cases import Case
from segprune.benchmark.opened import Opened
from segprune.timing import (
    DTYPE_OF,
    Latency,
    Pass,
    Progress,
    matrix_product,
    summarise,
    time_passes,
)


@dataclass(frozen=True)
class Row:
    """What was measured of one case, and what follows from it.

    `macs` are of one image, `gmacs_per_second` of one second. `peak_share` is the share of what a product of large
    matrices reached under the same conditions, in turns with the rest. `faster` compares images per second with the
    first row's.
    """

    case: Case
    runtime: str  # with its version
    latency: Latency
    images_per_second: float
    macs: int | None
    gmacs_per_second: float | None
    peak_share: float | None
    faster: float


def measure(
    opened: Sequence[Opened],
    *,
    max_rounds: int,
    max_seconds: float,
    progress: Progress | None = None,
) -> tuple[list[Row], dict[int | str, float]]:
    """Returns a row for each, in order, and the machine's peaks in GMAC/s by `Case.condition`.

    All cases stay open at once. On a GPU the passes are replayed as CUDA graphs.
    """
    # All cases run in turns, so that heat and other programs slow all of them alike.
    device = torch.device(opened[0].case.device)
    passes = [Pass(one.run, one.get_ready) for one in opened]

    # What the machine can do, once for each number of threads or, on a GPU, for each precision.
    first_of = {one.case.condition: one for one in reversed(opened)}
    products = {
        condition: matrix_product(
            device, DTYPE_OF[one.case.dtype] if device.type == "cuda" else torch.float32
        )
        for condition, one in first_of.items()
    }
    # The products are passes like the rest, so the peak is measured in the same conditions.
    passes += [
        Pass(run, first_of[condition].get_ready) for condition, (run, _) in products.items()
    ]

    times = time_passes(
        passes,
        device,
        max_rounds=max_rounds,
        max_seconds=max_seconds,
        settle=True,
        progress=progress,
    )
    peaks = {
        condition: macs / median(row.times_ms) / 1e6  # per ms -> G per s
        for (condition, (_, macs)), row in zip(
            products.items(), times[len(opened) :], strict=True
        )
    }

    # The times of the products come last and were used for the peaks.
    rows: list[Row] = []
    for one, row in zip(opened, times, strict=False):
        case = one.case
        latency = summarise(
            row.times_ms,
            batch=case.batch,
            precision=case.dtype,
            threads=case.threads,
            device=device,
            eager_times_ms=row.eager_times_ms,
        )
        # Images per second from the median, which a few slow passes do not move.
        speed = case.batch / latency.median_ms * 1e3
        gmacs = None if one.macs is None else one.macs * speed / 1e9
        share = None if gmacs is None else gmacs / peaks[case.condition]
        faster = speed / rows[0].images_per_second if rows else 1.0
        rows.append(Row(case, one.name, latency, speed, one.macs, gmacs, share, faster))
    return rows, peaks
