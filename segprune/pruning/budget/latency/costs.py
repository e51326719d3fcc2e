"""The latency of a SegFormer as a function of its groups' widths, interpolated between measured steps.

S is the number of steps of a forward pass, L of the network's layers, P of the points that an axis is padded to.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, product

import numpy as np
from torch import nn

from segprune.pruning.budget.costs import Costs
from segprune.pruning.budget.latency.steps import Shape, Side, Step, steps
from segprune.pruning.budget.latency.table import LatencyTable
from segprune.pruning.groups import Group
from segprune.pruning.plan import Widths
from segprune.spec import Spec
from segprune.stats import layers
from segprune.timing import Progress, measure_latency

SHARES = (
    0.125,
    0.25,
    0.5,
    0.75,
)  # of a width, at which its steps are measured, beside the whole
MULTIPLE = 8  # of which the measured widths are multiples; below it nothing gets faster
NUM_POINTS = (
    len(SHARES) + 2
)  # the whole width, and one point beyond it that every axis is padded with
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Axes = tuple[tuple[int, ...], tuple[int, ...]]


class LatencyCosts:
    """Predicted ms of one image at any widths: every step's time added up.

    A step is measured on a grid of its one or two widths, made monotone by running maxima (nothing gets slower by
    becoming narrower), and interpolated linearly in between. Of an attention that loses whole heads the time falls
    in proportion. What is missing in `table` is measured here, which takes some ten seconds the first time.
    """

    def __init__(
        self,
        spec: Spec,
        groups: Sequence[Group],
        table: LatencyTable,
        input_shape: tuple[int, int],
        progress: Progress | None = None,
    ) -> None:
        # Widths follow from the groups as in every other
        # cost. Only the price of a width is measured.
        rows = layers(spec, input_shape)
        self._sides = Costs(rows, groups, "macs")
        self.groups, self.full = groups, self._sides.full
        self.table, self.input_shape = table, input_shape

        all_steps = steps(spec, input_shape)
        self._find_widths(all_steps, [row.name for row in rows])

        # A width can change if it is narrower once every group has a single channel left.
        narrowest = self._sides.dims(np.ones_like(self.full))
        movable: set[Side] = set()
        for i, row in enumerate(rows):
            if narrowest[0, i] < row.in_dim:
                movable.add((row.name, 0))
            if narrowest[1, i] < row.out_dim:
                movable.add((row.name, 1))

        # A width that cannot change needs a single measured point.
        axes = [_axes(step, movable) for step in all_steps]
        self._measure(all_steps, axes, progress)

    def total(self, widths: Widths) -> float:
        """Returns the predicted ms; 0 < widths <= full."""
        # The 1 behind all widths and all groups is for steps without
        # a second width or without heads, see `_find_widths`.
        dims = np.append(self._sides.dims(widths), 1.0)
        head_shares = np.append(widths / self.full, 1.0)[self._head_group]

        # The wider one counts where a step has two widths for
        # its first: queries and values of attention, per head.
        first = np.maximum(dims[self._first], dims[self._other]) / (
            self._num_heads * head_shares
        )
        times_ms = _interpolate(self._grid, self._times_ms, first, dims[self._second])
        return float((head_shares * times_ms).sum())

    def _find_widths(self, all_steps: Sequence[Step], names: list[str]) -> None:
        """Sets where each step finds its widths among the inputs and outputs of all layers, 2 L, and a 1 behind them.

        `_second` points at that 1 where a step has one width alone. `_head_group` points at the group of whole heads
        of an attention, and at a 1 behind all groups for every other step.
        """
        # Inputs of all layers first, then outputs, as `Costs.dims` (2 L) lies in memory.
        place: dict[Side, int] = {}
        for i, name in enumerate(names):
            place[name, 0] = i
            place[name, 1] = len(names) + i
        head_group = {
            group.name.removesuffix(".heads"): g
            for g, group in enumerate(self.groups)
            if group.kind == "head"
        }
        one, no_group = 2 * len(names), len(self.groups)

        # A row per step: first width, its alternative, second width, heads, group of the heads.
        columns = []
        for step in all_steps:
            first, last = place[step.sides[0]], place[step.sides[-1]]
            if step.shape.kind == "attention":
                name, num_heads = step.sides[0][0], step.shape.sizes[1]
                columns.append((first, last, one, num_heads, head_group.get(name, no_group)))
            elif len(step.sides) == 2:
                columns.append((first, first, last, 1, no_group))
            else:
                columns.append((first, first, one, 1, no_group))

        table = np.array(columns, dtype=np.int64)  # S 5
        self._first, self._other, self._second, self._num_heads, self._head_group = table.T

    def _measure(
        self, all_steps: Sequence[Step], axes: Sequence[Axes], progress: Progress | None
    ) -> None:
        """Sets `_grid` (S 2 P), the widths of every step at which it was measured, and `_times_ms` there (S P P)."""
        # Ask for all shapes together, so that they are measured in turns.
        shapes = [
            _shapes_on_grid(step.shape, pair)
            for step, pair in zip(all_steps, axes, strict=True)
        ]
        self.table.require(chain.from_iterable(shapes), progress)

        self._grid = np.array(
            [[_padded(first), _padded(second)] for first, second in axes], dtype=np.float64
        )
        self._times_ms = np.empty((len(all_steps), NUM_POINTS, NUM_POINTS))

        for i, (first, second) in enumerate(axes):
            measured = [self.table.time_ms(shape) for shape in shapes[i]]
            times_ms = np.array(measured).reshape(len(first), len(second))

            # Measurements scatter; but nothing gets slower by becoming narrower.
            times_ms = np.maximum.accumulate(times_ms, axis=0)
            times_ms = np.maximum.accumulate(times_ms, axis=1)

            # The last value is repeated up to P points, so that one array holds all steps.
            missing = [(0, NUM_POINTS - size) for size in times_ms.shape]
            self._times_ms[i] = np.pad(times_ms, missing, mode="edge")


def dense_in_predicted_ms(dense: nn.Module, model: nn.Module, costs: LatencyCosts) -> float:
    """Returns what `costs`, which describe `model`, would say of `dense`, the network before its head was folded.

    Both are measured in turns, so that only their ratio counts and the state of the machine does not.
    """
    place = costs.table.place
    before, after = measure_latency(
        [dense, model],
        costs.input_shape,
        device=place.device,
        precision=place.precision,
        max_runs=100,
    )
    return costs.total(costs.full) * before.median_ms / after.median_ms


def _axes(step: Step, movable: set[Side]) -> Axes:
    """Returns the widths at which a step is measured, ascending, of its first and of its second width."""
    dims = step.shape.dims
    if step.shape.kind == "attention":
        return _axis(dims[0], not movable.isdisjoint(step.sides)), (1,)
    if len(dims) == 1:
        return _axis(dims[0], step.sides[0] in movable), (1,)
    return _axis(dims[0], step.sides[0] in movable), _axis(dims[1], step.sides[1] in movable)


def _axis(full: int, is_movable: bool) -> tuple[int, ...]:
    if not is_movable:
        return (full,)
    rounded = {max(MULTIPLE, MULTIPLE * round(share * full / MULTIPLE)) for share in SHARES}
    return (*sorted(width for width in rounded if width < full), full)


def _shapes_on_grid(full: Shape, axes: Axes) -> list[Shape]:
    return [Shape(full.kind, full.sizes, dims[: len(full.dims)]) for dims in product(*axes)]


def _padded(axis: tuple[int, ...]) -> list[int]:
    """Returns the axis with widths beyond the full one, which none reaches, up to `NUM_POINTS`."""
    return [*axis, *(axis[-1] + 1 + i for i in range(NUM_POINTS - len(axis)))]


def _interpolate(grid: Floats, values: Floats, x: Floats, y: Floats) -> Floats:
    """Returns the value at (x, y) of each of S surfaces (grid S 2 P, values S P P); outside the grid its rim's."""
    every = np.arange(len(x))

    # Bilinear: the cell that holds (x, y), and how far along each of its sides the point lies.
    i, x_share = _find_cell(grid[:, 0], x)
    j, y_share = _find_cell(grid[:, 1], y)

    # Along y on the cell's two sides first, then between the sides along x.
    lower = values[every, i, j] * (1.0 - y_share) + values[every, i, j + 1] * y_share
    upper = values[every, i + 1, j] * (1.0 - y_share) + values[every, i + 1, j + 1] * y_share
    result: Floats = lower * (1.0 - x_share) + upper * x_share
    return result


def _find_cell(axis: Floats, at: Floats) -> tuple[Ints, Floats]:
    """Returns the point of each axis (S P) that lies below `at`, and the share of the way to the next, in [0, 1]."""
    below = (axis[:, :-1] <= at[:, None]).sum(axis=1) - 1
    i = np.maximum(below, 0)  # what lies before the first point takes its value

    every = np.arange(len(at))
    start, end = axis[every, i], axis[every, i + 1]
    return i, np.clip((at - start) / (end - start), 0.0, 1.0)
