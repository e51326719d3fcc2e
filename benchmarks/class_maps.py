"""A class map by `SegFormer.classes` against the argmax of the logits: one process, in turns, and the maps compared.

    python -m benchmarks.class_maps [--variants b0 b2] [--rates 0 0.5] [--classes 150 19] [--shape 512 512] [--rounds 30]

Random weights with trained-like statistics, pruned by `L1Pruner` without repair, batch 1, on the CPU with PyTorch's
number of threads. Times are medians of rounds in which each way runs once; the ratio is of medians, and behind it lie
the quartiles of the ratios round by round, which tell whether the machine was quiet.
"""

from __future__ import annotations

import argparse
from statistics import median, quantiles
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.trained_like import fill
from segprune import L1Pruner, SegFormer
from segprune.cli.console import keep_freed_memory
from segprune.fold import fold_decoder
from segprune.spec import standard_spec


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["b0", "b2"])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--classes", type=int, nargs="+", default=[150, 19])
    parser.add_argument("--shape", type=int, nargs=2, default=[512, 512])
    parser.add_argument("--rounds", type=int, default=30)
    flags = parser.parse_args()

    keep_freed_memory()  # as the commands do
    height, width = flags.shape
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {height}×{width}")
    print("| network | classes | argmax of logits (ms) | classes (ms) | × faster | quartiles |")
    print("|---|---|---|---|---|---|")
    for variant in flags.variants:
        for num_classes in flags.classes:
            torch.manual_seed(0)
            network = fill(SegFormer(standard_spec(variant, num_classes))).eval()
            assert isinstance(network, SegFormer)
            for rate in flags.rates:
                _show_row(variant, _cut(network, rate), rate, flags)


def _cut(network: SegFormer, rate: float) -> SegFormer:
    """Returns the network folded, and pruned unless the rate is 0."""
    if rate == 0:
        return fold_decoder(network)
    pruned = L1Pruner(network, rate).prune(torch.zeros(1, 3, 64, 64))
    assert isinstance(pruned, SegFormer)
    return pruned.eval()


@torch.inference_mode()
def _show_row(variant: str, network: SegFormer, rate: float, flags: argparse.Namespace) -> None:
    x = torch.randn(1, 3, *flags.shape)

    def by_logits() -> Tensor:
        return network(x).argmax(1)

    def by_strips() -> Tensor:
        return network.classes(x)

    # A warm-up that also compares.
    assert torch.equal(by_logits(), by_strips())
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(flags.rounds):
        for way, row in zip((by_logits, by_strips), times, strict=True):
            start = perf_counter()
            way()
            row.append(1e3 * (perf_counter() - start))

    whole, strips = map(median, times)
    low, _, high = quantiles([a / b for a, b in zip(*times, strict=True)], n=4)
    print(
        f"| {variant}, {rate:g} removed | {network.spec.num_classes} | {whole:.0f} | {strips:.0f} "
        f"| {whole / strips:.2f} | {low:.2f}–{high:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
