"""The learning rate over a run, as a factor on the base rate; and the base rate by the rule of the VOC scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["poly", "cosine", "constant"]
DECAYS: tuple[Decay, ...] = ("poly", "cosine", "constant")

# The SegFormer scripts for VOC folders (bubbliiiing's): rates for 16 images, and the share that a run ends with.
_VOC_BATCH, _VOC_FLOOR = 16, 0.01
_VOC_LIMITS = {"adamw": (3e-5, 1e-4), "sgd": (5e-4, 5e-2)}
_VOC_SHARE, _VOC_WARMUP_EPOCHS = 0.05, 3.0


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves. `warmup` and `hold` are shares of all steps, `min_factor` of the highest rate.

    It rises linearly over `warmup`, then falls by `decay` to `min_factor`, and stays there for the last `hold`.
    """

    decay: Decay = "poly"
    warmup: float = 0.05
    min_factor: float = 0.0
    hold: float = 0.0

    def factor(self, step: int, total_steps: int) -> float:
        """Returns what the highest rate is multiplied by in step `step` of 0 … total_steps − 1."""
        # Shares become whole steps here, so that a run of any length has the same shape.
        return lr_factor(
            step,
            total_steps,
            warmup_steps=round(self.warmup * total_steps),
            decay=self.decay,
            min_factor=self.min_factor,
            hold_steps=round(self.hold * total_steps),
        )


def lr_factor(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int,
    decay: Decay,
    min_factor: float = 0.0,
    hold_steps: int = 0,
) -> float:
    """Returns the factor for step `step` of 0 … total_steps − 1: a linear rise over the warm-up, then the decay.

    "poly" falls along a line (power 1), as SegFormer was trained; "cosine" along half a wave; both end at
    `min_factor`, where the last `hold_steps` stay. "constant" does not fall, whatever the floor.

    >>> [round(lr_factor(s, 10, warmup_steps=2, decay="poly"), 2) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.12]
    """
    # Counted from 1, so that the first step already learns.
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "constant":
        return 1.0

    # The share of the fall that is done; min holds the floor in the last steps.
    done = min((step - warmup_steps) / max(total_steps - hold_steps - warmup_steps, 1), 1.0)
    # From 1 down to 0, then stretched to end at the floor instead.
    left = 1.0 - done if decay == "poly" else 0.5 * (1.0 + math.cos(math.pi * done))
    return min_factor + (1.0 - min_factor) * left


def voc_lr(lr: float, batch_size: int, optimizer: str) -> float:
    """Returns a run's highest rate by the VOC scripts' rule: `lr` is for 16 images a step, all processes together.

    It grows with the batch and is clipped to what the optimiser tolerates: 3e-5 … 1e-4 for adamw, 5e-4 … 5e-2 for sgd.

    >>> voc_lr(1e-4, 8, "adamw")
    5e-05
    """
    # Linear in the batch, as the gradient of more images has less noise.
    low, high = _VOC_LIMITS[optimizer]
    return min(max(lr * batch_size / _VOC_BATCH, low), high)


def voc_schedule(epochs: int) -> Schedule:
    """Returns the schedule of the same rule.

    Warm-up over 5 % of the epochs, at most 3; a cosine to a hundredth; the last 5 % constant. The scripts set the rate
    once an epoch; here it moves with every step.
    """
    warmup = min(_VOC_SHARE, _VOC_WARMUP_EPOCHS / epochs)
    return Schedule("cosine", warmup, min_factor=_VOC_FLOOR, hold=_VOC_SHARE)
