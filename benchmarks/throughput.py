"""Images per second of training: the pruned network against the dense one, and our loop against a bare one.

    python -m benchmarks.throughput [--variants b0 b2] [--rate 0.5] [--size 128 128] [--batch 8] [--rounds 5] [--cuda]

Three runs take turns, in an order that is reversed from round to round: our loop with the dense network, our loop
with the same network folded and pruned, and a bare loop with the dense one: forward, upsampling, cross-entropy,
backward, AdamW, over batches that lie in memory. Our loop reads the same generated pictures in as many processes as
--num_workers says, augments them, and sets rates; scoring is left out. Ratios are of two runs of the same round:
their median, lowest and highest. Without --batch it is 8 for b0 and b1 and 2 for larger variants. On a machine that
others use too, --cpu_time counts the training process's processor time instead of the wall clock's; what waits for
pictures is then not seen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.trained_like import fill
from segprune import L1Pruner, SegFormer
from segprune.cli.console import keep_freed_memory
from segprune.data import IGNORE_INDEX, SegmentationData, TrainTransform, draw_shapes
from segprune.data.transforms import Bytes
from segprune.spec import standard_spec
from segprune.training.loop import train
from segprune.training.options import TrainOptions
from segprune.training.state import Splits

NUM_CLASSES, LR = 8, 1e-6
Clock = Callable[[], float]
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Drawn:
    """A generated picture in memory."""

    name: str
    image: Bytes
    labels: Bytes

    def load(self) -> tuple[Bytes, Bytes]:
        return self.image, self.labels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["b0", "b2"])
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--size", type=int, nargs=2, default=[128, 128])
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--cpu_time", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    flags = parser.parse_args()
    keep_freed_memory()  # as the commands do
    height, width = flags.size
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {height}×{width}")
    print("| network, batch | loop | images/s | ratio | median (lowest–highest) |")
    print("|---|---|---|---|---|")
    for variant in flags.variants:
        _variant(variant, flags.batch or (8 if variant in ("b0", "b1") else 2), flags)


def _variant(variant: str, batch: int, flags: argparse.Namespace) -> None:
    torch.manual_seed(0)
    dense = fill(SegFormer(standard_spec(variant, NUM_CLASSES)))
    assert isinstance(dense, SegFormer)
    pruned = L1Pruner(deepcopy(dense), flags.rate, repair=False).prune(
        torch.empty(1, 3, *flags.size, device="meta")
    )
    number = (flags.warmup + flags.steps) * batch
    pictures = [
        Drawn(f"{i}", *draw_shapes(11, "train", i, tuple(flags.size))) for i in range(number)
    ]
    config = TrainOptions(
        NUM_CLASSES,
        tuple(flags.size),
        epochs=1,
        batch_size=batch,
        lr=LR,
        num_workers=flags.num_workers,
        amp="no",
        tf32=False,
    )
    accelerator = Accelerator(cpu=not flags.cuda)
    batches = _batches(pictures, config, accelerator.device)
    clock = time.process_time if flags.cpu_time else time.perf_counter
    runs: dict[str, Callable[[], float]] = {
        "pruned": lambda: _ours(pruned, config, pictures, accelerator, flags.warmup, clock),
        "dense": lambda: _ours(dense, config, pictures, accelerator, flags.warmup, clock),
        "bare": lambda: _bare(dense.to(accelerator.device), batches, flags.warmup, clock),
    }
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(flags.rounds):
        for name in list(runs) if turn % 2 == 0 else reversed(runs):
            speeds[name].append(flags.steps * batch / runs[name]())
    for name, network, loop, what, other in (
        ("bare", "dense", "bare", "", ""),
        ("dense", "dense", "ours", "ours : bare", "bare"),
        ("pruned", f"pruned {flags.rate:g}", "ours", "pruned : dense", "dense"),
    ):
        ratios = (
            [a / b for a, b in zip(speeds[name], speeds[other], strict=True)] if other else []
        )
        spread = (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            if ratios
            else ""
        )
        cells = (
            f"{variant} {network}, {batch}",
            loop,
            f"{statistics.median(speeds[name]):.2f}",
            what,
            spread,
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def _batches(pictures: list[Drawn], config: TrainOptions, device: torch.device) -> Batches:
    """What our loop sees in the first epoch but for the order, made beforehand."""
    data = SegmentationData(
        pictures,
        NUM_CLASSES,
        TrainTransform(config.input_shape, scale=config.scale),
        config.seed,
    )
    starts = range(0, len(pictures), config.batch_size)
    items = [[data[i] for i in range(start, start + config.batch_size)] for start in starts]
    return [
        (
            torch.stack([x for x, _ in item]).to(device),
            torch.stack([y for _, y in item]).to(device),
        )
        for item in items
    ]


def _ours(
    model: nn.Module,
    config: TrainOptions,
    pictures: list[Drawn],
    accelerator: Accelerator,
    warmup: int,
    clock: Clock,
) -> float:
    """Seconds of the steps after the warm-up; the loop reads every step's loss, so the device is done by then."""
    ends: list[float] = []
    note = lambda done, total, loss, lr: ends.append(clock())  # noqa: E731
    train(model, config, Splits(pictures, pictures[:1]), accelerator=accelerator, on_step=note)
    return ends[-1] - ends[warmup - 1]


def _bare(model: nn.Module, batches: Batches, warmup: int, clock: Clock) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    model.train()
    loss, start = torch.zeros(()), 0.0
    for step, (pixels, labels) in enumerate(batches):
        if step == warmup:
            loss.item()  # waits for the device
            start = clock()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pixels), labels, ignore_index=IGNORE_INDEX)
        loss.backward()
        optimizer.step()
    loss.item()
    return clock() - start


if __name__ == "__main__":
    main()
