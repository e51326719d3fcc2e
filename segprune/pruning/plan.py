"""Scores and a budget in, a plan out: which channels stay. Decides everything, cuts nothing.

The cost of any choice of widths is a formula (`Costs`), so a budget is solved by bisection on one threshold for
all groups. What is compared across groups is a channel's share of the score that its group would still have, per
unit of what the group costs in parameters and MACs: the threshold then maximises the sum of the logarithms of what
the groups keep. A group that costs much gives more, and the fewer channels it has left, the dearer the next one
becomes. Widths stay
multiples of `round_to`; what rounding leaves of the budget is spent on the remaining steps that lose least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from segprune.pruning.groups import Group
from segprune.pruning.importance import Scores
from segprune.stats import Layer

RateOf = Literal["params", "macs", "channels"]
RATES: tuple[RateOf, ...] = ("params", "macs", "channels")
TOLERANCE = 0.01  # how far, as a share of the whole, the result may be from the rate
AIM = 0.001  # how near it is tried to come
MIN_SHARE = 0.1  # of a group's channels always stays
MACS_WEIGHT = 0.6  # of MACs beside parameters in a group's price; measured, see docs/experiments.md
Widths = np.ndarray[tuple[int], np.dtype[np.int64]]
Coefficients = np.ndarray[tuple[int, int], np.dtype[np.float64]]  # (a, b, c) of each layer: 3 L


@dataclass(frozen=True)
class Plan:
    """The channels that stay, by group name; `removed` is the share reached, in the unit of the rate."""

    keep: Mapping[str, tuple[int, ...]]
    rate: float
    rate_of: RateOf
    removed: float


class Costs:
    """Cost of a network as a function of its groups' widths (slots that stay, in the order of `groups`).

    A layer's side is as wide as its groups leave it, times the share of heads that stay.
    """

    def __init__(self, layers: Sequence[Layer], groups: Sequence[Group], rate_of: RateOf, rest: int = 0) -> None:
        self.groups = groups
        self.full = np.array([group.slots for group in groups], dtype=np.int64)
        self.rest = rest  # what lies in no listed layer
        self._dims = np.array([[row.in_dim, row.out_dim] for row in layers], dtype=np.float64).T  # 2 L
        self._per_slot = np.zeros((2, len(layers), len(groups)))
        self._heads: list[tuple[int, int, int]] = []  # side, layer, group
        rows = _rows_by_side(layers)
        self._reach = [_reach(group, layers, rows) for group in groups]
        for g, group in enumerate(groups):
            for member in group.members:
                for side, row in rows.get((member.layer, member.side), ()):
                    if group.kind == "head":
                        self._heads.append((side, row, g))
                    else:
                        self._per_slot[side, row, g] += len(member.positions) / group.slots
        self._coefficients = _coefficients(layers, groups, rate_of, rows)
        weights: dict[RateOf, float] = {"params": 1.0 - MACS_WEIGHT, "macs": MACS_WEIGHT}
        if rate_of == "channels":
            weights = {"channels": 1.0}
        self._priced = [(weight, _coefficients(layers, groups, unit, rows)) for unit, weight in weights.items()]

    def total(self, widths: Widths) -> float:
        return self._cost(widths, self._coefficients) + self.rest

    def price(self, g: int) -> float:
        """The share of the network's cost, parameters and MACs weighed, that would go with all of group `g`; above 0.

        It is the same for rates of both: whoever asks for fewer parameters wants a faster network as well. For a rate
        of the channels it is their share.
        """
        widths = self.full.copy()
        widths[g] = 0
        price = float(np.finfo(float).eps)
        for weight, coefficients in self._priced:
            whole = max(self._cost(self.full, coefficients), 1.0)
            price += weight * (1.0 - self._cost(widths, coefficients) / whole)
        return price

    def loss_per_saving(self, g: int) -> float:
        """What losing a given share of group `g` weighs: once for each product that reads or writes it, per price.

        Counted so, a stage's width that thirty products share is not given away like one block's hidden width.
        """
        return self._reach[g] / self.price(g)

    def _cost(self, widths: Widths, coefficients: Coefficients) -> float:
        dims = self._dims - self._per_slot @ (self.full - widths)
        for side, row, g in self._heads:
            dims[side, row] *= widths[g] / self.full[g]
        a, b, c = coefficients
        return float((a * dims[0] * dims[1] + b * dims[0] + c * dims[1]).sum())


def _rows_by_side(layers: Sequence[Layer]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Which widths (0 in, 1 out; row) a member's side sets. q's outputs and v's are attention's two widths."""
    rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for i, layer in enumerate(layers):
        if layer.kind == "attention":
            rows.setdefault((f"{layer.name}.q", "out"), []).append((0, i))
            rows.setdefault((f"{layer.name}.v", "out"), []).append((1, i))
        else:
            rows.setdefault((layer.name, "out"), []).append((1, i))
            if layer.kind == "product":
                rows.setdefault((layer.name, "in"), []).append((0, i))
    return rows


def _reach(group: Group, layers: Sequence[Layer], rows: Mapping[tuple[str, str], list[tuple[int, int]]]) -> int:
    """The number of products one of whose sides the group is; at least 1."""
    sides = {found for m in group.members for found in rows.get((m.layer, m.side), ())}
    return max(1, sum(layers[row].kind == "product" for _, row in sides))


def _coefficients(
    layers: Sequence[Layer],
    groups: Sequence[Group],
    rate_of: RateOf,
    rows: Mapping[tuple[str, str], list[tuple[int, int]]],
) -> Coefficients:
    result = np.zeros((3, len(layers)))
    if rate_of == "channels":  # each group counts once, as wide as the first layer that puts it out
        for group in groups:
            outs = [m.layer for m in group.members if m.side == "out"]
            if group.kind != "head" and outs:
                result[2, rows[outs[0], "out"][0][1]] = 1
        return result
    seen: set[tuple[str, str]] = set()
    for i, layer in enumerate(layers):
        if rate_of == "params" and (layer.name, layer.kind) in seen:
            continue  # a layer that runs twice has its weights once
        seen.add((layer.name, layer.kind))
        result[:, i] = layer.coefficients(rate_of)
    return result


def solve(
    costs: Costs,
    scores: Mapping[str, Scores],
    rate: float,
    *,
    rate_of: RateOf = "params",
    whole: float | None = None,
    round_to: int = 8,
    local: bool = False,
) -> Plan:
    """The plan that removes the share `rate` of `whole` (default: the cost at full widths), within `TOLERANCE`.

    Global scope ranks the channels of all groups together; `local` ranks each group's by themselves, so that all
    lose the same share. Refused with the nearest rate that can be reached: a rate beyond the floors, one that folding
    alone exceeds (`whole` above the cost at full widths), and one so small that nothing would go.
    """
    groups = costs.groups
    whole = costs.total(costs.full) if whole is None else whole
    allowed = [_allowed(group, round_to) for group in groups]
    if local:
        ranked = [_slot_ranks(group) for group in groups]
    else:
        ranked = [_slot_losses(scores[group.name], group, costs.loss_per_saving(g)) for g, group in enumerate(groups)]
    floors = np.array([widths[0] for widths in allowed], dtype=np.int64)
    _check_reach(costs, floors, rate, whole)
    target = whole * (1.0 - rate)
    widths = _spend_rest(costs, ranked, allowed, _bisect(costs, ranked, allowed, target), target, whole)
    removed = 1.0 - costs.total(widths) / whole
    finer = ", or for finer steps with --round_to 1" if round_to > 1 else ""
    if bool((widths == costs.full).all()):
        raise ValueError(
            f"Rate {rate:g} is too small to remove even one step of {round_to} channels; ask for a higher rate{finer}."
        )
    if abs(removed - rate) > TOLERANCE:
        raise ValueError(
            f"Rate {rate:g} of the {rate_of} cannot be met within {TOLERANCE:.0%} in steps of {round_to} channels; "
            f"ask for the nearest, {removed:.3f}{finer}."
        )
    keep = {g.name: _keep(scores[g.name], g, int(w)) for g, w in zip(groups, widths, strict=True)}
    return Plan(keep, rate, rate_of, removed)


def _check_reach(costs: Costs, floors: Widths, rate: float, whole: float) -> None:
    most = 1.0 - costs.total(floors) / whole
    least = 1.0 - costs.total(costs.full) / whole
    if rate > most + AIM:
        raise ValueError(
            f"Rate {rate:g} is out of reach; the most that can be removed here is {int(most * 1000) / 1000:g}, "
            "since every group keeps a tenth of its channels and protected layers keep all."
        )
    if rate <= least:
        raise ValueError(
            f"Rate {rate:g} is less than folding the decode head alone removes ({least:.3f}); "
            "ask for a higher rate, or keep the head with --keep_decoder."
        )


def _allowed(group: Group, round_to: int) -> list[int]:
    """Widths the group may take, ascending: multiples of `round_to`, at least the floor, and its full width."""
    step = 1 if group.kind == "head" else round_to
    floor = max(1, int(np.ceil(MIN_SHARE * group.slots)))
    multiples = range(step * -(-floor // step), group.slots, step)
    return [*multiples, group.slots]


def _slot_losses(scores: Scores, group: Group, weight: float) -> Scores:
    """Ascending: what the k-th lowest slot loses of the logarithm of the group's score, times the group's weight.

    Slot k is each part's k-th lowest channel, so that all parts (heads) lose equally many.
    """
    ranked = np.sort(scores.reshape(group.parts, group.slots), axis=1).mean(axis=0)
    left = np.cumsum(ranked[::-1])[::-1]  # the score of slot k and all above
    losses: Scores = group.slots * ranked / np.maximum(left, np.finfo(float).tiny) * weight
    return losses


def _slot_ranks(group: Group) -> Scores:
    """For local scope: the same share of every group lies below any threshold."""
    ranks: Scores = (np.arange(group.slots) + 0.5) / group.slots
    return ranks


def _bisect(costs: Costs, ranked: list[Scores], allowed: list[list[int]], target: float) -> Widths:
    """Widths at the highest common threshold whose cost is not yet below the target."""
    thresholds = np.unique(np.concatenate(ranked))
    low, high = 0, len(thresholds)  # index 0 removes nothing
    while high - low > 1:
        middle = (low + high) // 2
        if costs.total(_widths_at(thresholds[middle], ranked, allowed)) >= target:
            low = middle
        else:
            high = middle
    return _widths_at(thresholds[low], ranked, allowed)


def _widths_at(threshold: float, ranked: list[Scores], allowed: list[list[int]]) -> Widths:
    """Every slot below the threshold goes, then each width moves to the nearest one allowed."""
    widths = []
    for scores, options in zip(ranked, allowed, strict=True):
        wanted = len(scores) - int(np.searchsorted(scores, threshold))
        widths.append(min(options, key=lambda option: (abs(option - wanted), option)))
    return np.array(widths, dtype=np.int64)


def _spend_rest(
    costs: Costs, ranked: list[Scores], allowed: list[list[int]], widths: Widths, target: float, whole: float
) -> Widths:
    """Take further single steps, those of the lowest mean score first, while one overshoots by no more than `AIM`.

    Where all overshoot, the last step is the one that lands nearest, unless staying is nearer still.
    """
    slack = AIM * whole
    while costs.total(widths) > target + slack:
        trials = []
        for g, options in enumerate(allowed):
            i = options.index(int(widths[g]))
            if i > 0:
                gone = len(ranked[g]) - int(widths[g])
                trial = widths.copy()
                trial[g] = options[i - 1]
                trials.append((ranked[g][gone : len(ranked[g]) - options[i - 1]].mean(), g, trial))
        in_order = [trial for *_, trial in sorted(trials, key=lambda entry: entry[:2])]
        gentle = next((trial for trial in in_order if costs.total(trial) >= target - slack), None)
        if gentle is None:
            return min([widths, *in_order], key=lambda trial: abs(costs.total(trial) - target))
        widths = gentle
    return widths


def _keep(scores: Scores, group: Group, width: int) -> tuple[int, ...]:
    """In each part the `width` highest scores; of equal ones the first."""
    by_part = scores.reshape(group.parts, group.slots)
    best = np.argsort(-by_part, axis=1, kind="stable")[:, :width]
    flat = best + np.arange(group.parts)[:, None] * group.slots
    return tuple(sorted(int(c) for c in flat.ravel()))
