"""mIoU right after pruning, and after a short equal fine-tune: segprune beside torch-pruning, at equal size and work.

    python -m benchmarks.one_shot DIR [--with_context] [--seeds 1 2 3] [--budgets params=0.5 macs=0.9]

For each seed DIR holds a data set and a dense b0, made where they are missing (2000 + 200 pictures of 64×64; see
benchmarks.recovery). Criteria that need pictures, and the repair, see the same 64 training pictures; only
torch-pruning's Taylor also sees their labels. All networks are fine-tuned alike, on labels, for 10 % of the dense
network's steps, and scored after the last of them; with --teacher as the commands do and advise it, also for
torch-pruning's: from labels and the dense network, at a tenth of its learning rate, or at all of it where more than a
tenth of the mIoU was lost. At equal MACs torch-pruning gets the network with the decode head folded, since folding is
ours.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.baselines import Baseline, num_macs, num_parameters, prune_to
from benchmarks.recovery import DENSE, NUM_TRAIN, SIZE, Bench, spread
from segprune.cli.console import keep_freed_memory
from segprune.data import EvalTransform, SegmentationData
from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.pruner import Pruner
from segprune.training.loop import train
from segprune.training.rates import MUCH_LOST
from segprune.training.state import Splits

NUM_IMAGES, EPOCHS, LR = (
    64,
    4,
    1.0,
)  # epochs over a part of the pictures; the rate as a share of the dense one's
BUDGETS = ("params=0.3", "params=0.5", "params=0.7", "macs=0.9")
THEIRS = get_args(Baseline)
OURS: dict[str, dict[str, Any]] = {
    "l1, no data": {"repair": False},
    "random + repair": {"pruning_method": "random"},
    "l1 + repair": {},
    "wanda + repair": {"pruning_method": "wanda"},
    "taylor + repair": {"pruning_method": "taylor"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--with_context", action="store_true", help="on pictures that need their context"
    )
    parser.add_argument("--teacher", action="store_true", help="fine-tune as the commands do")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument(
        "--methods", nargs="+", default=[*THEIRS, *OURS], help="as the table names them"
    )
    flags = parser.parse_args()
    keep_freed_memory()  # as the commands do
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for seed in flags.seeds:
        bench = Bench(flags.folder / str(seed), seed, accelerator, context=flags.with_context)
        for budget in flags.budgets:
            for name, prune in methods(bench, budget).items():
                if name.partition(" ")[2] not in flags.methods:
                    continue
                key = f"one-shot {budget} {name}" + (" with a teacher" if flags.teacher else "")
                found = bench.cached(
                    key, partial(_measured, bench, prune, taught=flags.teacher)
                )
                shares = [miou / bench.dense_miou for miou in found[:2]]
                rows.setdefault((budget, name), []).append((*shares, *found[2:]))
                print(
                    f"seed {seed}, {budget}, {name}: dense {bench.dense_miou:.4f}, {found}",
                    flush=True,
                )
    print(
        f"\nShare of the dense mIoU (%), means over seeds {flags.seeds} (lowest and highest):\n"
    )
    print("| budget | network | pruned | fine-tuned | params removed | MACs removed |")
    print("|---|---|---|---|---|---|")
    for (budget, name), values in rows.items():
        columns = [[100 * v for v in column] for column in zip(*values, strict=True)]
        cells = " | ".join(spread(column, ".1f") for column in columns)
        print(f"| {budget} | {name} | {cells} |")


def methods(bench: Bench, budget: str) -> dict[str, Callable[[], nn.Module]]:
    """By name, what prunes the bench's dense network to the budget."""
    word, _, share = budget.partition("=")
    unit: Literal["params", "macs"] = "params" if word == "params" else "macs"
    rate, x = float(share), torch.randn(1, 3, *SIZE)
    batches = _training_batches(bench)
    images = [batch[0] for batch in batches]
    dense = bench.dense
    start = dense if unit == "params" else fold_decoder(dense)
    whole = num_parameters(dense) if unit == "params" else num_macs(dense, x)
    found: dict[str, Callable[[], nn.Module]] = {
        f"torch-pruning {name}": partial(
            prune_to, start, rate, x, of=unit, whole=whole, baseline=name, batches=batches
        )
        for name in THEIRS
    }
    for name, options in OURS.items():
        found[f"segprune {name}"] = partial(
            lambda options: Pruner(dense, rate, rate_of=unit, images=images, **options).prune(
                x
            ),
            options,
        )
    return found


def training_images(bench: Bench) -> list[Tensor]:
    """64 of them, in batches B 3 H W."""
    return [batch[0] for batch in _training_batches(bench)]


def _training_batches(bench: Bench) -> list[tuple[Tensor, Tensor]]:
    chosen = [bench.splits.train[i * NUM_TRAIN // NUM_IMAGES] for i in range(NUM_IMAGES)]
    data = SegmentationData(chosen, bench.num_classes, EvalTransform(SIZE))
    pairs = [data[i] for i in range(NUM_IMAGES)]
    images, labels = (torch.stack(column) for column in zip(*pairs, strict=True))
    return list(zip(images.split(8), labels.split(8), strict=True))


def _measured(bench: Bench, prune: Callable[[], nn.Module], *, taught: bool) -> list[float]:
    """mIoU pruned and fine-tuned, and the shares of parameters and MACs that went."""
    torch.manual_seed(bench.seed)
    model, x = prune(), torch.randn(1, 3, *SIZE)
    params = 1 - num_parameters(model) / num_parameters(bench.dense)
    macs = 1 - num_macs(model, x) / num_macs(bench.dense, x)
    before = bench.score(model)
    tuned = copy.deepcopy(model)
    steps = round(0.1 * DENSE.epochs * (NUM_TRAIN // DENSE.batch_size) / EPOCHS)
    part = Splits(bench.splits.train[: steps * DENSE.batch_size], bench.splits.val)
    if taught:
        _tell_widths(tuned)
        lr = LR * (0.1 if before >= MUCH_LOST * bench.dense_miou else 1.0)
        config, teacher = bench.config(EPOCHS, lr), fold_decoder(bench.dense)
    else:
        config, teacher = bench.config(EPOCHS, LR), None
    train(tuned, config, part, accelerator=bench.accelerator, teacher=teacher)
    return [before, bench.score(tuned), params, macs]


def _tell_widths(model: nn.Module) -> None:
    """torch-pruning knows no spec, which distillation reads the stages' widths off."""
    assert isinstance(model, SegFormer)
    parameters = dict(model.named_parameters())
    widths = tuple(
        replace(spec, width=parameters[f"encoder.stages.{index}.norm.weight"].numel())
        for index, spec in enumerate(model.spec.stages)
    )
    model.spec = replace(model.spec, stages=widths)


if __name__ == "__main__":
    main()
