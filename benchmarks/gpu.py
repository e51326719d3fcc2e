"""What pruning brings on a GPU: latency, class maps, training, and how far each is from what the card could do.

    python -m benchmarks.gpu [--out gpu.json]     # planned for six minutes on an H100
    python -m benchmarks.gpu --cpu                # the form of every table, on small images without a GPU

Random weights with trained-like statistics, 512×512, 150 classes. Networks are dense, with the decode head folded, and
pruned by half of the parameters; in every round they take turns. A cell is a median, its ratio is over the first
network of the same batch and column. "fp32" computes products exactly, "tf32" rounds their factors, in "fp16" weights
and images are cast; training is in mixed precision. Transformers' own network is measured where it is installed.
After --minutes nothing more is compiled; what was left out is named at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.on_gpu.floors import measure_machine
from benchmarks.on_gpu.passes import Networks, Setup, measure_classes, measure_logits
from benchmarks.on_gpu.rows import Row, print_floors, print_table, show_speed, show_time
from benchmarks.on_gpu.training import measure_steps, measure_waiting
from benchmarks.trained_like import fill
from segprune import L1Pruner, SegFormer
from segprune.fold import fold_decoder
from segprune.spec import standard_spec
from segprune.timing import Precision

RATE = 0.5
NUM_CLASSES = 150
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "fp16")
TINY = {  # what --cpu measures
    "variants": ["b0"],
    "batches": [2],
    "training_batches": [2],
    "shape": [64, 64],
    "seconds": 0.0,
}


def main() -> None:
    flags = _parse_flags()
    start = time.perf_counter()
    device = torch.device("cpu" if flags.cpu else "cuda")
    shape = (flags.shape[0], flags.shape[1])
    name = "CPU" if flags.cpu else torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, {shape[0]}×{shape[1]}, {NUM_CLASSES} classes")

    # Training takes bf16, which is no column of the other tables.
    precisions: tuple[Precision, ...] = ("fp32",) if flags.cpu else PRECISIONS
    machine = measure_machine(device, precisions if flags.cpu else (*precisions, "bf16"))
    print(machine.describe())
    setup = Setup(device, machine, shape, flags.seconds, start + 60 * flags.minutes)

    networks = {variant: _make_networks(variant, shape) for variant in flags.variants}
    with _no_compiler() if flags.cpu else nullcontext():
        tables = _measure_all(setup, networks, precisions, flags)

    print_floors("Beside the time for bytes alone, and for multiply-adds alone:", tables)
    print()
    for note in dict.fromkeys(setup.notes):
        print(f"- {note}")
    print(f"\n{time.perf_counter() - start:.0f} s in all")

    if flags.out:
        settings = vars(flags) | {"device": name, "torch": str(torch.__version__), "rate": RATE}
        record: dict[str, Any] = {"settings": settings, "machine": asdict(machine)}
        for measured, rows in tables.items():
            record[measured] = [asdict(row) for row in rows]
        record["notes"] = setup.notes
        Path(flags.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"Saved: {flags.out}")


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variants", nargs="+", default=["b2", "b0"], help="training is compiled for the first"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--training_batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--shape", nargs=2, type=int, default=[512, 512])
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="at most, for one precision of one batch"
    )
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="then nothing more is compiled"
    )
    parser.add_argument("--out", default="", help="a JSON file with every number")
    parser.add_argument("--cpu", action="store_true")

    flags = parser.parse_args()
    if flags.cpu:
        vars(flags).update(TINY)
    return flags


def _no_compiler() -> AbstractContextManager[Any]:
    """Returns a context in which torch.compile traces networks and compiles nothing, so that --cpu is quick."""
    return mock.patch.object(torch, "compile", partial(torch.compile, backend="eager"))


def _make_networks(variant: str, shape: tuple[int, int]) -> Networks:
    torch.manual_seed(0)
    dense = fill(SegFormer(standard_spec(variant, NUM_CLASSES))).eval()
    assert isinstance(dense, SegFormer)
    pruned = L1Pruner(dense, RATE, repair=False).prune(torch.empty(1, 3, *shape, device="meta"))
    assert isinstance(pruned, SegFormer)
    return {"dense": dense, "folded": fold_decoder(dense), f"pruned {RATE:g}": pruned}


def _measure_all(
    setup: Setup,
    networks: dict[str, Networks],
    precisions: Sequence[Precision],
    flags: argparse.Namespace,
) -> dict[str, list[Row]]:
    """Returns the rows of each table, which is printed as soon as it is complete."""
    logits: list[Row] = []
    for variant, batch in product(networks, flags.batches):
        logits += measure_logits(setup, variant, networks[variant], batch, precisions)
    print_table("Logits, milliseconds a batch:", logits, show_time)
    setup.notes.append(measure_waiting(setup, flags.training_batches[0]))

    # What is trained is a network as published, and one that was pruned.
    trained = {
        variant: {name: network for name, network in group.items() if name != "folded"}
        for variant, group in networks.items()
    }
    training: list[Row] = []
    for variant, batch in product(trained, flags.training_batches):
        training += measure_steps(setup, variant, trained[variant], batch)

    # Half precision is what class maps are wanted in, so it is compiled first.
    classes: list[Row] = []
    for variant, batch in product(networks, flags.batches):
        classes += measure_classes(setup, variant, networks[variant], batch, precisions[-1])

    # Compiling a step takes about a minute, so it is done for one case alone.
    first = next(iter(trained))
    largest = max(flags.training_batches)
    training += measure_steps(setup, first, trained[first], largest, compile=True)
    print_table("Training, images per second and peak memory:", training, show_speed)

    if precisions[0] != precisions[-1]:
        for variant, batch in product(networks, flags.batches):
            classes += measure_classes(setup, variant, networks[variant], batch, precisions[0])
    print_table("Class maps, milliseconds a batch:", classes, show_time)
    return {"logits": logits, "classes": classes, "training": training}


if __name__ == "__main__":
    main()
