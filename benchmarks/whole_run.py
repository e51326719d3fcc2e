"""The whole prune_train.py on b5 at 512×512, without data, beside torch-pruning's BasePruner (build and step).

    python -m benchmarks.whole_run [--rounds 3] [--phi b5]

Each is a process of its own, started in turn; wall time and peak memory are the system's figures for it. Ours reads
no file, prunes, measures latency, writes the checkpoint and the results; theirs builds the network, builds the
pruner and takes one step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THEIRS = """
import torch
from benchmarks.baselines import prune_channels
from segprune import SegFormer
from segprune.spec import standard_spec
torch.manual_seed(11)
prune_channels(SegFormer(standard_spec("{phi}", 8)).eval(), 0.3, torch.randn(1, 3, 512, 512))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--phi", default="b5")
    flags = parser.parse_args()
    rows: dict[str, list[tuple[float, float]]] = {"prune_train.py": [], "torch-pruning": []}
    for _ in range(flags.rounds):
        with tempfile.TemporaryDirectory() as folder:
            ours = [
                "prune_train.py",
                "--phi",
                flags.phi,
                "--input_shape",
                "512",
                "512",
                "--save_dir",
                folder,
            ]
            rows["prune_train.py"].append(_measure(ours))
        rows["torch-pruning"].append(_measure(["-c", THEIRS.format(phi=flags.phi)]))
    print("| | seconds, median (all) | peak memory (MiB), median |")
    print("|---|---|---|")
    for name, runs in rows.items():
        seconds, memory = zip(*runs, strict=True)
        every = " ".join(f"{s:.1f}" for s in seconds)
        print(
            f"| {name} | {statistics.median(seconds):.1f} ({every}) | {statistics.median(memory):.0f} |"
        )
    ratios = [
        [a / b for a, b in zip(*pair, strict=True)] for pair in zip(*rows.values(), strict=True)
    ]
    time_ratio, memory_ratio = (
        statistics.median(column) for column in zip(*ratios, strict=True)
    )
    print(
        f"\nOurs / theirs, median of rounds: time {time_ratio:.2f}, peak memory {memory_ratio:.2f}."
    )


def _measure(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak resident MiB of one Python process (Linux: ru_maxrss is in KiB)."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{arguments[0]} ended with status {status}.")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
