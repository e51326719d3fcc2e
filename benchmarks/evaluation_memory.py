"""Whether the memory of an evaluation grows with the number of pictures: peak resident memory every 1,000 of 10,000.

    python -m benchmarks.evaluation_memory [--images 10000] [--num_workers 0]

A network of a few thousand parameters scores generated pictures of 64×64 that are drawn when they are asked for, each
of them another one. The peak is the system's figure for this process (Linux: ru_maxrss is in KiB); it never falls, so
flat means that nothing was added after the first rows.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import dataclass

import torch
from torch import nn

from segprune.data import CLASS_NAMES, draw_shapes
from segprune.data.transforms import Bytes
from segprune.inference.evaluate import EvalMode, evaluate

SIZE = (64, 64)


@dataclass(frozen=True)
class Drawn:
    """A sample without files."""

    number: int

    @property
    def name(self) -> str:
        return f"{self.number}"

    def load(self) -> tuple[Bytes, Bytes]:
        return draw_shapes(11, "val", self.number, SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--num_workers", type=int, default=0)
    flags = parser.parse_args()
    torch.manual_seed(11)
    k = len(CLASS_NAMES)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, k, 3, padding=1)
    )
    start, shown = time.perf_counter(), 0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if done // 1000 > shown or done == total:
            shown = done // 1000
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"| {done} | {peak:.1f} | {time.perf_counter() - start:.0f} |", flush=True)

    print("| pictures | peak memory (MiB) | seconds |")
    print("|---|---|---|")
    how = EvalMode(input_shape=SIZE, boundary=True)
    samples = [Drawn(number) for number in range(flags.images)]
    evaluate(model, samples, k, how, num_workers=flags.num_workers, progress=progress)


if __name__ == "__main__":
    main()
