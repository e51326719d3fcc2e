"""Results as plain data: the records that commands save as JSON.

Units: parameters and MACs are counts for one image, FLOPs are two MACs, `_M` and `_G` are millions and thousands
of millions, latency is in ms, percentages are of the network as loaded, mIoU and IoU lie in [0, 1].
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch

import segprune
from segprune.benchmark import Row
from segprune.inference.evaluate import Score
from segprune.stats import Counts
from segprune.timing import Latency


def network_size(counts: Counts) -> dict[str, Any]:
    return {
        "parameters": counts.parameters,
        "parameters_M": round(counts.parameters / 1e6, 6),
        "macs": counts.macs,
        "macs_G": round(counts.macs / 1e9, 6),
        "flops": counts.flops,
        "flops_G": round(counts.flops / 1e9, 6),
    }


def network_record(
    counts: Counts, latency: Latency | None = None, score: Score | None = None
) -> dict[str, Any]:
    """Returns the size, and what was measured of time and quality."""
    record = network_size(counts)
    if latency is not None:
        record["latency_ms"] = latency.median_ms
        record["latency"] = asdict(latency)
    if score is not None:
        record |= score_record(score)
    return record


def benchmark_record(row: Row, peak_memory: int | None, miou: float | None) -> dict[str, Any]:
    """Returns a row of a benchmark, flat; None for what is not known or was not measured."""
    # Each key names its unit, hence the divisions: bytes to MB, MACs to G.
    case = row.case

    return {
        "file": case.path,
        "runtime": row.runtime,
        "dtype": case.dtype,
        "output": case.output,
        "input_shape": list(case.size),
        "fold": case.fold,
        **asdict(row.latency),
        "images_per_second": row.images_per_second,
        "faster": row.faster,
        "peak_memory_mb": None if peak_memory is None else peak_memory / 1e6,
        "macs_G": None if row.macs is None else row.macs / 1e9,
        "gmacs_per_second": row.gmacs_per_second,
        "peak_share": row.peak_share,
        "miou": miou,
    }


def score_record(score: Score) -> dict[str, Any]:
    """Returns all of a score but the confusion matrix, which has a file of its own, and what was not measured."""
    values = {
        name: value
        for name, value in vars(score).items()
        if name != "confusion" and value is not None
    }
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def score_from_record(record: Mapping[str, Any]) -> Score:
    """Returns the score in a record, whatever else that holds; without the confusion matrix."""
    values: dict[str, Any] = {}
    for field in fields(Score):
        # JSON made lists of the score's tuples.
        if field.name in record:
            value = record[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return Score(**values)


def reduction_record(original: Counts, folded: Counts, pruned: Counts) -> dict[str, float]:
    """Returns what was saved, in per cent of the original, and how much of it folding saved."""

    def percent(before: int, after: int, whole: int) -> float:
        return round(100.0 * (before - after) / whole, 4)

    # All are shares of the original network, so folding and pruning add up to the whole.
    return {
        "parameters_reduction_percent": percent(
            original.parameters, pruned.parameters, original.parameters
        ),
        "flops_reduction_percent": percent(original.flops, pruned.flops, original.flops),
        "parameters_by_folding_percent": percent(
            original.parameters, folded.parameters, original.parameters
        ),
        "parameters_by_pruning_percent": percent(
            folded.parameters, pruned.parameters, original.parameters
        ),
        "flops_by_folding_percent": percent(original.flops, folded.flops, original.flops),
        "flops_by_pruning_percent": percent(folded.flops, pruned.flops, original.flops),
    }


def environment() -> dict[str, str]:
    return {
        "segprune": segprune.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
