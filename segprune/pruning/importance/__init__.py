"""A score per channel: how much the network would miss it. Higher stays. One function per criterion, in METHODS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from segprune.pruning.groups import Group
from segprune.pruning.importance.activations import wanda
from segprune.pruning.importance.gradients import fisher, taylor
from segprune.pruning.importance.settings import TINY, Loss, Scores, Settings
from segprune.pruning.importance.weights import bn, fpgm, l1, l2, lamp, random
from segprune.timing import tf32_products

__all__ = ["METHODS", "NEED_DATA", "Loss", "Normalise", "Scores", "l1_scores", "scores"]

Normalise = Literal["mean", "max", "none"]
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
NEED_DATA = ("taylor", "fisher", "wanda")
NEED_GRADIENTS = ("taylor", "fisher")


def scores(
    method: str,
    model: nn.Module,
    groups: Iterable[Group],
    data: Iterable[Any] | None = None,
    *,
    normalise: Normalise = "mean",
    loss: Loss | None = None,
    seed: int = 0,
    fallback: str | None = None,
) -> dict[str, Scores]:
    """For each group by name, one score per channel, 0 or above; the model is left as it was.

    `data` are batches of images B 3 H W, or whatever `loss` (model, batch) takes; without a loss the network's own
    decisions are the labels. `normalise` divides each group's scores by their mean or maximum, or by nothing: then
    those of taylor and fisher are in units of the loss and comparable across groups. `seed` is for random,
    `fallback` for what bn does with groups that hold no normalisation. Refused: an unknown method, one that needs
    data without any, scores that are not finite, a loss or a fallback for a method that has no use for it.
    """
    groups = list(groups)
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    if normalise not in get_args(Normalise):
        raise ValueError(f"Scores cannot be normalised by {normalise!r}; choose mean, max or none.")
    if loss is not None and method not in NEED_GRADIENTS:
        raise ValueError(f"Method {method} takes no loss; only {' and '.join(NEED_GRADIENTS)} do.")
    if fallback is not None and method != "bn":
        raise ValueError(f"Method {method} takes no fallback, since it ranks every group; only bn does.")
    batches = [] if data is None or method not in NEED_DATA else list(data)
    if method in NEED_DATA and not batches:
        raise ValueError(f"Method {method} needs data, and there is none; give a few dozen images.")
    other = None
    if fallback is not None:
        other = scores(fallback, model, groups, data, normalise="none", seed=seed)
    with tf32_products(False):  # else a GPU would rank other channels than a CPU
        raw = METHODS[method](model, groups, Settings(batches, loss, seed, other))
    if not all(np.isfinite(values).all() for values in raw.values()):
        raise ValueError(
            f"Method {method} gives scores that are not finite; the weights or the images hold values that are not."
        )
    return {name: _normalised(values, normalise) for name, values in raw.items()}


def l1_scores(model: nn.Module, groups: Iterable[Group]) -> dict[str, Scores]:
    """The default: l1, mean 1 over each group."""
    return scores("l1", model, groups)


def _normalised(values: Scores, normalise: Normalise) -> Scores:
    if normalise == "none":
        return values
    by = values.mean() if normalise == "mean" else values.max()
    result: Scores = values / np.maximum(by, TINY)
    return result
