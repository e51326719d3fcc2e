"""The learning rate over a run, as a factor on the base rate."""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["poly", "cosine"]
DECAYS: tuple[Decay, ...] = ("poly", "cosine")


def lr_factor(step: int, total_steps: int, *, warmup_steps: int, decay: Decay) -> float:
    """Factor for step `step` of 0 … total_steps − 1: a linear rise over the warm-up, then decay towards 0.

    "poly" falls linearly (power 1, as SegFormer was trained), "cosine" along half a wave.

    >>> [round(lr_factor(s, 10, warmup_steps=2, decay="poly"), 2) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.12]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 1.0 - done if decay == "poly" else 0.5 * (1.0 + math.cos(math.pi * done))
