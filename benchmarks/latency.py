"""What folding saves and what pruning saves: MACs and latency, side by side in one run.

    python -m benchmarks.latency [--variants b0 b2] [--rate 0.5] [--cuda]

Random weights with trained-like statistics, 512×512, 150 classes, batch 1. Latency is the median of rounds in which
each network runs once; the ratio is of medians.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.trained_like import fill
from segprune import L1Pruner, SegFormer, count
from segprune.fold import fold_decoder
from segprune.spec import standard_spec
from segprune.stats import measure_latency

SHAPE, NUM_CLASSES = (512, 512), 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["b0", "b2"])
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, per variant")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cuda", action="store_true")
    flags = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {SHAPE[0]}×{SHAPE[1]}, batch {flags.batch}")
    print("| network | params (M) | MACs (G) | latency (ms), quartiles | × faster | logits off by |")
    print("|---|---|---|---|---|---|")
    for variant in flags.variants:
        _variant(variant, flags)


def _variant(variant: str, flags: argparse.Namespace) -> None:
    torch.manual_seed(0)
    dense = fill(SegFormer(standard_spec(variant, NUM_CLASSES))).eval()
    assert isinstance(dense, SegFormer)
    folded = fold_decoder(dense)
    x = torch.randn(1, 3, *SHAPE)
    pruned = L1Pruner(dense, flags.rate).prune(x)
    with torch.inference_mode():
        off = float((folded(x) - dense(x)).abs().max() / dense(x).abs().max())
    networks = {"dense": dense, "folded": folded, f"folded, pruned {flags.rate:g}": pruned}
    latencies = measure_latency(
        list(networks.values()),
        SHAPE,
        device="cuda" if flags.cuda else "cpu",
        batch=flags.batch,
        max_runs=100,
        max_seconds=flags.seconds,
    )
    for (name, network), latency in zip(networks.items(), latencies, strict=True):
        assert isinstance(network, SegFormer)
        counts = count(network.spec, SHAPE)
        time = f"{latency.median_ms:.1f} ({latency.low_ms:.1f}–{latency.high_ms:.1f})"
        error = f"{off:.1e}" if network is folded else ""
        faster = latencies[0].median_ms / latency.median_ms
        print(
            f"| {variant} {name} | {counts.parameters / 1e6:.2f} | {counts.macs / 1e9:.2f} | {time} "
            f"| {faster:.2f} | {error} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
