"""The latency of a SegFormer as a function of its groups' widths, interpolated between measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from torch import nn

from segprune.pruning.costs import Costs, Widths
from segprune.pruning.groups import Group
from segprune.pruning.latency.steps import Shape, Step, steps
from segprune.pruning.latency.table import LatencyTable, Progress
from segprune.spec import Spec
from segprune.stats import layers, measure_latency

SHARES = (0.125, 0.25, 0.5, 0.75)  # of a width, at which its steps are measured, beside the whole
MULTIPLE = 8  # of which the measured widths are multiples; below it nothing gets faster
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Axes = tuple[tuple[int, ...], tuple[int, ...]]


class LatencyCosts:
    """Predicted ms of one batch at any widths: every step's time added up.

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
        batch: int = 1,
        progress: Progress | None = None,
    ) -> None:
        rows = layers(spec, input_shape)
        self._sides = Costs(rows, groups, "macs")
        self.groups = groups
        self.full = self._sides.full
        self.table, self.input_shape, self.batch = table, input_shape, batch
        found = steps(spec, input_shape, batch)
        self._place_widths(found, [row.name for row in rows])
        narrow = self._sides.dims(np.ones_like(self.full))
        movable = {
            (row.name, side): narrow[side, i] < dim
            for i, row in enumerate(rows)
            for side, dim in enumerate((row.in_dim, row.out_dim))
        }
        self._fill(found, [tuple(movable[side] for side in step.sides) for step in found], progress)

    def total(self, widths: Widths) -> float:
        """ms; 0 < widths <= full."""
        dims = np.append(self._sides.dims(widths), 1.0)  # the one is the second width of steps that have a single one
        heads = np.append(widths / self.full, 1.0)[self._heads]
        x = np.maximum(dims[self._first], dims[self._other]) / (self._num_heads * heads)
        return float((heads * _bilinear(self._grid, self._values, x, dims[self._second])).sum())

    def _place_widths(self, found: Sequence[Step], names: list[str]) -> None:
        """For every step, which of the 2 L widths it reads: `_first` or, for attention, the larger of that and `_other`
        per head; and `_second`."""
        index = {(name, side): side * len(names) + i for i, name in enumerate(names) for side in (0, 1)}
        of_heads = {group.name.removesuffix(".heads"): g for g, group in enumerate(self.groups) if group.kind == "head"}
        none, no_group = 2 * len(names), len(self.groups)
        columns = []
        for step in found:
            first, last = index[step.sides[0]], index[step.sides[-1]]
            if step.shape.kind == "attention":
                columns.append((first, last, none, step.shape.sizes[1], of_heads.get(step.sides[0][0], no_group)))
            else:
                columns.append((first, first, last if len(step.sides) == 2 else none, 1, no_group))
        self._first, self._other, self._second, self._num_heads, self._heads = np.array(columns, dtype=np.int64).T

    def _fill(self, found: Sequence[Step], movable: Sequence[tuple[bool, ...]], progress: Progress | None) -> None:
        """Measure all grids, and set `_grid` (S 2 P) and `_values` (S P P) of the S steps."""
        axes = [_axes(step, moves) for step, moves in zip(found, movable, strict=True)]
        points = [_points(step.shape, pair) for step, pair in zip(found, axes, strict=True)]
        self.table.require([shape for shapes in points for shape in shapes], progress)
        size = 1 + len(SHARES) + 1
        self._grid = np.array([[_padded(axis, size) for axis in pair] for pair in axes], dtype=np.float64)
        self._values = np.empty((len(found), size, size))
        for i, (pair, shapes) in enumerate(zip(axes, points, strict=True)):
            times = np.array([self.table.time_ms(shape) for shape in shapes]).reshape([len(axis) for axis in pair])
            for axis in (0, 1):
                times = np.maximum.accumulate(times, axis=axis)
            self._values[i] = np.pad(times, [(0, size - n) for n in times.shape], mode="edge")


def measured_ratio(model: nn.Module, costs: LatencyCosts, *, max_seconds: float = 3.0) -> float:
    """What the network that `costs` describes takes, as a multiple of what they predict for it at full widths."""
    return _measured_ms([model], costs, max_seconds)[0] / costs.total(costs.full)


def dense_in_predicted_ms(
    dense: nn.Module, model: nn.Module, costs: LatencyCosts, *, max_seconds: float = 3.0
) -> float:
    """What `costs`, which describe `model`, would say of `dense`, the network before its decode head was folded.

    Both are measured in turn, so that only their ratio counts and the state of the machine does not.
    """
    dense_ms, model_ms = _measured_ms([dense, model], costs, max_seconds)
    return costs.total(costs.full) * dense_ms / model_ms


def _measured_ms(models: Sequence[nn.Module], costs: LatencyCosts, max_seconds: float) -> list[float]:
    device = costs.table.place.device
    found = measure_latency(
        models, costs.input_shape, device=device, batch=costs.batch, max_runs=100, max_seconds=max_seconds
    )
    return [latency.median_ms for latency in found]


def _axes(step: Step, movable: tuple[bool, ...]) -> Axes:
    """The widths at which a step is measured, ascending, for its first and its second width."""
    if step.shape.kind == "attention":
        return _axis(step.shape.dims[0], any(movable)), (1,)
    first, *second = (_axis(dim, moves) for dim, moves in zip(step.shape.dims, movable, strict=True))
    return first, second[0] if second else (1,)


def _axis(full: int, movable: bool) -> tuple[int, ...]:
    if not movable:
        return (full,)
    rounded = {max(MULTIPLE, MULTIPLE * round(share * full / MULTIPLE)) for share in SHARES}
    return (*sorted(width for width in rounded if width < full), full)


def _points(full: Shape, axes: Axes) -> list[Shape]:
    return [Shape(full.kind, full.sizes, dims[: len(full.dims)]) for dims in product(*axes)]


def _padded(axis: tuple[int, ...], size: int) -> list[int]:
    """Filled up with widths beyond the full one, which none reaches."""
    return [*axis, *(axis[-1] + 1 + i for i in range(size - len(axis)))]


def _bilinear(grid: Floats, values: Floats, x: Floats, y: Floats) -> Floats:
    """Of S surfaces (grid S 2 P, values S P P) the value at (x, y), S; outside the grid that of its rim."""
    every = np.arange(len(x))
    (i, across), (j, along) = (_cell(grid[:, axis], at) for axis, at in enumerate((x, y)))
    low = values[every, i, j] * (1.0 - along) + values[every, i, j + 1] * along
    high = values[every, i + 1, j] * (1.0 - along) + values[every, i + 1, j + 1] * along
    result: Floats = low * (1.0 - across) + high * across
    return result


def _cell(axis: Floats, at: Floats) -> tuple[Ints, Floats]:
    """Between which two points of its axis (S P) each lies, and how far along, in [0, 1]."""
    i = np.maximum((at[:, None] >= axis[:, :-1]).sum(axis=1) - 1, 0)
    every = np.arange(len(at))
    low, high = axis[every, i], axis[every, i + 1]
    return i, np.clip((at - low) / (high - low), 0.0, 1.0)
