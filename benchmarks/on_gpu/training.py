"""Training measured: images per second and memory of a step, and how long a run waits for its images.

The step is the learner's own, on random images that lie on the device. The run is the loop's own, on generated images
that lie on a disk, so that reading, augmenting and copying them count.
"""

from __future__ import annotations

import copy
import gc
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator

from benchmarks.on_gpu.floors import floor_of_step
from benchmarks.on_gpu.passes import Networks, Setup
from benchmarks.on_gpu.rows import Row
from benchmarks.trained_like import fill
from segprune import SegFormer
from segprune.data import CLASS_NAMES, open_source, write_shapes
from segprune.spec import standard_spec
from segprune.timing import tf32_products
from segprune.training.learner import Learner
from segprune.training.loop import train
from segprune.training.options import TrainOptions, complete
from segprune.training.state import Splits

LR = 1e-6
WARM_UP, STEPS = 3, 8
FILES = 64  # on the disk; a run reads each as often as it needs
RUN_STEPS, IGNORED_STEPS = (
    60,
    20,
)  # first, workers start, and batches are ready that nobody waits for


def measure_steps(
    setup: Setup, variant: str, networks: Networks, batch: int, *, compile: bool = False
) -> list[Row]:
    """Returns a row for each network: the median step, and the most memory that it took, its weights included."""
    # Compiled for one alone, there would be nothing to compare.
    if compile and not setup.may_compile(f"training of {variant}, {batch}"):
        return []

    rows = []
    for name, network in networks.items():
        options = _choose_options(setup, network.spec.num_classes, batch, compile=compile)
        precision = "fp32" if options.amp == "no" else options.amp
        ms, memory_mb = None, None
        try:
            ms, memory_mb = _time_steps(setup, copy.deepcopy(network).cpu(), options)
        except torch.OutOfMemoryError:
            setup.notes.append(f"Out of memory: training of {variant} {name}, {batch}.")
        except Exception as error:  # compilers fail in many ways of their own
            if not compile:
                raise
            setup.notes.append(
                f"Training of {variant} {name}, {batch} did not compile: {str(error)[:200]}"
            )

        way = f"{precision} {'compiled' if compile else 'eager'}"
        floor = floor_of_step(setup.machine, network.spec, setup.shape, batch, precision)
        rows.append(Row(variant, name, batch, way, ms, floor, memory_mb))
    return rows


def _time_steps(
    setup: Setup, network: SegFormer, options: TrainOptions
) -> tuple[float, float | None]:
    """Returns the milliseconds of a step, and on a GPU the megabytes that are in use at most."""
    device, on_gpu = setup.device, setup.device.type == "cuda"
    shape, num_classes = options.input_shape, network.spec.num_classes

    # In a process of its own, as a run is, nothing would have been compiled before.
    torch.compiler.reset()

    # What lies on the GPU already is not this network's.
    before = 0
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()

    images = torch.randn(options.batch_size, 3, *shape, device=device)
    labels = torch.randint(num_classes, (options.batch_size, *shape), device=device)
    learner = Learner(network, options, _make_accelerator(setup, options), None)

    # A step reads its loss, so the GPU is done when it returns.
    times_ms = []
    try:
        learner.prepare(0)
        with tf32_products(bool(options.tf32)):
            for _ in range(WARM_UP + STEPS):
                start = time.perf_counter()
                learner.step(images, labels, 0, STEPS, threading.Event())
                times_ms.append(1e3 * (time.perf_counter() - start))
    finally:
        learner.close()

    peak_mb = (torch.cuda.max_memory_allocated() - before) / 1e6 if on_gpu else None
    return median(times_ms[WARM_UP:]), peak_mb


def measure_waiting(setup: Setup, batch: int) -> str:
    """Returns in a sentence how much of its time a b0 waits for images, trained on a data set of few classes."""
    network = fill(SegFormer(standard_spec("b0", len(CLASS_NAMES))))
    options = _choose_options(setup, len(CLASS_NAMES), batch)

    with TemporaryDirectory() as folder:
        root = write_shapes(Path(folder) / "shapes", FILES, 1, size=setup.shape)
        source = open_source(root)
        reads = math.ceil(RUN_STEPS * batch / FILES)
        samples = (list(source.split("train")) * reads)[: RUN_STEPS * batch]
        splits = Splits(samples, source.split("val"))
        with _watch_steps() as steps:
            train(network, options, splits, accelerator=_make_accelerator(setup, options))

    # From the end of the last step that is ignored to the end of the last step.
    whole = steps[-1][1] - steps[IGNORED_STEPS - 1][1]
    busy = sum(end - start for start, end in steps[IGNORED_STEPS:])
    speed = batch * (RUN_STEPS - IGNORED_STEPS) / whole
    return (
        f"Training b0 on {setup.shape[0]}×{setup.shape[1]} in batches of {batch} waits for images in "
        f"{100 * (1 - busy / whole):.1f} % of its time, with {options.num_workers} processes that load them: "
        f"{speed:.0f} images a second."
    )


def _choose_options(
    setup: Setup, num_classes: int, batch: int, *, compile: bool = False
) -> TrainOptions:
    """Returns the options of a run that chooses its precision by the device, as the commands do."""
    options = TrainOptions(
        num_classes, setup.shape, epochs=1, batch_size=batch, lr=LR, compile=compile
    )
    return complete(options, setup.device)


def _make_accelerator(setup: Setup, options: TrainOptions) -> Accelerator:
    return Accelerator(cpu=setup.device.type == "cpu", mixed_precision=options.amp)


@contextmanager
def _watch_steps() -> Iterator[list[tuple[float, float]]]:
    """Yields a list that gets the seconds at which each step of a learner begins and ends."""
    steps: list[tuple[float, float]] = []
    step = Learner.step

    def watched(learner: Learner, *arguments: Any) -> tuple[float, bool]:
        start = time.perf_counter()
        result = step(learner, *arguments)
        steps.append((start, time.perf_counter()))
        return result

    with mock.patch.object(Learner, "step", watched):
        yield steps
