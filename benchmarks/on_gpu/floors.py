"""What a pass takes at least on this machine: the time for its bytes, and the time for its multiply-adds.

Bytes move at the measured bandwidth of a copy, multiply-adds run at the measured rate of a large product of matrices.
A pass moves its weights once, and what each layer puts out twice, written and read; norms, activations, sums and
upsampling are taken as done on the way. So both are floors that no program reaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from segprune import count
from segprune.spec import Spec
from segprune.stats import layers
from segprune.timing import DTYPE_OF, Pass, matrix_product, set_tf32, tf32_products, time_passes

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}
BYTES_PER_CLASS = 8  # argmax gives int64
FORWARD_PASSES = 3  # that training costs: the backward pass takes two products for each one
ADAMW_BYTES = 28  # a parameter: it, its gradient and two moments read, all but the gradient written; in float32


@dataclass(frozen=True)
class Floor:
    """Milliseconds of one batch."""

    bytes_ms: float
    macs_ms: float

    @property
    def ms(self) -> float:
        return max(self.bytes_ms, self.macs_ms)


@dataclass(frozen=True)
class Machine:
    """What the machine does in a millisecond: bytes read or written, and multiply-adds by precision."""

    bytes_per_ms: float
    macs_per_ms: Mapping[str, float]

    def floor(self, num_bytes: float, macs: float, precision: str) -> Floor:
        return Floor(num_bytes / self.bytes_per_ms, macs / self.macs_per_ms[precision])

    def describe(self) -> str:
        rates = [
            f"{2 * macs / 1e9:.3g} TFLOP/s in {precision}"
            for precision, macs in self.macs_per_ms.items()
        ]
        return f"Measured: {self.bytes_per_ms / 1e6:.0f} GB/s copied; {', '.join(rates)}."


def measure_machine(device: torch.device, precisions: Sequence[str]) -> Machine:
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    # TF32 is a switch of all of PyTorch, so each product sets it before it runs.
    products = {name: matrix_product(device, DTYPE_OF[name]) for name in precisions}
    passes = [Pass(partial(target.copy_, source))]
    for name, (run, _) in products.items():
        passes.append(Pass(run, partial(set_tf32, name == "tf32", name == "tf32")))

    with tf32_products(False):
        times = time_passes(passes, device, max_rounds=10, max_seconds=2.0)
    copy_ms, *products_ms = (median(row.times_ms) for row in times)
    rates = {
        name: macs / ms
        for (name, (_, macs)), ms in zip(products.items(), products_ms, strict=True)
    }
    return Machine(2 * source.nbytes / copy_ms, rates)


def floor_of_pass(
    machine: Machine,
    spec: Spec,
    shape: tuple[int, int],
    batch: int,
    precision: str,
    *,
    classes: bool = False,
) -> Floor:
    """Returns the floor of a forward pass up to logits or classes of the input's size."""
    counts, width = count(spec, shape), DTYPE_OF[precision].itemsize
    pixels = shape[0] * shape[1]

    answer = pixels * (BYTES_PER_CLASS if classes else spec.num_classes * width)
    per_image = width * (3 * pixels + 2 * _numbers_between_layers(spec, shape)) + answer
    return machine.floor(
        width * counts.parameters + batch * per_image, batch * counts.macs, precision
    )


def floor_of_step(
    machine: Machine, spec: Spec, shape: tuple[int, int], batch: int, precision: str
) -> Floor:
    """Returns the floor of a training step with AdamW: as three forward passes, then every parameter updated."""
    forward = floor_of_pass(machine, spec, shape, batch, precision)
    update_ms = ADAMW_BYTES * count(spec, shape).parameters / machine.bytes_per_ms
    return Floor(
        FORWARD_PASSES * forward.bytes_ms + update_ms, FORWARD_PASSES * forward.macs_ms
    )


def _numbers_between_layers(spec: Spec, shape: tuple[int, int]) -> int:
    """Returns how many numbers all layers but norms put out for one image."""
    rows = layers(spec, shape)
    return sum(row.positions * row.out_dim for row in rows if row.kind != "norm")
