"""A latency asked for, predicted and measured: the sum of single steps against the whole network, dense and pruned.

    python -m benchmarks.latency_budget [--variants b0 b2] [--shape 256 256] [--rates 0.3 0.5] [--cuda]

Random weights with trained-like statistics, 150 classes, batch 1, widths in multiples of 8; the table of steps is
measured anew. Rates are of the latency of the dense network, its decode head not folded. "first plan" is what the
table alone gives, corrected by what it is off for the folded dense network; "met" is what `meet` ends with after as
many rounds, each measured in turn with the dense network.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import nn

from benchmarks.trained_like import fill
from segprune.cli.common import keep_freed_memory
from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.groups import find_groups
from segprune.pruning.importance import l1_scores
from segprune.pruning.latency import LatencyCosts, LatencyTable, meet
from segprune.pruning.plan import solve
from segprune.pruning.surgery import cut, read_spec
from segprune.spec import standard_spec
from segprune.stats import measure_latency

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
    whole = LatencyCosts(dense.spec, (), costs.table, shape)
    measured = measure_latency([dense, folded], shape, device=device, max_seconds=flags.seconds)
    for name, predicted, latency in (("dense", whole, measured[0]), ("folded", costs, measured[1])):
        ms = predicted.total(predicted.full)
        print(
            f"{name}: predicted {ms:.1f} ms, measured {latency.median_ms:.1f}, off by {ms / latency.median_ms - 1:+.1%}"
        )
    ratio = measured[1].median_ms / costs.total(costs.full)
    scores = l1_scores(folded, groups)

    def prune(target_ms: float) -> tuple[nn.Module, float]:
        plan = solve(costs, scores, 1.0 - target_ms / costs.total(costs.full))
        network = copy.deepcopy(folded)
        cut(network, groups, plan)
        network.spec = read_spec(network)
        return network, (1.0 - plan.removed) * costs.total(costs.full)

    print("| network | rate | first plan: predicted (ms) | measured | off by | met: rate | off by | rounds |")
    print("|---|---|---|---|---|---|---|---|")
    for rate in flags.rates:
        try:
            network, ms = prune((1.0 - rate) * measured[0].median_ms / ratio)
            (_, first) = measure_latency([dense, network], shape, device=device, max_seconds=flags.seconds)
            ms *= ratio
            row = f"{ms:.1f} | {first.median_ms:.1f} | {ms / first.median_ms - 1:+.1%}"
            met = meet(1.0 - rate, dense, prune, shape, device=device, ratio=ratio, max_seconds=flags.seconds)
            row += f" | {1.0 - met.share:.3f} | {met.share / (1.0 - rate) - 1.0:+.1%} | {met.rounds}"
        except ValueError as error:
            row = str(error)
        print(f"| {variant} | {rate:g} | {row} |", flush=True)


if __name__ == "__main__":
    main()
