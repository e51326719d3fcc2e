"""A latency asked for, predicted and measured: the sum of single steps against the whole network, dense and pruned.

    python -m benchmarks.latency_budget [--variants b0 b2] [--shape 256 256] [--rates 0.3 0.5] [--cuda]

Random weights with trained-like statistics, 150 classes, batch 1, widths in multiples of 8; the table of steps is
measured anew. Rates are of the latency of the dense network, its decode head not folded; "off by" is of the latency
that should be left. "first plan" is what the table alone gives, "met" what `meet` ends with after so many tries; each
is measured in turns with the dense network.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import nn

from benchmarks.trained_like import fill
from segprune.cli.console import keep_freed_memory
from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.budget.costs import loss_weights
from segprune.pruning.budget.latency import LatencyCosts, LatencyTable, meet
from segprune.pruning.budget.rate import Limit, solve
from segprune.pruning.groups import find_groups
from segprune.pruning.importance import score_channels
from segprune.pruning.surgery import cut_channels, read_spec
from segprune.spec import standard_spec
from segprune.stats import layers
from segprune.timing import PRECISIONS, Latency, measure_latency

NUM_CLASSES = 150
PROTECTED = {"encoder.stages.0.patch_embed.proj", "decode_head.classifier"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["b0"])
    parser.add_argument("--shape", nargs=2, type=int, default=[256, 256])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--seconds", type=float, default=6.0, help="at most, per measurement")
    parser.add_argument("--cuda", action="store_true")
    flags = parser.parse_args()

    keep_freed_memory()  # as the commands do
    print(
        f"torch {torch.__version__}, {flags.precision}, {flags.shape[0]}×{flags.shape[1]}, batch 1"
    )
    for variant in flags.variants:
        _show_variant(variant, flags)


def _show_variant(variant: str, flags: argparse.Namespace) -> None:
    device, shape = (
        torch.device("cuda" if flags.cuda else "cpu"),
        (flags.shape[0], flags.shape[1]),
    )
    torch.manual_seed(0)
    dense = SegFormer(standard_spec(variant, NUM_CLASSES))
    fill(dense)
    folded = fold_decoder(dense).to(device).eval()

    def measure(*networks: nn.Module) -> list[Latency]:
        return measure_latency(
            networks,
            shape,
            device=device,
            precision=flags.precision,
            max_runs=100,
            max_seconds=flags.seconds,
        )

    # How well the sum of steps predicts whole networks.
    groups = find_groups(folded, torch.zeros(1, 3, 64, 64, device=device), PROTECTED).groups
    start = time.perf_counter()
    costs = LatencyCosts(folded.spec, groups, LatencyTable(device, flags.precision), shape)
    print(
        f"{variant}: {time.perf_counter() - start:.0f} s for the table, on {measure(folded)[0].device}"
    )

    predicted = [LatencyCosts(dense.spec, (), costs.table, shape), costs]
    measured = measure(dense, folded)
    for name, sums, latency in zip(("dense", "folded"), predicted, measured, strict=True):
        ms = sums.total(sums.full)
        off = ms / latency.median_ms - 1
        print(
            f"{name}: predicted {ms:.2f} ms, measured {latency.median_ms:.2f}, off by {off:+.1%}"
        )

    # How near a plan comes, from the table alone and corrected by measuring.
    dense_ms = costs.total(costs.full) * measured[0].median_ms / measured[1].median_ms
    scores = score_channels(folded, groups)
    weights = loss_weights(layers(folded.spec, shape), groups, "latency")

    def prune(target_ms: float) -> tuple[nn.Module, float]:
        limit = Limit(costs, 1.0 - target_ms / dense_ms, "latency", dense_ms)
        plan = solve([limit], groups, scores, weights)
        network = copy.deepcopy(folded)
        cut_channels(network, groups, plan)
        network.spec = read_spec(network)
        return network, (1.0 - plan.removed["latency"]) * dense_ms

    print(
        "| network | rate | first plan: rate measured | off by | met: rate measured | off by | tries |"
    )
    print("|---|---|---|---|---|---|---|")
    for rate in flags.rates:
        try:
            network, _ = prune((1.0 - rate) * dense_ms)
            before, after = measure(dense, network)
            first = after.median_ms / before.median_ms
            met = meet(
                1.0 - rate,
                dense,
                dense_ms,
                prune,
                shape,
                costs.table.place,
                max_seconds=flags.seconds,
            )
        except ValueError as error:
            print(f"| {variant} | {rate:g} | {error} |", flush=True)
            continue
        cells = [
            f"{1 - share:.3f} | {share / (1 - rate) - 1:+.1%}" for share in (first, met.share)
        ]
        print(f"| {variant} | {rate:g} | {' | '.join(cells)} | {met.tries} |", flush=True)


if __name__ == "__main__":
    main()
