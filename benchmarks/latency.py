"""What folding saves and what pruning saves: MACs and latency, side by side in one run.

    python -m benchmarks.latency [--variants b0 b2] [--rate 0.5] [--rate_of params] [--keep_decoder] [--cuda]

Random weights with trained-like statistics, 512×512, 150 classes, batch 1. Latency is the median of rounds in which
each network runs once, on a GPU replayed as a CUDA graph; ratios are of medians. The first row is the dense network in
transformers' own code, its logits upsampled like ours; its parameters and MACs are those of the second. "per MAC" is
how many times faster over how many times fewer MACs: 1 where time falls as MACs do.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SegformerForSemanticSegmentation

from benchmarks.trained_like import fill
from segprune import L1Pruner, SegFormer, count
from segprune.cli.console import keep_freed_memory
from segprune.fold import fold_decoder
from segprune.spec import standard_spec
from segprune.timing import PRECISIONS, measure_latency
from tests.dialects import hf_config

SHAPE, NUM_CLASSES = (512, 512), 150


class Transformers(nn.Module):
    """Dense, as a Hugging Face user runs it, up to logits of the input's size."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.network = SegformerForSemanticSegmentation(hf_config(variant, NUM_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(
            self.network(x).logits, size=x.shape[2:], mode="bilinear", align_corners=False
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["b0", "b2"])
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--rate_of", default="params", choices=["params", "macs"])
    parser.add_argument(
        "--keep_decoder", action="store_true", help="prune the decode head as published"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, per variant")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--cuda", action="store_true")
    flags = parser.parse_args()

    keep_freed_memory()  # as the commands do
    where = "on the GPU" if flags.cuda else f"{torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, {where}, {flags.precision}, {SHAPE[0]}×{SHAPE[1]}, batch {flags.batch}"
    )
    print(
        "| network | params (M) | MACs (G) | latency (ms), quartiles | × faster than dense | per MAC | logits off by |"
    )
    print("|---|---|---|---|---|---|---|")
    for variant in flags.variants:
        _show_variant(variant, flags)


def _show_variant(variant: str, flags: argparse.Namespace) -> None:
    torch.manual_seed(0)
    dense = fill(SegFormer(standard_spec(variant, NUM_CLASSES))).eval()
    assert isinstance(dense, SegFormer)
    folded = fold_decoder(dense)
    x = torch.randn(1, 3, *SHAPE)
    pruned = L1Pruner(
        dense,
        flags.rate,
        rate_of=flags.rate_of,
        keep_decoder=flags.keep_decoder,
        repair=False,
    ).prune(x)
    with torch.inference_mode():
        off = float((folded(x) - dense(x)).abs().max() / dense(x).abs().max())

    networks: dict[str, nn.Module] = {
        "dense, transformers": Transformers(variant),
        "dense": dense,
        "decode head folded": folded,
        f"pruned {flags.rate:g}{'' if flags.rate_of == 'params' else ' of the MACs'}": pruned,
    }
    latencies = measure_latency(
        list(networks.values()),
        SHAPE,
        device="cuda" if flags.cuda else "cpu",
        precision=flags.precision,
        batch=flags.batch,
        max_runs=100,
        max_seconds=flags.seconds,
    )

    whole = count(dense.spec, SHAPE).macs
    digits = 2 if flags.cuda else 0
    for (name, network), latency in zip(networks.items(), latencies, strict=True):
        counts = count(network.spec if isinstance(network, SegFormer) else dense.spec, SHAPE)
        low, median, high = (
            f"{ms:.{digits}f}" for ms in (latency.low_ms, latency.median_ms, latency.high_ms)
        )
        error = f"{off:.1e}" if network is folded else ""
        faster = latencies[1].median_ms / latency.median_ms
        print(
            f"| {variant} {name} | {counts.parameters / 1e6:.2f} | {counts.macs / 1e9:.2f} | {median} ({low}–{high}) "
            f"| {faster:.2f} | {faster * counts.macs / whole:.2f} | {error} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
