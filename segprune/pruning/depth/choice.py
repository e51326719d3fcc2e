"""Which branches go for a share of the network's cost. Decides, removes nothing."""

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
    """The branches to remove: lowest score per saved cost first, at most `share` of the network's cost in all.

    One that would overshoot or empty its stage is passed over. A branch without a score stays, as do patch embeddings,
    which are none. Refused: a share below the cheapest branch, or above all that may go; names that are no branches;
    scores that are not finite; units other than params and macs.
    """
    if unit not in get_args(Unit):
        raise ValueError(f"Unit {unit!r} is unknown; choose params or macs.")
    if not 0.0 < share < 1.0:
        raise ValueError(f"The share for depth is {share:g}; it must be above 0 and below 1.")
    singles(spec, scores)
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"The score of {name} is {score}; scores must be finite, so check weights and images.")
    costs, whole = branch_costs(spec, unit, input_shape)
    ranked = [branch for branch in branches(spec) if branch.name in scores]
    ranked.sort(key=lambda branch: scores[branch.name] / costs[branch.name])
    most = sum(costs[branch.name] for branch in _greedy(spec, ranked, costs, whole))
    if share * whole > most:
        raise ValueError(
            f"A share of {share:g} of the {unit} is out of reach for depth; the most that can go here is "
            f"{math.floor(1000 * most / whole) / 1000:g}, since every stage keeps a block."
        )
    chosen = _greedy(spec, ranked, costs, share * whole)
    if not chosen:
        least = min(costs[b.name] for b in ranked if _greedy(spec, [b], costs, whole)) / whole
        raise ValueError(
            f"A share of {share:g} of the {unit} is too small for depth; the cheapest branch that may go is "
            f"{math.ceil(1000 * least) / 1000:g} of them, so ask for more."
        )
    return [branch.name for branch in chosen]


def _greedy(spec: Spec, ranked: Sequence[Branch], costs: Mapping[str, int], budget: float) -> list[Branch]:
    """In the order given, what still fits, is still whole and is not the last of its stage."""
    left = Counter(branch.stage for branch in branches(spec) if branch.kind != "block")
    gone: set[str] = set()
    chosen = []
    for branch in ranked:
        fits = costs[branch.name] <= budget
        if fits and gone.isdisjoint(branch.singles) and left[branch.stage] > len(branch.singles):
            budget -= costs[branch.name]
            left[branch.stage] -= len(branch.singles)
            gone.update(branch.singles)
            chosen.append(branch)
    return chosen
