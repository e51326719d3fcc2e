"""Scores and budgets in, a plan out: channels are ranked, and the threshold is set where the budget is met.

The cost of any choice of widths is known (costs.py), so budgets are solved by bisection on one threshold for all
groups. What is compared across groups is, by default, a channel's share of the score that its group still has, times
the group's weight: the threshold then maximises the weighted sum of the logarithms of what the groups keep. A group
that costs much loses more, and the fewer channels it has, the more expensive the next one becomes. Widths are kept
multiples of `round_to`; what rounding leaves of the budget is spent on the remaining steps that lose least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from segprune.pruning.budget.costs import Cost, Costs, loss_weights
from segprune.pruning.groups import Group
from segprune.pruning.importance import Scores
from segprune.pruning.options import MAX_RATE, Normalise, PruneOptions, RateOf
from segprune.pruning.patterns import match
from segprune.pruning.plan import Plan, Widths, keep_best, widths_of
from segprune.pruning.prepare import Prepared

TOLERANCE = 0.01  # how far, as a share of the whole, the result may be from the rate
ADVISED_TRIES = 5  # for a rate that a refusal can advise
AIM = 0.001  # how near it is tried to come


@dataclass(frozen=True)
class Limit:
    """A budget: the share `rate` of `whole` (default: the cost at full widths) is to be removed."""

    cost: Cost
    rate: float
    rate_of: RateOf = "params"
    whole: float | None = None

    def removed(self, widths: Widths) -> float:
        """Returns the share that is removed then."""
        return 1.0 - self.cost.total(widths) / (self.whole or self.cost.total(self.cost.full))


def by_rate(prepared: Prepared, scores: Mapping[str, Scores], options: PruneOptions) -> Plan:
    """Decides by ranking all channels: the plan that meets every budget, as `solve` says."""
    limits = [limit_of(prepared, unit, rate) for unit, rate in options.budgets.items()]

    # The first budget decides whether groups are priced in channels, or in parameters and MACs.
    weights = loss_weights(
        prepared.rows,
        prepared.groups,
        next(iter(options.budgets), "params"),
        options.group_price,
    )
    plan = solve(limits, prepared.groups, scores, weights, options)
    return with_shares(prepared, plan, limits)


def limit_of(prepared: Prepared, unit: RateOf, rate: float) -> Limit:
    costs = Costs(
        prepared.rows, prepared.groups, unit, prepared.rest if unit == "params" else 0
    )
    return Limit(costs, rate, unit, prepared.wholes.get(unit))


def reach(prepared: Prepared, unit: RateOf, options: PruneOptions) -> tuple[float, float]:
    """Returns the share of a unit that disappears without any channel removed (folding), and the most that can."""
    allowed = allowed_widths(prepared.groups, options)
    widest = np.array([widths[-1] for widths in allowed], dtype=np.int64)
    narrowest = np.array([widths[0] for widths in allowed], dtype=np.int64)
    limit = limit_of(prepared, unit, 0.0)
    return limit.removed(widest), limit.removed(narrowest)


def group_shares(prepared: Prepared) -> dict[str, dict[str, float]]:
    """Returns by unit and group name the share of the network's cost that disappears with the whole group."""
    shares: dict[str, dict[str, float]] = {}
    for unit in ("params", "macs"):
        costs = Costs(prepared.rows, prepared.groups, unit)
        shares[unit] = {group.name: costs.share(g) for g, group in enumerate(prepared.groups)}
    return shares


def with_shares(prepared: Prepared, plan: Plan, limits: Sequence[Limit] = ()) -> Plan:
    """Returns the plan with the shares that it removes: of the limits' units, of parameters and of MACs."""
    widths = widths_of(plan, prepared.groups)

    # Parameters and MACs are always reported, also where no budget names them.
    every = {limit.rate_of: limit for limit in limits}
    for unit in ("params", "macs"):
        every.setdefault(unit, limit_of(prepared, unit, 0.0))
    return replace(plan, removed={unit: limit.removed(widths) for unit, limit in every.items()})


def solve(
    limits: Sequence[Limit],
    groups: Sequence[Group],
    scores: Mapping[str, Scores],
    weights: Sequence[float],
    options: PruneOptions | None = None,
) -> Plan:
    """Returns a plan that meets every budget. The tightest one is met within `TOLERANCE`; others may be exceeded.

    `weights`: what losing a share of each group weighs (costs.loss_weights). Without a limit only the options' shares
    by name are carried out. Raises ValueError, with the nearest rate that can be reached, for a rate beyond the
    floors, one that folding alone exceeds, and one so small that nothing would be removed.
    """
    options = options or PruneOptions()

    # What each group may become, and in which order its slots are removed.
    allowed = allowed_widths(groups, options)
    ranked = rank_slots(groups, scores, weights, options)
    narrowest = np.array([widths[0] for widths in allowed], dtype=np.int64)
    widths = np.array([widths[-1] for widths in allowed], dtype=np.int64)

    # Refuse first what no threshold can reach.
    for limit in limits:
        check_reach(limit, narrowest, options)
        check_least(limit, groups, options)

    def search(limits: Sequence[Limit]) -> Widths:
        # One threshold moves many groups at once and stops
        # short of the budget. Single steps spend the rest.
        return _spend_rest(limits, ranked, allowed, _bisect(limits, ranked, allowed))

    if limits:
        widths = search(limits)
    check_met(limits, groups, widths, options, search)
    removed = {limit.rate_of: limit.removed(widths) for limit in limits}
    return replace(keep_best(groups, scores, widths), removed=removed)


def check_reach(limit: Limit, narrowest: Widths, options: PruneOptions) -> None:
    """Raises ValueError where even the narrowest network allowed is above the budget."""
    most = limit.removed(narrowest)
    if limit.rate <= most + AIM:
        return

    # Say which setting is in the way: one limit for all groups, or several by name.
    by_name = options.limits_by_name.keys() - {"*"}
    share = (
        "what `max_rate` allows"
        if by_name
        else f"{options.limits_by_name.get('*', MAX_RATE):g} (`max_rate`)"
    )
    raise ValueError(
        f"Rate {limit.rate:g} is out of reach; the most that can be removed here is {int(most * 1000) / 1000:g}, "
        f"since no group loses more of its channels than {share}, and protected layers keep all."
    )


def check_least(limit: Limit, groups: Sequence[Group], options: PruneOptions) -> None:
    """Raises ValueError if folding (or shares by name) alone already removes more than the requested share."""
    # The network as folding and the shares by name leave it, with nothing else removed.
    widest = np.array(
        [widths[-1] for widths in allowed_widths(groups, options)], dtype=np.int64
    )
    least = limit.removed(widest)
    if limit.rate > least:
        return

    # Each cause has its own remedy.
    cause, remedy = "the shares by name alone", ""
    if not options.shares_by_name:
        cause = "folding the decode head alone"
        remedy = ", keep the head with `keep_decoder`, or remove no channels with rate 0"
    if options.kv_factors and limit.rate_of != "params":
        cause = f"`kv_reduction` with {cause.removesuffix(' alone')}"
    raise ValueError(
        f"Rate {limit.rate:g} is less than {cause} removes ({least:.3f}); ask for a higher rate{remedy}."
    )


def check_met(
    limits: Sequence[Limit],
    groups: Sequence[Group],
    widths: Widths,
    options: PruneOptions,
    search: Callable[[Sequence[Limit]], Widths] | None = None,
) -> None:
    """Raises ValueError where nothing is removed, and where the tightest budget is missed.

    With `search`, which finds widths for budgets, the rate that is advised is one that it meets.
    """
    # Finer steps exist only where a step is more than one channel.
    finer = ", or for finer steps with `round_to` 1" if options.round_to > 1 else ""
    if all(width == group.slots for width, group in zip(widths.tolist(), groups, strict=True)):
        rates = ", ".join(f"{limit.rate:g}" for limit in limits) or "by name"
        raise ValueError(
            f"Rate {rates} is too small to remove even one step of {options.round_to} channels; "
            f"ask for a higher rate{finer}."
        )

    if limits:
        # Other budgets may be exceeded. The tightest
        # one decides whether the plan is close enough.
        tightest = min(limits, key=lambda limit: limit.removed(widths) - limit.rate)
        removed = tightest.removed(widths)
        if abs(removed - tightest.rate) > TOLERANCE:
            # Coarse steps lead to other widths for another rate,
            # so what was reached once may not be reached again.
            for _ in range(ADVISED_TRIES if search is not None else 0):
                assert search is not None
                again = tightest.removed(search([replace(tightest, rate=removed)]))
                if abs(again - removed) <= TOLERANCE:
                    break
                removed = again
            raise ValueError(
                f"Rate {tightest.rate:g} of the {tightest.rate_of} cannot be met within {TOLERANCE:.0%} in steps of "
                f"{options.round_to} channels; ask for the nearest, {removed:.3f}{finer}."
            )


def allowed_widths(groups: Sequence[Group], options: PruneOptions) -> list[list[int]]:
    """Returns the widths that each group may have, ascending.

    The full one, and multiples of `round_to` down to what `max_rate` leaves; of whole heads any number. A group with
    a share by name may have one width only, the nearest to it.
    """
    limits = match(options.limits_by_name, groups, "max_rate")
    fixed = match(options.shares_by_name, groups, "pruning_rate")

    allowed = []
    for group in groups:
        step = 1 if group.kind == "head" else options.round_to

        # 1e-9: of ten channels a limit of 0.9 leaves one, and not two, in floating point.
        floor = 1
        if group.name not in fixed:
            floor = max(1, ceil((1.0 - limits.get(group.name, MAX_RATE)) * group.slots - 1e-9))

        # The full width is always allowed, also where it is no multiple of the step.
        widths = [*range(step * ceil(floor / step), group.slots, step), group.slots]

        if group.name in fixed:
            # A share by name leaves a single width, so that no search changes it.
            wanted = (1.0 - fixed[group.name]) * group.slots
            widths = [min(widths, key=lambda width: abs(width - wanted))]
        allowed.append(widths)
    return allowed


def rank_slots(
    groups: Sequence[Group],
    scores: Mapping[str, Scores],
    weights: Sequence[float],
    options: PruneOptions,
) -> list[Scores]:
    """Returns for each group, in ascending order of its slots, what is compared: the lowest of all is removed first."""
    # Local: a slot counts by its position in its own group, so all groups lose the same share.
    if options.scope == "local":
        return [(np.arange(group.slots) + 0.5) / group.slots for group in groups]

    slots = [_slot_scores(scores[group.name], group) for group in groups]
    if options.scope == "isomorphic":
        return _rank_isomorphic(groups, slots)

    # Global: losses times the groups' weights can be compared between groups.
    sensitivity = options.sensitivity if isinstance(options.sensitivity, Mapping) else {}
    ranked = []
    for group, weight, own in zip(groups, weights, slots, strict=True):
        ranked.append(
            weight * sensitivity.get(group.name, 1.0) * _losses(own, options.normalise)
        )
    return ranked


def _slot_scores(scores: Scores, group: Group) -> Scores:
    """Ascending: slot k is each part's k-th lowest channel, so that all parts (heads) lose equally many."""
    mean: Scores = np.sort(scores.reshape(group.parts, group.slots), axis=1).mean(axis=0)
    return mean


def _losses(slots: Scores, normalise: Normalise) -> Scores:
    """Returns what the k-th lowest slot loses; under "share" of the logarithm of the group's score."""
    whole: Scores | float = 1.0
    if normalise == "share":
        whole = np.cumsum(slots[::-1])[::-1] / len(slots)  # the score of slot k and all above
    elif normalise == "mean":
        whole = float(slots.mean())
    elif normalise == "max":
        whole = float(slots.max())

    # `tiny`: a group whose scores are all zero loses nothing, instead of NaN.
    losses: Scores = slots / np.maximum(whole, np.finfo(float).tiny)
    return losses


def _rank_isomorphic(groups: Sequence[Group], slots: Sequence[Scores]) -> list[Scores]:
    """Returns each slot's rank, as a share, among those of all groups of the same kind and size."""
    # Groups of the same kind and size are compared directly, without weights.
    keys = [(group.kind, group.num_channels, group.parts) for group in groups]
    pooled: dict[tuple[str, int, int], list[Scores]] = {}
    for key, own in zip(keys, slots, strict=True):
        pooled.setdefault(key, []).append(own)
    ordered = {key: np.sort(np.concatenate(pool)) for key, pool in pooled.items()}

    # A slot's rank is the share of its pool that lies at or below it.
    ranks = []
    for key, own in zip(keys, slots, strict=True):
        low = np.searchsorted(ordered[key], own, "left")
        high = np.searchsorted(ordered[key], own, "right")

        # Of equal scores each group loses its share.
        tied = np.arange(1, len(own) + 1) / len(own)
        ranks.append((low + (high - low) * tied) / len(ordered[key]))
    return ranks


def _bisect(limits: Sequence[Limit], ranked: list[Scores], allowed: list[list[int]]) -> Widths:
    """Returns the widths at the highest common threshold that does not yet meet all limits."""
    # The result changes only at the scores themselves, so these
    # are all thresholds to try. A higher one removes more.
    thresholds = np.unique(np.concatenate(ranked))
    low, high = 0, len(thresholds)  # index 0 removes nothing
    while high - low > 1:
        middle = (low + high) // 2
        widths = _widths_at(thresholds[middle], ranked, allowed)
        if _shortfall(limits, widths) >= 0:
            low = middle
        else:
            high = middle
    return _widths_at(thresholds[low], ranked, allowed)


def _shortfall(limits: Sequence[Limit], widths: Widths) -> float:
    """Returns how much the limit furthest from being met still asks, as a share; below 0 all are exceeded."""
    return max(limit.rate - limit.removed(widths) for limit in limits)


def _widths_at(threshold: float, ranked: list[Scores], allowed: list[list[int]]) -> Widths:
    """Removes every slot below the threshold, then moves each width to the nearest one allowed."""
    widths = []
    for scores, options in zip(ranked, allowed, strict=True):
        # Scores ascend, so searchsorted counts those below the threshold. Of two widths
        # equally near the narrower one is taken.
        wanted = len(scores) - int(np.searchsorted(scores, threshold))
        widths.append(min(options, key=lambda option: (abs(option - wanted), option)))
    return np.array(widths, dtype=np.int64)


def _spend_rest(
    limits: Sequence[Limit], ranked: list[Scores], allowed: list[list[int]], widths: Widths
) -> Widths:
    """Takes further single steps, those of the lowest mean loss first, while one overshoots by no more than `AIM`."""
    while _shortfall(limits, widths) > AIM:
        candidates = _narrow_one_group(ranked, allowed, widths)  # cheapest loss first

        # Prefer the cheapest step that does not overshoot the budget.
        for candidate in candidates:
            if _shortfall(limits, candidate) >= -AIM:
                widths = candidate
                break
        else:
            # Every step overshoots: take whatever lands
            # nearest, even if that is standing still.
            return min([widths, *candidates], key=lambda trial: abs(_shortfall(limits, trial)))

    return widths


def _narrow_one_group(
    ranked: list[Scores], allowed: list[list[int]], widths: Widths
) -> list[Widths]:
    """Returns the widths after one step in each group that has one, in ascending order of the step's mean loss."""
    steps = []
    for g, options in enumerate(allowed):
        i = options.index(int(widths[g]))
        if i == 0:
            continue

        narrower = widths.copy()
        narrower[g] = options[i - 1]

        # The loss of a step is the mean over the slots
        # that it removes, the next ones in `ranked`.
        removed_now, removed_then = len(ranked[g]) - options[i], len(ranked[g]) - options[i - 1]
        steps.append((float(ranked[g][removed_now:removed_then].mean()), g, narrower))

    return [narrower for _, _, narrower in sorted(steps, key=lambda step: step[:2])]
