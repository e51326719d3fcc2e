"""Branches removed before channels are: those whose absence the network's output shows least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from segprune.model import SegFormer
from segprune.pruning.depth.choice import choose
from segprune.pruning.depth.removal import remove
from segprune.pruning.depth.scores import branch_scores, noise
from segprune.pruning.options import PruneOptions
from segprune.pruning.pruner import Pruner
from segprune.stats import Unit


def prune_depth(
    dense: SegFormer,
    depth: float,
    images: Sequence[Tensor] = (),
    *,
    unit: Unit = "params",
    input_shape: tuple[int, int] = (512, 512),
    ignore: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SegFormer, list[str]]:
    """Returns a network without the least needed branches, at most the share `depth` of its cost, and their names.

    Each branch is skipped by itself on the normalised images B C H W, or on noise with a photograph's spectrum if there
    are none. Branches that hold something whose name `ignore` matches stay. `pruning.prune` then removes channels.
    Raises ValueError for a share that no branches add up to.
    """
    # Branches that hold something protected are kept.
    pruner = Pruner(dense, options=PruneOptions(ignore=ignore, input_shape=input_shape))
    kept = pruner.protected_names()

    device = next(dense.parameters()).device
    drawn = noise(input_shape, channels=dense.spec.in_channels)
    seen = images or [batch.to(device) for batch in drawn]
    scores = branch_scores(dense, seen, progress=progress)
    free = {
        branch: score
        for branch, score in scores.items()
        if not any(f"{name}.".startswith(f"{branch}.") for name in kept)
    }

    names = choose(dense.spec, free, depth, unit=unit, input_shape=input_shape)
    return remove(dense, names, images), names
