"""Forward passes timed: up to logits of the input's size, and up to the class of every pixel."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.on_gpu.floors import Machine, floor_of_pass
from benchmarks.on_gpu.rows import Row
from benchmarks.trained_like import fill
from segprune import SegFormer, compiled
from segprune.spec import Spec
from segprune.timing import (
    DTYPE_OF,
    Call,
    Pass,
    Precision,
    Turn,
    measure_latency,
    tf32_products,
    time_in_turns,
)

CALLS = 5  # in one turn: while one runs on the GPU, the next is launched
Networks = Mapping[str, SegFormer]  # dense, folded, pruned


@dataclass(frozen=True)
class Setup:
    """Where and how everything is measured. `notes` collects what fell back and what was left out."""

    device: torch.device
    machine: Machine
    shape: tuple[int, int]
    max_seconds: float  # for one precision of one batch
    deadline: float  # of time.perf_counter(), after which nothing more is compiled
    notes: list[str] = field(default_factory=list)

    def may_compile(self, what: str) -> bool:
        if time.perf_counter() < self.deadline:
            return True
        self.notes.append(f"Not compiled for lack of time: {what}.")
        return False


def measure_logits(
    setup: Setup, variant: str, networks: Networks, batch: int, precisions: Sequence[Precision]
) -> list[Row]:
    """Returns rows of passes called from Python and, on a GPU, replayed as CUDA graphs."""
    rows = []
    for precision in precisions:
        latencies = measure_latency(
            list(networks.values()),
            setup.shape,
            device=setup.device,
            precision=precision,
            batch=batch,
            max_runs=50,
            max_seconds=setup.max_seconds,
        )
        for (name, network), latency in zip(networks.items(), latencies, strict=True):
            ways = {"eager": latency.median_ms}
            if latency.eager_ms is not None:
                ways = {"eager": latency.eager_ms, "graph": latency.median_ms}
            floor = floor_of_pass(setup.machine, network.spec, setup.shape, batch, precision)
            rows += [
                Row(variant, name, batch, f"{precision} {way}", ms, floor)
                for way, ms in ways.items()
            ]
    return rows


@torch.no_grad()
def measure_classes(
    setup: Setup, variant: str, networks: Networks, batch: int, precision: Precision
) -> list[Row]:
    """Returns rows of class maps: argmax of the logits, `SegFormer.classes`, compiled, and transformers' own network.

    `compiled` folds the head itself, so the dense network has no row of its own there.
    """
    dtype = DTYPE_OF[precision]
    images = torch.randn(batch, 3, *setup.shape).to(setup.device, dtype)

    # Compilers and recorded graphs keep the products that are allowed while they work.
    with tf32_products(False):
        calls: dict[tuple[str, str], Call] = {}
        for name, network in networks.items():
            # A copy is cast, so that the caller's network keeps its precision.
            cast = copy.deepcopy(network).to(setup.device, dtype).eval()
            calls[name, "logits, argmax"] = partial(_choose_from_logits, cast, images)
            calls[name, "classes"] = partial(cast.classes, images)

            what = f"{variant} {name}, {batch}, {precision}"
            if name != "dense" and setup.may_compile(what):
                program = compiled(
                    network.to(setup.device), setup.shape, dtype, classes=True, batch=batch
                )
                setup.notes.extend(program.notes)
                calls[name, "compiled"] = partial(program, images)
        if find_spec("transformers") is not None:
            theirs = _build_transformers(networks["dense"].spec).to(setup.device, dtype)
            calls["dense", "transformers"] = partial(_choose_from_theirs, theirs, images)

        # All in turns, after a first call of each, in which libraries choose their kernels.
        turns = []
        for call in calls.values():
            call()
            repeated = Pass(partial(_repeat, call))
            turns.append(Turn(repeated.prepare, setup.device, CALLS))
        times = time_in_turns(turns, max_rounds=20, max_seconds=setup.max_seconds)

    rows = []
    for (name, way), row in zip(calls, times, strict=True):
        spec = networks[name].spec
        floor = floor_of_pass(setup.machine, spec, setup.shape, batch, precision, classes=True)
        rows.append(Row(variant, name, batch, f"{precision} {way}", median(row), floor))
    return rows


def _repeat(call: Call) -> None:
    for _ in range(CALLS):
        call()


def _choose_from_logits(network: SegFormer, images: Tensor) -> Tensor:
    return network(images).argmax(1)


def _build_transformers(spec: Spec) -> nn.Module:
    """Returns transformers' network of the same variant, with trained-like weights."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        id2label={i: str(i) for i in range(spec.num_classes)},
        depths=[len(stage.blocks) for stage in spec.stages],
        hidden_sizes=[stage.width for stage in spec.stages],
        decoder_hidden_size=spec.decoder_dim,
    )
    return fill(SegformerForSemanticSegmentation(config).eval())


def _choose_from_theirs(network: nn.Module, images: Tensor) -> Tensor:
    logits = network(images).logits
    return F.interpolate(logits, size=images.shape[2:], mode="bilinear").argmax(1)
