"""What pruning brings on a GPU: latency dense, folded and pruned, called from Python and replayed as a CUDA graph.

    python -m benchmarks.gpu [--out gpu.json]     # about 100 s on an H100; needs torch, torch-pruning and safetensors
    python -m benchmarks.gpu --cpu                # the form of it, on small images without a GPU

Random weights with trained-like statistics, 512×512, 150 classes, up to logits of the input's size. A cell is the
median of rounds in which dense, folded and pruned take turns; ratios are over the dense network of the same column.
"fp32" computes products exactly, "tf32" rounds their factors, in "fp16" weights and images are cast.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.trained_like import fill
from segprune import L1Pruner, SegFormer, count
from segprune.fold import fold_decoder
from segprune.spec import standard_spec
from segprune.timing import Latency, Precision, measure_latency

RATE = 0.5
NUM_CLASSES = 150
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "fp16")
CPU_PRECISIONS: tuple[Precision, ...] = ("fp32",)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["b0", "b2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--shape", nargs=2, type=int, default=[512, 512])
    parser.add_argument(
        "--seconds", type=float, default=2.5, help="at most, for one precision of one batch"
    )
    parser.add_argument("--out", default="", help="a JSON file with every number")
    parser.add_argument("--cpu", action="store_true")
    flags = parser.parse_args()

    start = time.perf_counter()
    device = torch.device("cpu" if flags.cpu else "cuda")
    if flags.cpu:
        flags.variants, flags.batches, flags.shape, flags.seconds = (
            ["b0"],
            [1, 2],
            [64, 64],
            0.0,
        )
    height, width = flags.shape
    name = "CPU" if flags.cpu else torch.cuda.get_device_name(device)
    print(
        f"{name}, torch {torch.__version__}, {height}×{width}, {NUM_CLASSES} classes, milliseconds a batch\n"
    )

    records: list[dict[str, Any]] = []
    for variant in flags.variants:
        networks = _networks(variant, (height, width))
        for batch in flags.batches:
            records += _measure(variant, networks, batch, device, flags)

    _show(records)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if flags.out:
        settings = vars(flags) | {"device": name, "torch": str(torch.__version__), "rate": RATE}
        text = json.dumps({"settings": settings, "rows": records}, indent=1)
        Path(flags.out).write_text(text + "\n", encoding="utf-8")
        print(f"Saved: {flags.out}")


def _networks(variant: str, shape: tuple[int, int]) -> dict[str, SegFormer]:
    torch.manual_seed(0)
    dense = fill(SegFormer(standard_spec(variant, NUM_CLASSES))).eval()
    assert isinstance(dense, SegFormer)
    pruned = L1Pruner(dense, RATE, repair=False).prune(torch.empty(1, 3, *shape, device="meta"))
    assert isinstance(pruned, SegFormer)
    return {"dense": dense, "folded": fold_decoder(dense), f"pruned {RATE:g}": pruned}


def _measure(
    variant: str,
    networks: dict[str, SegFormer],
    batch: int,
    device: torch.device,
    flags: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A record of each network at this batch, with its latency in every precision."""
    shape = (flags.shape[0], flags.shape[1])
    by_precision: dict[str, list[Latency]] = {
        precision: measure_latency(
            list(networks.values()),
            shape,
            device=device,
            precision=precision,
            batch=batch,
            max_runs=50,
            max_seconds=flags.seconds,
        )
        for precision in (CPU_PRECISIONS if flags.cpu else PRECISIONS)
    }

    records = []
    for i, (name, network) in enumerate(networks.items()):
        counts = count(network.spec, shape)
        records.append(
            {
                "variant": variant,
                "network": name,
                "batch": batch,
                "parameters": counts.parameters,
                "macs": counts.macs,
                "latency": {
                    precision: asdict(latencies[i])
                    for precision, latencies in by_precision.items()
                },
            }
        )
    return records


def _show(records: list[dict[str, Any]]) -> None:
    columns = []
    for precision in records[0]["latency"]:
        columns += [f"{precision} eager", f"{precision} graph"]
    print(f"| network, batch | params (M) | MACs (G) | {' | '.join(columns)} |")
    print("|" + "---|" * (3 + len(columns)))

    for record in records:
        dense = next(
            other
            for other in records
            if (other["variant"], other["batch"]) == (record["variant"], record["batch"])
        )
        cells = []
        for precision, latency in record["latency"].items():
            whole = dense["latency"][precision]
            if latency["method"] == "cuda graph":
                cells += [
                    _cell(latency["eager_ms"], whole["eager_ms"]),
                    _cell(latency["median_ms"], whole["median_ms"]),
                ]
            else:
                cells += [_cell(latency["median_ms"], whole["median_ms"]), "–"]
        print(
            f"| {record['variant']} {record['network']}, {record['batch']} | {record['parameters'] / 1e6:.2f} "
            f"| {record['macs'] / 1e9:.2f} | {' | '.join(cells)} |"
        )


def _cell(ms: float, dense_ms: float) -> str:
    faster = "" if ms == dense_ms else f" ({dense_ms / ms:.2f} ×)"
    return f"{ms:.2f}{faster}"


if __name__ == "__main__":
    main()
