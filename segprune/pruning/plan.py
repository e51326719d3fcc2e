"""Scores and budgets in, a plan out: which channels stay. Decides everything, cuts nothing.

The cost of any choice of widths is known (costs.py), so budgets are solved by bisection on one threshold for all
groups. What is compared across groups is, by default, a channel's share of the score that its group would still
have, times the group's weight: the threshold then maximises the weighted sum of the logarithms of what the groups
keep. A group that costs much gives more, and the fewer channels it has left, the dearer the next one becomes. Widths
stay multiples of `round_to`; what rounding leaves of the budget is spent on the remaining steps that lose least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from segprune.pruning.costs import Cost, RateOf, Widths
from segprune.pruning.groups import Group
from segprune.pruning.importance import Scores
from segprune.pruning.patterns import match

Scope = Literal["global", "local", "isomorphic"]
Normalise = Literal["share", "mean", "max", "none"]
TOLERANCE = 0.01  # how far, as a share of the whole, the result may be from the rate
AIM = 0.001  # how near it is tried to come
MAX_RATE = 0.9  # of a group's channels may go


@dataclass(frozen=True)
class PlanOptions:
    """How groups are compared and what is out of bounds. Patterns and what they match: patterns.py.

    scope: "global" ranks the channels of all groups together; "local" takes the same share of every group;
    "isomorphic" the same share of every set of equal groups, ranked together ("Isomorphic Pruning for Vision Models",
    arXiv 2407.04616).
    normalise: what is compared under global scope: a channel's "share" of the score still left in its group; its score
    by its group's "mean" or "max"; or the score as it is ("none").
    max_rate: by pattern, the share of a group's channels that may go at most, `MAX_RATE` where none matches.
    rates: by pattern, the share that goes of each group, whatever its scores; the others make up for the budget.
    sensitivity: by group name, a factor on its weight, from `scan`.
    """

    round_to: int = 8
    scope: Scope = "global"
    normalise: Normalise = "share"
    max_rate: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    sensitivity: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Limit:
    """A budget: the share `rate` of `whole` (default: the cost at full widths) has to go."""

    cost: Cost
    rate: float
    rate_of: RateOf = "params"
    whole: float | None = None

    def removed(self, widths: Widths) -> float:
        """The share that goes."""
        return 1.0 - self.cost.total(widths) / (self.whole or self.cost.total(self.cost.full))


@dataclass(frozen=True)
class Plan:
    """The channels that stay, by group name; `removed` is the share that goes, by unit."""

    keep: Mapping[str, tuple[int, ...]]
    removed: Mapping[RateOf, float] = field(default_factory=dict)


def solve(
    limits: Sequence[Limit],
    groups: Sequence[Group],
    scores: Mapping[str, Scores],
    weights: Sequence[float],
    options: PlanOptions | None = None,
) -> Plan:
    """The plan that removes what every limit asks, and of the one that asks most no more, within `TOLERANCE`.

    `weights`: what losing a share of each group weighs (costs.loss_weights). Without a limit only `options.rates` are
    carried out. Refused with the nearest rate that can be reached: a rate beyond the floors, one that folding alone
    exceeds (`whole` above the cost at full widths), and one so small that nothing would go.
    """
    options = options or PlanOptions()
    full = np.array([group.slots for group in groups], dtype=np.int64)
    allowed = _allowed(groups, options)
    ranked = rank_slots(groups, scores, weights, options)
    floors, widths = (np.array([options[at] for options in allowed], dtype=np.int64) for at in (0, -1))
    for limit in limits:
        _check_reach(limit, floors, options)
        check_least(limit, groups, options)
    if limits:
        widths = _spend_rest(limits, ranked, allowed, _bisect(limits, ranked, allowed))
    if bool((widths == full).all()):
        raise ValueError(
            f"Rate {_asked(limits)} is too small to remove even one step of {options.round_to} channels; "
            f"ask for a higher rate{_finer(options)}."
        )
    binding = min(limits, key=lambda limit: limit.removed(widths) - limit.rate, default=None)
    if binding is not None and abs(binding.removed(widths) - binding.rate) > TOLERANCE:
        raise ValueError(
            f"Rate {binding.rate:g} of the {binding.rate_of} cannot be met within {TOLERANCE:.0%} in steps of "
            f"{options.round_to} channels; ask for the nearest, {binding.removed(widths):.3f}{_finer(options)}."
        )
    return replace(plan_of(groups, scores, widths), removed={limit.rate_of: limit.removed(widths) for limit in limits})


def plan_of(groups: Sequence[Group], scores: Mapping[str, Scores], widths: Widths) -> Plan:
    """The plan for given widths: of each group the channels with the highest scores stay."""
    return Plan({g.name: _keep(scores[g.name], g, int(w)) for g, w in zip(groups, widths, strict=True)})


def check_widths(widths: Mapping[str, int], groups: Sequence[Group]) -> Widths:
    """The widths in the order of the groups. ValueError for names or widths that do not fit."""
    slots = {group.name: group.slots for group in groups}
    strange, missing = sorted(widths.keys() - slots.keys()), sorted(slots.keys() - widths.keys())
    wrong = [f"group {name}, which this network cannot cut" for name in strange[:1]]
    wrong += [f"group {name}, which the plan does not name" for name in missing[:1]]
    if wrong:
        raise ValueError(f"The plan is not one for this network and these flags: {', and '.join(wrong)}.")
    for name, width in widths.items():
        if not 1 <= width <= slots[name]:
            raise ValueError(f"The plan leaves {width} channels of {name}; it must be 1 to {slots[name]}.")
    return np.array([widths[group.name] for group in groups], dtype=np.int64)


def _asked(limits: Sequence[Limit]) -> str:
    return ", ".join(f"{limit.rate:g}" for limit in limits) or "of --rates"


def _finer(options: PlanOptions) -> str:
    return ", or for finer steps with --round_to 1" if options.round_to > 1 else ""


def _check_reach(limit: Limit, floors: Widths, options: PlanOptions) -> None:
    most = limit.removed(floors)
    if limit.rate > most + AIM:
        by_name = options.max_rate.keys() - {"*"}
        share = "what --max_rate allows" if by_name else f"{options.max_rate.get('*', MAX_RATE):g} (--max_rate)"
        raise ValueError(
            f"Rate {limit.rate:g} is out of reach; the most that can be removed here is {int(most * 1000) / 1000:g}, "
            f"since no group gives more of its channels than {share}, and protected layers keep all."
        )


def check_least(limit: Limit, groups: Sequence[Group], options: PlanOptions, *, depth: float = 0.0) -> None:
    """ValueError where even the widest network allowed lacks more than is asked.

    `depth`: the share asked for whole branches, which are gone already, if they count towards the limit.
    """
    least = limit.removed(np.array([widths[-1] for widths in _allowed(groups, options)], dtype=np.int64))
    if limit.rate <= least:
        fixed = bool(options.rates)
        cause = "what --rates asks" if fixed else "folding the decode head"
        removes = f"--depth {depth:g} and {cause} together remove" if depth else f"{cause} alone removes"
        remedy = ("" if fixed else ", or keep the head with --keep_decoder") + (", or less depth" if depth else "")
        raise ValueError(f"Rate {limit.rate:g} is less than {removes} ({least:.3f}); ask for a higher rate{remedy}.")


def _allowed(groups: Sequence[Group], options: PlanOptions) -> list[list[int]]:
    """For each group the widths it may take, ascending: multiples of `round_to` from the floor up, and its full width.

    A group with a rate of its own may take one width only.
    """
    most, fixed = match(options.max_rate, groups, "--max_rate"), match(options.rates, groups, "--rates")
    allowed = []
    for group in groups:
        step = 1 if group.kind == "head" else options.round_to
        share = fixed.get(group.name)
        floor = 1 if share is not None else int(np.ceil((1.0 - most.get(group.name, MAX_RATE)) * group.slots - 1e-9))
        options_here = [*range(step * -(-max(floor, 1) // step), group.slots, step), group.slots]
        if share is not None:
            wanted = (1.0 - share) * group.slots
            options_here = [min(options_here, key=lambda width: abs(width - wanted))]
        allowed.append(options_here)
    return allowed


def rank_slots(
    groups: Sequence[Group], scores: Mapping[str, Scores], weights: Sequence[float], options: PlanOptions
) -> list[Scores]:
    """For each group what its slots lose, ascending: one threshold for all groups decides what goes."""
    if options.scope == "local":
        return [(np.arange(group.slots) + 0.5) / group.slots for group in groups]
    slots = [_slot_scores(scores[group.name], group) for group in groups]
    if options.scope == "isomorphic":
        return _isomorphic_ranks(groups, slots)
    factors = [weight * options.sensitivity.get(g.name, 1.0) for g, weight in zip(groups, weights, strict=True)]
    return [factor * _losses(s, options.normalise) for factor, s in zip(factors, slots, strict=True)]


def _slot_scores(scores: Scores, group: Group) -> Scores:
    """Ascending: slot k is each part's k-th lowest channel, so that all parts (heads) lose equally many."""
    mean: Scores = np.sort(scores.reshape(group.parts, group.slots), axis=1).mean(axis=0)
    return mean


def _losses(slots: Scores, normalise: Normalise) -> Scores:
    """What the k-th lowest slot loses; under "share" of the logarithm of the group's score."""
    tiny = np.finfo(float).tiny
    left: Scores | float = 1.0
    if normalise == "share":
        left = np.cumsum(slots[::-1])[::-1] / len(slots)  # the score of slot k and all above
    elif normalise != "none":
        left = float(slots.mean() if normalise == "mean" else slots.max())
    losses: Scores = slots / np.maximum(left, tiny)
    return losses


def _isomorphic_ranks(groups: Sequence[Group], slots: Sequence[Scores]) -> list[Scores]:
    """Each slot's rank, as a share, among those of all groups of the same kind and size."""
    pooled: dict[tuple[str, int, int], list[Scores]] = {}
    keys = [(group.kind, group.num_channels, group.parts) for group in groups]
    for key, own in zip(keys, slots, strict=True):
        pooled.setdefault(key, []).append(own)
    ordered = {key: np.sort(np.concatenate(every)) for key, every in pooled.items()}
    shares = []
    for key, own in zip(keys, slots, strict=True):
        low, high = (np.searchsorted(ordered[key], own, side) for side in ("left", "right"))
        tied = np.arange(1, len(own) + 1) / len(own)  # of equal scores each group gives its share
        shares.append((low + (high - low) * tied) / len(ordered[key]))
    return shares


def _bisect(limits: Sequence[Limit], ranked: list[Scores], allowed: list[list[int]]) -> Widths:
    """Widths at the highest common threshold that does not yet meet all limits."""
    thresholds = np.unique(np.concatenate(ranked))
    low, high = 0, len(thresholds)  # index 0 removes nothing
    while high - low > 1:
        middle = (low + high) // 2
        if _missing(limits, _widths_at(thresholds[middle], ranked, allowed)) >= 0:
            low = middle
        else:
            high = middle
    return _widths_at(thresholds[low], ranked, allowed)


def _missing(limits: Sequence[Limit], widths: Widths) -> float:
    """How much, as a share of its whole, the limit furthest from being met still asks; below 0 all are exceeded."""
    return max(limit.rate - limit.removed(widths) for limit in limits)


def _widths_at(threshold: float, ranked: list[Scores], allowed: list[list[int]]) -> Widths:
    """Every slot below the threshold goes, then each width moves to the nearest one allowed."""
    widths = []
    for scores, options in zip(ranked, allowed, strict=True):
        wanted = len(scores) - int(np.searchsorted(scores, threshold))
        widths.append(min(options, key=lambda option: (abs(option - wanted), option)))
    return np.array(widths, dtype=np.int64)


def _spend_rest(limits: Sequence[Limit], ranked: list[Scores], allowed: list[list[int]], widths: Widths) -> Widths:
    """Take further single steps, those of the lowest mean loss first, while one overshoots by no more than `AIM`.

    Where all overshoot, the last step is the one that lands nearest, unless staying is nearer still.
    """
    while _missing(limits, widths) > AIM:
        trials = []
        for g, options in enumerate(allowed):
            i = options.index(int(widths[g]))
            if i > 0:
                gone = len(ranked[g]) - int(widths[g])
                trial = widths.copy()
                trial[g] = options[i - 1]
                trials.append((ranked[g][gone : len(ranked[g]) - options[i - 1]].mean(), g, trial))
        in_order = [trial for *_, trial in sorted(trials, key=lambda entry: entry[:2])]
        gentle = next((trial for trial in in_order if _missing(limits, trial) >= -AIM), None)
        if gentle is None:
            return min([widths, *in_order], key=lambda trial: abs(_missing(limits, trial)))
        widths = gentle
    return widths


def _keep(scores: Scores, group: Group, width: int) -> tuple[int, ...]:
    """In each part the `width` highest scores; of equal ones the first."""
    by_part = scores.reshape(group.parts, group.slots)
    best = np.argsort(-by_part, axis=1, kind="stable")[:, :width]
    flat = best + np.arange(group.parts)[:, None] * group.slots
    return tuple(sorted(int(c) for c in flat.ravel()))
