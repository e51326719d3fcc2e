"""A score per channel: how much the network would miss it. The highest are kept. One function per criterion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from segprune.pruning.groups import Group
from segprune.pruning.importance.activations import wanda
from segprune.pruning.importance.gradients import fisher, taylor
from segprune.pruning.importance.settings import TINY, Scores, Settings
from segprune.pruning.importance.weights import bn, fpgm, l1, l2, lamp, random
from segprune.timing import tf32_products

__all__ = ["METHODS", "NEED_IMAGES", "Scores", "score_channels"]

METHODS: dict[str, Callable[[nn.Module, Sequence[Group], Settings], dict[str, Scores]]] = {
    "l1": l1,
    "l2": l2,
    "fpgm": fpgm,
    "lamp": lamp,
    "random": random,
    "bn": bn,
    "taylor": taylor,
    "fisher": fisher,
    "wanda": wanda,
}
NEED_IMAGES = ("taylor", "fisher", "wanda")


def score_channels(
    model: nn.Module,
    groups: Iterable[Group],
    method: str = "l1",
    images: Iterable[Any] = (),
    *,
    seed: int = 0,
) -> dict[str, Scores]:
    """Returns for each group by name one score per channel, 0 or above and 1 in the mean; the model stays as it was.

    `images` are batches B 3 H W, or whatever the model takes; labels are not needed. `seed` is for random. Raises
    ValueError for an unknown method, one that needs images without any, and scores that are not finite.
    """
    groups = list(groups)
    if method not in METHODS:
        raise ValueError(
            f"`pruning_method` is {method!r}, which is unknown; choose one of {', '.join(METHODS)}."
        )

    # Images given to a method that reads weights alone are not used for it; they may be
    # there for the repair.
    batches = list(images) if method in NEED_IMAGES else []
    if method in NEED_IMAGES and not batches:
        raise ValueError(
            f"Method {method} needs `images`, and there are none; give a few dozen, without labels."
        )

    # Coarser products would make a GPU rank other channels than a CPU.
    with tf32_products(False):
        raw = METHODS[method](model, groups, Settings(batches, seed))
    if not all(np.isfinite(values).all() for values in raw.values()):
        raise ValueError(
            f"Method {method} gives scores that are not finite; the weights or the images hold values that are not."
        )

    # Every group's mean becomes 1: raw scores depend on the criterion's unit and on the
    # sizes of the layers.
    return {name: values / np.maximum(values.mean(), TINY) for name, values in raw.items()}
