"""An exported file compared with the network in PyTorch, as it was loaded, on the same pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from segprune.data import draw_shapes, normalise
from segprune.data.transforms import Bytes
from segprune.export.job import Job
from segprune.export.manifest import MIN_DYNAMIC, Precision
from segprune.export.runtimes import Runtime

MAX_BATCHES = 8


@dataclass(frozen=True)
class Limits:
    """What still passes: the difference of logits as a share of the largest, and the pixels whose class is equal."""

    tolerance: float | None
    agreement: float


LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(1e-4, 0.999),
    "fp16": Limits(2e-2, 0.98),
    "int8": Limits(None, 0.9),  # where logits are far apart anyway, their difference tells little
}


@dataclass(frozen=True)
class Difference:
    """Largest difference of two logits over the largest logit (None where the file gives classes), pixels of equal
    class as a share, and the number of pictures that were compared."""

    relative: float | None
    agreement: float
    num_pictures: int

    @property
    def text(self) -> str:
        logits = "" if self.relative is None else f"largest difference of logits {self.relative:.1e} relative, "
        return f"{logits}equal class on {100 * self.agreement:.3f} % of pixels"

    def within(self, limits: Limits) -> bool:
        """Numbers that are none are never within."""
        close = self.relative is None or limits.tolerance is None or self.relative <= limits.tolerance
        return close and self.agreement >= limits.agreement


def compare(reference: nn.Module, runtime: Runtime, job: Job) -> Difference:
    """`reference` is the network in eval mode on the CPU."""
    off = largest = equal = pixels = 0.0
    number = 0
    for pictures in _batches(job):
        with torch.no_grad():
            logits = reference(torch.stack([normalise(picture) for picture in pictures]))
        out = runtime.run_any(job.input(pictures))
        classes = out if job.manifest.argmax else out.argmax(1)
        equal += int((classes.long() == logits.argmax(1)).sum())
        pixels += classes.numel()
        number += len(pictures)
        if not job.manifest.argmax:
            largest = max(largest, float(logits.abs().max()))
            off = max(off, float((out - logits).abs().nan_to_num(torch.inf, posinf=torch.inf).max()))
    relative = None if job.manifest.argmax else off / max(largest, torch.finfo(torch.float32).tiny)
    return Difference(relative, equal / pixels, number)


def _batches(job: Job) -> Iterable[list[Bytes]]:
    """The pictures at hand, else generated ones; for a dynamic file a single odd one and a batch of two as well."""
    shape = job.manifest.shape
    size = 2 if shape is None else shape[0]
    pictures = list(job.pictures[: MAX_BATCHES * size]) or _drawn(size, job.size)
    for i in range(0, len(pictures), size):
        yield pictures[i : i + size]
    if shape is None:
        yield _drawn(1, (MIN_DYNAMIC + 11, MIN_DYNAMIC + 45))
        yield _drawn(3, (MIN_DYNAMIC + 32, MIN_DYNAMIC))


def _drawn(number: int, size: tuple[int, int]) -> list[Bytes]:
    return [draw_shapes(0, "val", index, size)[0] for index in range(number)]
