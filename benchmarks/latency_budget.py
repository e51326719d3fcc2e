"""A latency asked for, predicted and measured: the sum of single steps against the whole network, dense and pruned.

    python -m benchmarks.latency_budget [--variants b0 b2] [--shape 256 256] [--rates 0.3 0.5] [--cuda]

Random weights with trained-like statistics, 150 classes, batch 1, widths in multiples of 8; the table of steps is
measured anew. Rates are of the latency of the dense network, its decode head not folded; "off by" is of the latency
that should stay. "first plan" is what the table alone gives, "met" what `meet` ends with after so many rounds; each is
measured in turn with the dense network.
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
from segprune.pruning.costs import loss_weights
from segprune.pruning.groups import find_groups
from segprune.pruning.importance import l1_scores
from segprune.pruning.latency import LatencyCosts, LatencyTable, meet
from segprune.pruning.plan import Limit, solve
from segprune.pruning.surgery import cut, read_spec
from segprune.spec import standard_spec
from segprune.stats import layers
from segprune.timing import measure_latency

NUM_CLASSES = 150
PROTECTED = {"encoder.stages.0.patch_embed.proj", "decode_head.classifier"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["b0"])
    parser.add_argument("--shape", nargs=2, type=int, default=[256, 256])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--seconds", type=float, default=6.0, help="at most, per measurement")
    parser.add_argument("--cuda", action="store_true")
    flags = parser.parse_args()
    keep_freed_memory()  # as the commands do
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {flags.shape[0]}×{flags.shape[1]}, batch 1")
    for variant in flags.variants:
        _variant(variant, flags)


def _variant(variant: str, flags: argparse.Namespace) -> None:
    device, shape = torch.device("cuda" if flags.cuda else "cpu"), tuple(flags.shape)
    torch.manual_seed(0)
    dense = SegFormer(standard_spec(variant, NUM_CLASSES))
    fill(dense)
    folded = fold_decoder(dense).to(device).eval()
    groups = find_groups(folded, torch.zeros(1, 3, 64, 64, device=device), PROTECTED).groups
    start = time.perf_counter()
    costs = LatencyCosts(folded.spec, groups, LatencyTable(device), shape)
    print(f"{variant}: {time.perf_counter() - start:.0f} s for the table")
    predicted = [LatencyCosts(dense.spec, (), costs.table, shape), costs]
    measured = measure_latency([dense, folded], shape, device=device, max_runs=100, max_seconds=flags.seconds)
    for name, sums, latency in zip(("dense", "folded"), predicted, measured, strict=True):
        ms = sums.total(sums.full)
        print(
            f"{name}: predicted {ms:.1f} ms, measured {latency.median_ms:.1f}, off by {ms / latency.median_ms - 1:+.1%}"
        )
    dense_ms = costs.total(costs.full) * measured[0].median_ms / measured[1].median_ms
    scores = l1_scores(folded, groups)

    weights = loss_weights(layers(folded.spec, shape), groups, "latency")

    def prune(target_ms: float) -> tuple[nn.Module, float]:
        limit = Limit(costs, 1.0 - target_ms / dense_ms, "latency", dense_ms)
        plan = solve([limit], groups, scores, weights)
        network = copy.deepcopy(folded)
        cut(network, groups, plan)
        network.spec = read_spec(network)
        return network, (1.0 - plan.removed["latency"]) * dense_ms

    print("| network | rate | first plan: rate measured | off by | met: rate measured | off by | rounds |")
    print("|---|---|---|---|---|---|---|")
    for rate in flags.rates:
        try:
            network, _ = prune((1.0 - rate) * dense_ms)
            both = measure_latency([dense, network], shape, device=device, max_runs=100, max_seconds=flags.seconds)
            share = both[1].median_ms / both[0].median_ms
            met = meet(1.0 - rate, dense, dense_ms, prune, shape, device=device, max_seconds=flags.seconds)
            cells = [(share, ""), (met.share, f" | {met.rounds}")]
            row = " | ".join(f"{1 - s:.3f} | {s / (1 - rate) - 1:+.1%}{end}" for s, end in cells)
        except ValueError as error:
            row = str(error)
        print(f"| {variant} | {rate:g} | {row} |", flush=True)


if __name__ == "__main__":
    main()
