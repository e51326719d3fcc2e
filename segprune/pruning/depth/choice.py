"""Which branches are removed for a share of the network's cost. Decides, removes nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import get_args

from segprune.pruning.depth.branches import Branch, branch_costs, branches, singles
from segprune.spec import Spec
from segprune.stats import Unit


def choose(
    spec: Spec,
    scores: Mapping[str, float],
    share: float,
    *,
    unit: Unit = "params",
    input_shape: tuple[int, int] = (512, 512),
) -> list[str]:
    """Returns the branches to remove: lowest score per saved cost first, at most `share` of the network's cost in all.

    One that would overshoot or empty its stage is passed over. A branch without a score is kept, and so are patch
    embeddings. Raises ValueError for a share below the cheapest branch, or above all that may be removed; for names
    that are no branches; scores that are not finite; units other than params and macs.
    """
    if unit not in get_args(Unit):
        raise ValueError(f"Unit {unit!r} is unknown; choose params or macs.")
    if not 0.0 < share < 1.0:
        raise ValueError(f"The share for depth is {share:g}; it must be above 0 and below 1.")
    singles(spec, scores)  # refuses names that are no branches
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(
                f"The score of {name} is {score}; scores must be finite, so check weights and images."
            )

    # Cheapest loss for what is saved first.
    costs, whole = branch_costs(spec, unit, input_shape)
    ranked = [branch for branch in branches(spec) if branch.name in scores]
    ranked.sort(key=lambda branch: scores[branch.name] / costs[branch.name])

    # The most that can be removed: the same walk, with the whole network as its budget.
    most = sum(costs[branch.name] for branch in _take_fitting(spec, ranked, costs, whole))
    if share * whole > most:
        raise ValueError(
            f"A share of {share:g} of the {unit} is out of reach for depth; the most that can be removed here is "
            f"{math.floor(1000 * most / whole) / 1000:g}, since every stage keeps a block."
        )

    chosen = _take_fitting(spec, ranked, costs, share * whole)
    if not chosen:
        # For the message: the cheapest branch that may be removed by itself.
        removable = [branch for branch in ranked if _take_fitting(spec, [branch], costs, whole)]
        least = min(costs[branch.name] for branch in removable) / whole
        raise ValueError(
            f"A share of {share:g} of the {unit} is too small for depth; the cheapest branch that may be removed is "
            f"{math.ceil(1000 * least) / 1000:g} of them, so ask for more."
        )
    return [branch.name for branch in chosen]


def _take_fitting(
    spec: Spec, ranked: Sequence[Branch], costs: Mapping[str, int], budget: float
) -> list[Branch]:
    """Takes branches in the order given while they fit, are still whole and are not the last of their stage."""
    # Single branches that each stage still has; a block counts for two of them.
    remaining = Counter(branch.stage for branch in branches(spec) if branch.kind != "block")
    removed: set[str] = set()
    taken = []
    for branch in ranked:
        # A block is passed over once one of its branches is taken, and a branch once its
        # block is.
        is_whole = removed.isdisjoint(branch.singles)
        leaves_some = remaining[branch.stage] > len(branch.singles)
        if costs[branch.name] <= budget and is_whole and leaves_some:
            budget -= costs[branch.name]
            remaining[branch.stage] -= len(branch.singles)
            removed.update(branch.singles)
            taken.append(branch)
    return taken
