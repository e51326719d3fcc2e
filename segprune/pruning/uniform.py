"""Plans that keep every stage uniform, so that transformers' own classes can hold the network.

Few things are free then: per stage its width, in which its heads take equal parts, and a whole ratio for its FFNs; and
one width in the decode head. Queries, keys, values and reductions follow the stage's width. From full widths the search
takes the step down with the lowest loss per price until the budget is met: a step's loss is what plan.py sums, over
all groups that it narrows, its price the share of parameters and MACs that goes (costs.py). Costs are those of the
network with its decode head unfolded, as those classes compute it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, lcm

import numpy as np
import torch

from segprune.model import SegFormer
from segprune.pruning.costs import MACS_WEIGHT, Costs, Price, RateOf, reaches
from segprune.pruning.groups import Group
from segprune.pruning.importance import Scores
from segprune.pruning.patterns import match
from segprune.pruning.plan import AIM, MAX_RATE, Plan, PlanOptions, rank_slots
from segprune.pruning.surgery import cut, read_spec
from segprune.spec import Spec, StageSpec
from segprune.stats import Counts, Layer, count

TOLERANCE = 0.02  # how far, as a share of the whole, the result may be from the rate: steps are coarse
NEAR = 0.005
HEAD = "decode_head.width"


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

    Widths are multiples of the heads and, but for the full one, of `options.round_to`; floors are those of plan.py. A
    group that is not free keeps its width. ValueError for a stage that cannot be made uniform.
    """

    def __init__(self, spec: Spec, groups: Sequence[Group], options: PlanOptions) -> None:
        self.spec, self._round_to = spec, options.round_to
        most = match(options.max_rate, groups, "--max_rate")
        self._slots = {group.name: group.slots for group in groups}
        self._floors = {g.name: ceil((1.0 - most.get(g.name, MAX_RATE)) * g.slots - 1e-9) for g in groups}
        self.stages = [self._stage_options(i, stage) for i, stage in enumerate(spec.stages)]
        dims = {*range(options.round_to, spec.decoder_dim, options.round_to), spec.decoder_dim}
        self.dims = sorted(dim for dim in dims if self._fits(HEAD, dim, spec.decoder_dim))

    def _fits(self, name: str, width: int, now: int) -> bool:
        if name not in self._slots:
            return width == now
        return max(self._floors[name], 1) <= width <= self._slots[name]

    def _stage_options(self, i: int, stage: StageSpec) -> list[tuple[int, int]]:
        heads = stage.blocks[0].num_heads
        if not all(block.has_ffn and block.num_heads == heads > 0 for block in stage.blocks):
            raise ValueError(
                f"Stage {i + 1} has blocks without attention or FFN, or with different numbers of heads, which uniform "
                "stages do not; prune without --uniform."
            )
        step = lcm(heads, self._round_to)
        full = stage.width - stage.width % heads
        found = [
            (width, ratio)
            for width in sorted({*range(step, full, step), full})
            for ratio in range(1, min(block.ffn_dim for block in stage.blocks) // width + 1)
            if all(self._fits(*entry) for entry in stage_widths(i, stage, width, ratio))
        ]
        if not found:
            raise ValueError(
                f"Stage {i + 1} cannot be made uniform, since its layers are too narrow, or protected at other widths; "
                "prune without --uniform, or protect less."
            )
        return found

    def widest(self) -> Choice:
        return Choice(tuple(max(options, key=lambda o: (o[0], o[1])) for options in self.stages), self.dims[-1])

    def widths(self, choice: Choice) -> dict[str, int]:
        """Of every free group, per part, in the groups' order."""
        found = {HEAD: choice.decoder_dim}
        for i, (stage, option) in enumerate(zip(self.spec.stages, choice.stages, strict=True)):
            found |= {name: width for name, width, _ in stage_widths(i, stage, *option)}
        return {name: found.get(name, slots) for name, slots in self._slots.items()}

    def steps(self, choice: Choice) -> Iterator[Choice]:
        """Every choice that is narrower in one place, with nothing in between."""
        for i, (width, ratio) in enumerate(choice.stages):
            below = [
                o for o in self.stages[i] if o[0] <= width and o[0] * o[1] <= width * ratio and o != (width, ratio)
            ]
            for o in below:
                between = (p for p in below if p != o and p[0] >= o[0] and p[0] * p[1] >= o[0] * o[1])
                if not any(between):
                    yield replace(choice, stages=(*choice.stages[:i], o, *choice.stages[i + 1 :]))
        lower = [dim for dim in self.dims if dim < choice.decoder_dim]
        if lower:
            yield replace(choice, decoder_dim=lower[-1])

    def changed(self, choice: Choice) -> Iterator[Choice]:
        """Every choice that differs in one place."""
        for i, options in enumerate(self.stages):
            for o in options:
                yield replace(choice, stages=(*choice.stages[:i], o, *choice.stages[i + 1 :]))
        yield from (replace(choice, decoder_dim=dim) for dim in self.dims)


def stage_widths(i: int, stage: StageSpec, width: int, ratio: int) -> Iterator[tuple[str, int, int]]:
    """Name, width per part and width now, of every group of stage `i`, made uniform."""
    prefix = f"encoder.stages.{i}"
    yield f"{prefix}.width", width, stage.width
    for j, block in enumerate(stage.blocks):
        inside = f"{prefix}.blocks.{j}"
        yield f"{inside}.mlp.ffn", ratio * width, block.ffn_dim
        yield f"{inside}.attn.qk", width // block.num_heads, block.qk_dim
        yield f"{inside}.attn.v", width // block.num_heads, block.v_dim
        if block.reduction_dim is not None:
            yield f"{inside}.attn.reduction", width, block.reduction_dim


class Search:
    """What a choice costs and loses, each worked out once; and the way down."""

    _units: tuple[RateOf, ...] = ("params", "macs")

    def __init__(self, problem: Problem, space: Space, losses: Mapping[str, Scores], price: Price) -> None:
        """`losses`: by group, of its slots, ascending; compared per price, so in units of the whole group's."""
        self._problem, self._space, self._losses = problem, space, losses
        self._parts: dict[RateOf, float] = {"params": 1.0 - MACS_WEIGHT, "macs": MACS_WEIGHT}
        if price in ("params", "macs"):
            self._parts = {price: 1.0}
        self._costs = {unit: Costs(problem.rows, problem.groups, unit) for unit in self._units}
        self._whole = count(problem.whole, problem.input_shape)
        self._unfolding = cache(self._cost_of_unfolding)
        self.removed = cache(self._removed)
        self._loss = cache(self._sum_of_losses)

    def _cost_of_unfolding(self, dim: int) -> Counts:
        """What a decode head of that width costs more unfolded; it depends on nothing else."""
        spec, shape = self._problem.spec, self._problem.input_shape
        if not spec.folded:
            return Counts(0, 0, shape)
        folded = count(replace(spec, decoder_dim=dim), shape)
        whole = count(replace(spec, decoder_dim=dim, branch_dims=(dim,) * len(spec.stages)), shape)
        return Counts(whole.parameters - folded.parameters, whole.macs - folded.macs, shape)

    def _removed(self, choice: Choice) -> dict[RateOf, float]:
        widths = np.array(list(self._space.widths(choice).values()), dtype=np.int64)
        params, macs = (int(self._costs[unit].total(widths)) for unit in self._units)
        more = self._unfolding(choice.decoder_dim)
        return _shares(Counts(params + more.parameters, macs + more.macs, more.input_shape), self._whole)

    def _sum_of_losses(self, choice: Choice) -> float:
        widths = self._space.widths(choice)
        return sum(float(own[: len(own) - widths[name]].sum()) / len(own) for name, own in self._losses.items())

    def dearness(self, now: Choice, then: Choice) -> float:
        """What the step loses per price."""
        before, after = self.removed(now), self.removed(then)
        gone = sum(weight * (after[unit] - before[unit]) for unit, weight in self._parts.items())
        return (self._loss(then) - self._loss(now)) / max(gone, 1e-12)

    def descend(self, asked: Mapping[RateOf, float]) -> Choice:
        """By the cheapest steps that overshoot by no more than `AIM`.

        Where all do, one step more and one thing set anew: of the choices within `NEAR` the one that loses least, or
        the nearest.
        """

        def missing(choice: Choice) -> float:
            return max(rate - self.removed(choice)[unit] for unit, rate in asked.items())

        choice = self._space.widest()
        while missing(choice) > AIM:
            steps = sorted(self._space.steps(choice), key=lambda step: self.dearness(choice, step))
            gentle = next((step for step in steps if missing(step) >= -AIM), None)
            if gentle is None:
                around = [other for start in (choice, *steps) for other in (start, *self._space.changed(start))]
                near = [other for other in around if abs(missing(other)) <= NEAR]
                return min(near, key=self._loss) if near else min(around, key=lambda other: abs(missing(other)))
            choice = gentle
        return choice


def solve_uniform(
    problem: Problem, asked: Mapping[RateOf, float], scores: Mapping[str, Scores], options: PlanOptions, price: Price
) -> dict[str, int]:
    """Widths by group that keep the network uniform and remove the shares `asked`, within `TOLERANCE`.

    Of several shares, of parameters and MACs, each goes at least and one about exactly. ValueError for a stage that
    cannot be uniform and for a rate that cannot be met.
    """
    groups = problem.groups
    losses = rank_slots(groups, scores, reaches(problem.rows, groups), options)
    by_name = {group.name: own for group, own in zip(groups, losses, strict=True)}
    space = Space(problem.spec, groups, options)
    search = Search(problem, space, by_name, price)
    choice = search.descend(asked)
    removed = search.removed(choice)
    unit = max(asked, key=lambda unit: asked[unit] - removed[unit])
    if abs(asked[unit] - removed[unit]) > TOLERANCE:
        raise ValueError(
            f"Rate {asked[unit]:g} of the {unit} cannot be met within {TOLERANCE:.0%} by uniform stages; ask for the "
            f"nearest, {removed[unit]:.3f}, or prune without --uniform."
        )
    return space.widths(choice)


def removed_unfolded(
    spec: Spec, whole: Spec, input_shape: tuple[int, int], groups: Sequence[Group], plan: Plan
) -> dict[RateOf, float]:
    """The shares of `whole` that a plan removes from `spec`, the decode head being unfolded afterwards."""
    with torch.device("meta"):
        model = SegFormer(spec)
    cut(model, groups, plan)
    left = read_spec(model)
    if left.folded:
        left = replace(left, branch_dims=(left.decoder_dim,) * len(left.stages))
    return _shares(count(left, input_shape), count(whole, input_shape))


def _shares(left: Counts, whole: Counts) -> dict[RateOf, float]:
    return {"params": 1.0 - left.parameters / whole.parameters, "macs": 1.0 - left.macs / whole.macs}
