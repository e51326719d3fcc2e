"""Is a network pruned down better than one that is small from the start? b1 cut to b0's size, beside b0, equal steps.

    python -m benchmarks.native DIR [--with_context] [--seeds 1 2 3]

For each seed a b0 and a b1 are trained from scratch on the data set of benchmarks.recovery in DIR: the b0 for eight
epochs, the b1 for six, after which it is cut to the parameters and MACs of the b0 with its decode head folded,
repaired with 64 training pictures, and fine-tuned for the other two with the dense b1 as the teacher.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

import segprune
from benchmarks.one_shot import training_images
from benchmarks.recovery import DENSE, SIZE, Bench, spread
from segprune import count
from segprune.cli.console import keep_freed_memory
from segprune.fold import fold_decoder
from segprune.pruning.pruner import Pruner
from segprune.training.loop import train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--with_context", action="store_true", help="on pictures that need their context"
    )
    parser.add_argument("--epochs", type=int, default=2, help="of the eight, for fine-tuning")
    parser.add_argument(
        "--lr",
        type=float,
        default=1.0,
        help="of fine-tuning, as a share of the dense network's",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    flags = parser.parse_args()
    keep_freed_memory()  # as the commands do
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    rows = []
    for seed in flags.seeds:
        bench = Bench(flags.folder / str(seed), seed, accelerator, context=flags.with_context)
        rows.append((bench.dense_miou, *_pruned_down(bench, flags.epochs, flags.lr)))
        print(
            f"seed {seed}: native b0 {rows[-1][0]:.4f}, dense b1, cut, fine-tuned {rows[-1][1:]}",
            flush=True,
        )
    print("\n| | mIoU, mean (lowest and highest) |\n|---|---|")
    names = ("b0, native", "b1, dense", "b1 cut to b0's size and repaired", "fine-tuned")
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        print(f"| {name} | {spread(column, '.4f')} |")


def _pruned_down(bench: Bench, epochs: int, lr: float) -> list[float]:
    path = bench.folder / f"b1_{DENSE.epochs - epochs}.pth"
    if not path.is_file():
        torch.manual_seed(bench.seed)
        model = bench.new("b1")
        config = replace(bench.dense_config, epochs=DENSE.epochs - epochs)
        train(model, config, bench.splits, accelerator=bench.accelerator)
        segprune.save(model, path)
    dense = segprune.load(path)
    small, large = (count(spec, SIZE) for spec in (fold_decoder(bench.dense).spec, dense.spec))
    budgets = {
        "params": 1 - small.parameters / large.parameters,
        "macs": 1 - small.macs / large.macs,
    }
    pruned = Pruner(dense, budgets, images=training_images(bench)).prune(
        torch.empty(1, 3, *SIZE)
    )
    found = [bench.score(dense), bench.score(pruned)]
    config = bench.config(epochs, lr)
    train(
        pruned, config, bench.splits, accelerator=bench.accelerator, teacher=fold_decoder(dense)
    )
    return [*found, bench.score(pruned)]


if __name__ == "__main__":
    main()
