"""Plans that keep every stage uniform, so that transformers' own classes can hold the network.

Few things are free then: per stage its width, in which its heads take equal parts, and a whole ratio for its FFNs; and
one width in the decode head. Queries, keys, values and reductions follow the stage's width. From full widths the search
takes the step down with the lowest loss per price until the budget is met: a step's loss is what rate.py sums, over
all groups that it narrows, its price the share of parameters and MACs that it removes (costs.py). Costs are those of
the network with its decode head unfolded, as those classes compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, lcm
from typing import Any

import numpy as np

from segprune.checkpoint.published import uniform_problem
from segprune.model import SegFormer
from segprune.pruning.budget.costs import Costs, count_products, price_parts
from segprune.pruning.budget.rate import AIM, rank_slots
from segprune.pruning.groups import Group
from segprune.pruning.importance import Scores
from segprune.pruning.options import MAX_RATE, PruneOptions, RateOf
from segprune.pruning.patterns import match
from segprune.pruning.plan import Plan, check_widths, keep_best, read_plan
from segprune.pruning.prepare import Prepared
from segprune.pruning.surgery import cut_channels, read_spec
from segprune.shapes_only import without_weights
from segprune.spec import Spec, StageSpec, block_name, stage_name, with_unfolded_head
from segprune.stats import Counts, Layer, count, removed_shares

TOLERANCE = (
    0.02  # how far, as a share of the whole, the result may be from the rate: steps are coarse
)
NEAR = 0.005
HEAD = "decode_head.width"


def by_uniform_stages(
    prepared: Prepared, scores: Mapping[str, Scores], options: PruneOptions
) -> Plan:
    """Decides on widths that keep every stage uniform and remove the shares asked for, within `TOLERANCE`.

    Of several shares, of parameters and MACs, each is met at least and one about exactly. Raises ValueError for a
    network whose stages cannot be uniform, a rate that cannot be met, and a plan that is not uniform.
    """
    if not prepared.stock:
        raise ValueError(
            f"{type(prepared.dense).__name__} is not a stock SegFormer; only those have uniform stages."
        )

    # Search for widths, or take those that somebody has decided.
    if options.plan is None:
        widths: Mapping[str, int] = _search(prepared, scores, options)
    else:
        widths = read_plan(options.plan) if isinstance(options.plan, str) else options.plan
    plan = keep_best(prepared.groups, scores, check_widths(widths, prepared.groups))

    # What stock classes will hold: the cut network, with its decode head unfolded.
    dense, model = prepared.dense, prepared.model
    assert isinstance(dense, SegFormer)
    assert isinstance(model, SegFormer)

    # The meta device has shapes only, which is all that a spec is read from.
    with without_weights():
        network = SegFormer(model.spec)
    cut_channels(network, prepared.groups, plan)
    pruned = with_unfolded_head(read_spec(network))

    # A plan from a file may break uniformity.
    problem = uniform_problem(pruned)
    if problem is not None:
        raise ValueError(
            f"The plan is not uniform, since {problem}; edit it, or leave out `uniform`."
        )

    # Counted anew, since an unfolded head costs more than the folded one that was cut.
    shape = prepared.input_shape
    return replace(plan, removed=removed_shares(count(dense.spec, shape), count(pruned, shape)))


def _search(
    prepared: Prepared, scores: Mapping[str, Scores], options: PruneOptions
) -> dict[str, int]:
    """Returns widths by group that keep the network uniform and meet the budgets."""
    space, search = start_search(prepared, scores, options)
    choice = search.descend(options.budgets)

    # The budget furthest from being met decides.
    removed = search.removed(choice)
    unit = max(options.budgets, key=lambda unit: options.budgets[unit] - removed[unit])
    rate = options.budgets[unit]
    if abs(rate - removed[unit]) > TOLERANCE:
        raise ValueError(
            f"Rate {rate:g} of the {unit} cannot be met within {TOLERANCE:.0%} by uniform stages; ask for the nearest, "
            f"{removed[unit]:.3f}, or prune without `uniform`."
        )
    return space.widths(choice)


def start_search(
    prepared: Prepared, scores: Mapping[str, Scores], options: PruneOptions
) -> tuple[Space, Search]:
    """Returns the choices there are, and what each of them costs and loses."""
    dense, model, groups = prepared.dense, prepared.model, prepared.groups
    assert isinstance(dense, SegFormer)
    assert isinstance(model, SegFormer)

    # The ranking has no prices in it: the search divides by the price of a whole step.
    ranked = rank_slots(groups, scores, count_products(prepared.rows, groups), options)
    losses = {group.name: own for group, own in zip(groups, ranked, strict=True)}

    # Groups are those of the network to be cut.
    # Shares are of the dense one, before folding.
    problem = Problem(model.spec, dense.spec, prepared.input_shape, groups, prepared.rows)
    space = Space(model.spec, groups, options)
    price = options.group_price
    return space, Search(problem, space, losses, price_parts(price))


@dataclass(frozen=True)
class Choice:
    """Per stage its width and the ratio of its FFNs to it; and the decode head's width."""

    stages: tuple[tuple[int, int], ...]
    decoder_dim: int


@dataclass(frozen=True)
class Problem:
    """`spec` is the network that the groups, and its layers, `rows`, are of; shares are those of `whole`."""

    spec: Spec
    whole: Spec
    input_shape: tuple[int, int]
    groups: Sequence[Group]
    rows: Sequence[Layer]


class Space:
    """The choices there are, in a network `spec` whose free groups are `groups`.

    Widths are multiples of the heads and, but for the full one, of `round_to`; floors are those of rate.py. A group
    that is not free keeps its width. Raises ValueError for a stage that cannot be made uniform.
    """

    def __init__(self, spec: Spec, groups: Sequence[Group], options: PruneOptions) -> None:
        self.spec = spec
        self._round_to = options.round_to
        self._slots = {group.name: group.slots for group in groups}

        # The fewest slots that `max_rate` leaves. 1e-9 keeps rounding from adding one.
        limits = match(options.limits_by_name, groups, "max_rate")
        self._floors = {}
        for group in groups:
            kept = (1.0 - limits.get(group.name, MAX_RATE)) * group.slots
            self._floors[group.name] = max(1, ceil(kept - 1e-9))

        self.stages = [self._stage_options(i, stage) for i, stage in enumerate(spec.stages)]

        # The decode head may have any multiple of `round_to`, and its full width.
        dims = {*range(options.round_to, spec.decoder_dim, options.round_to), spec.decoder_dim}
        self.dims = sorted(dim for dim in dims if self._fits(HEAD, dim, spec.decoder_dim))

    def _fits(self, name: str, width: int, now: int) -> bool:
        if name not in self._slots:
            return width == now
        return self._floors[name] <= width <= self._slots[name]

    def _stage_options(self, i: int, stage: StageSpec) -> list[tuple[int, int]]:
        """Returns the widths and FFN ratios that stage `i` may have."""
        heads = stage.blocks[0].num_heads
        if not all(block.has_ffn and block.num_heads == heads > 0 for block in stage.blocks):
            raise ValueError(
                f"Stage {i + 1} has blocks without attention or FFN, or with different numbers of heads, which uniform "
                "stages do not; prune without `uniform`."
            )

        # Heads share the stage's width equally, so it is a multiple of their number.
        step = lcm(heads, self._round_to)
        full = stage.width - stage.width % heads
        narrowest_ffn = min(block.ffn_dim for block in stage.blocks)

        fitting = []
        for width in sorted({*range(step, full, step), full}):
            # FFNs are `ratio` times as wide as the stage, and no block's may become wider.
            for ratio in range(1, narrowest_ffn // width + 1):
                if all(self._fits(*entry) for entry in stage_widths(i, stage, width, ratio)):
                    fitting.append((width, ratio))

        if not fitting:
            raise ValueError(
                f"Stage {i + 1} cannot be made uniform, since its layers are too narrow, or protected at other widths; "
                "prune without `uniform`, or protect less."
            )
        return fitting

    def widest(self) -> Choice:
        return Choice(tuple(max(options) for options in self.stages), self.dims[-1])

    def widths(self, choice: Choice) -> dict[str, int]:
        """Returns the width of every free group, per part, in the groups' order."""
        # Widths of everything first. Only groups that are free are returned.
        chosen = {HEAD: choice.decoder_dim}
        for i, (stage, (width, ratio)) in enumerate(
            zip(self.spec.stages, choice.stages, strict=True)
        ):
            chosen |= {name: new for name, new, _ in stage_widths(i, stage, width, ratio)}
        return {name: chosen.get(name, slots) for name, slots in self._slots.items()}

    def steps(self, choice: Choice) -> Iterator[Choice]:
        """Yields every choice that is narrower in one place, with nothing in between."""
        for i, now in enumerate(choice.stages):
            # Options are ordered only in part: one is narrower if neither the stage nor its
            # FFNs grow. A step goes to those with no other option in between.
            narrower = [
                option for option in self.stages[i] if option != now and _is_within(option, now)
            ]
            for option in narrower:
                between = (
                    other for other in narrower if other != option and _is_within(option, other)
                )
                if not any(between):
                    yield _with_stage(choice, i, option)

        narrower_dims = [dim for dim in self.dims if dim < choice.decoder_dim]
        if narrower_dims:
            yield replace(choice, decoder_dim=narrower_dims[-1])

    def changed(self, choice: Choice) -> Iterator[Choice]:
        """Yields every choice that differs in one place."""
        for i, options in enumerate(self.stages):
            for option in options:
                yield _with_stage(choice, i, option)
        for dim in self.dims:
            yield replace(choice, decoder_dim=dim)


def _is_within(option: tuple[int, int], other: tuple[int, int]) -> bool:
    """Returns whether neither the stage nor its FFNs are wider than the other's."""
    (width, ratio), (other_width, other_ratio) = option, other
    return width <= other_width and width * ratio <= other_width * other_ratio


def _with_stage(choice: Choice, i: int, option: tuple[int, int]) -> Choice:
    return replace(choice, stages=(*choice.stages[:i], option, *choice.stages[i + 1 :]))


def stage_widths(
    i: int, stage: StageSpec, width: int, ratio: int
) -> Iterator[tuple[str, int, int]]:
    """Yields name, width per part and width now, of every group of stage `i`, made uniform."""
    yield f"{stage_name(i)}.width", width, stage.width
    for j, block in enumerate(stage.blocks):
        inside = block_name(i, j)
        yield f"{inside}.mlp.ffn", ratio * width, block.ffn_dim
        yield f"{inside}.attn.qk", width // block.num_heads, block.qk_dim
        yield f"{inside}.attn.v", width // block.num_heads, block.v_dim
        if block.reduction_dim is not None:
            yield f"{inside}.attn.reduction", width, block.reduction_dim


class Search:
    """What a choice costs and loses, each worked out once; and the way down."""

    _units: tuple[RateOf, ...] = ("params", "macs")

    def __init__(
        self,
        problem: Problem,
        space: Space,
        losses: Mapping[str, Scores],
        price: Mapping[RateOf, float],
    ) -> None:
        """`losses`: by group, of its slots, ascending. `price`: how much each unit weighs (costs.price_parts)."""
        self._problem, self._space, self._losses, self._price = problem, space, losses, price
        self._costs = {unit: Costs(problem.rows, problem.groups, unit) for unit in self._units}
        self._whole = count(problem.whole, problem.input_shape)

        # The way down meets the same choices again and again.
        self._unfolding = cache(self._cost_of_unfolding)
        self.removed = cache(self._removed)
        self._loss = cache(self._sum_of_losses)

    def _cost_of_unfolding(self, dim: int) -> Counts:
        """Returns what a decode head of that width costs more unfolded; it depends on nothing else."""
        spec, shape = self._problem.spec, self._problem.input_shape
        if not spec.folded:
            return Counts(0, 0, shape)

        # Everything but the decode head is the same in both, and cancels.
        folded = count(replace(spec, decoder_dim=dim), shape)
        whole = count(with_unfolded_head(replace(spec, decoder_dim=dim)), shape)
        return Counts(whole.parameters - folded.parameters, whole.macs - folded.macs, shape)

    def _removed(self, choice: Choice) -> Mapping[Any, float]:
        widths = np.array(list(self._space.widths(choice).values()), dtype=np.int64)

        # The cut network as it is, plus what unfolding its head adds.
        params, macs = (int(self._costs[unit].total(widths)) for unit in self._units)
        more = self._unfolding(choice.decoder_dim)
        pruned = Counts(params + more.parameters, macs + more.macs, more.input_shape)
        return removed_shares(self._whole, pruned)

    def _sum_of_losses(self, choice: Choice) -> float:
        widths = self._space.widths(choice)
        total = 0.0
        for name, losses in self._losses.items():
            # Losses ascend, so the first ones are removed. Divided by
            # the number of slots, groups of any size can be compared.
            removed = len(losses) - widths[name]
            total += float(losses[:removed].sum()) / len(losses)
        return total

    def loss_per_price(self, now: Choice, then: Choice) -> float:
        """Returns what a step loses for what it saves."""
        before, after = self.removed(now), self.removed(then)
        saved = sum(
            weight * (after[unit] - before[unit]) for unit, weight in self._price.items()
        )
        return (self._loss(then) - self._loss(now)) / max(saved, 1e-12)

    def descend(self, budgets: Mapping[RateOf, float]) -> Choice:
        """Returns the choice that the cheapest steps lead to, of which none overshoots by more than `AIM`.

        Where all overshoot, one more step and one thing set anew: of the choices within `NEAR` the one that loses
        least, or else the nearest.
        """

        def shortfall(choice: Choice) -> float:
            return max(rate - self.removed(choice)[unit] for unit, rate in budgets.items())

        choice = self._space.widest()
        while shortfall(choice) > AIM:
            now = choice
            steps = sorted(
                self._space.steps(now), key=lambda step: self.loss_per_price(now, step)
            )

            # Prefer the cheapest step that does not overshoot.
            for step in steps:
                if shortfall(step) >= -AIM:
                    choice = step
                    break
            else:
                return self._nearest([now, *steps], shortfall)

        return choice

    def _nearest(
        self, starts: Sequence[Choice], shortfall: Callable[[Choice], float]
    ) -> Choice:
        # Each start, and everything that differs from one of them in one place.
        around = list(starts)
        for start in starts:
            around += self._space.changed(start)

        near = [choice for choice in around if abs(shortfall(choice)) <= NEAR]
        return (
            min(near, key=self._loss)
            if near
            else min(around, key=lambda choice: abs(shortfall(choice)))
        )
