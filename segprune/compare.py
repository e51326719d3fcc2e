"""Two runs' logits of the same images held together: a network and a file made of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of the largest logit, in float32: its rounding stays a hundred times below


@dataclass(frozen=True)
class Limits:
    """What still passes: the difference of logits as a share of the largest, and the pixels whose class is equal."""

    tolerance: float | None
    agreement: float


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart, over all images that were compared."""

    relative: (
        float | None
    )  # the largest difference of two logits over the largest logit; None where classes came out
    agreement: float  # share of pixels with the same class
    num_images: int

    @property
    def text(self) -> str:
        logits = (
            ""
            if self.relative is None
            else f"largest difference of logits {self.relative:.1e} relative, "
        )
        return f"{logits}equal class on {100 * self.agreement:.3f} % of pixels"

    def within(self, limits: Limits) -> bool:
        """Tells whether both limits are met; NaN meets none."""
        close = (
            self.relative is None
            or limits.tolerance is None
            or self.relative <= limits.tolerance
        )
        return close and self.agreement >= limits.agreement


def compare(pairs: Iterable[tuple[Tensor, Tensor]]) -> Difference:
    """Compares the second of each pair, logits B K H W or classes B H W, with the logits in the first.

    NaN and infinity count as infinitely far off.
    """
    # `off` becomes None with the first output that has classes alone, and remains so.
    off: float | None = 0.0
    largest = equal = pixels = 0.0
    images = 0
    for logits, out in pairs:
        has_logits = out.dim() == logits.dim()
        classes = out.argmax(1) if has_logits else out
        equal += int((classes.long() == logits.argmax(1)).sum())
        pixels += classes.numel()
        images += len(out)

        # Classes alone say nothing about the distance of logits.
        largest = max(largest, float(logits.abs().max()))
        if not has_logits:
            off = None
        elif off is not None:
            # NaN becomes infinity first, since `max` would pass over it.
            off = max(
                off, float((out - logits).abs().nan_to_num(torch.inf, posinf=torch.inf).max())
            )

    relative = None if off is None else off / max(largest, torch.finfo(torch.float32).tiny)
    return Difference(relative, equal / pixels, images)
