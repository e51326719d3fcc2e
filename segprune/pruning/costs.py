"""What a network costs as a function of its groups' widths, in closed form; and what losing part of a group weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from segprune.pruning.groups import Group
from segprune.stats import Layer

RateOf = Literal["params", "macs", "channels", "latency"]
RATES: tuple[RateOf, ...] = ("params", "macs", "channels", "latency")
Price = Literal["both", "params", "macs", "none"]
MACS_WEIGHT = 0.6  # of MACs beside parameters in a group's price; measured, see docs/log.md
Widths = np.ndarray[tuple[int], np.dtype[np.int64]]
Dims = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Coefficients = np.ndarray[tuple[int, int], np.dtype[np.float64]]  # (a, b, c) of each layer: 3 L


class Cost(Protocol):
    """What a budget is a share of: `total` of the groups' widths, never smaller for wider groups."""

    groups: Sequence[Group]
    full: Widths

    def total(self, widths: Widths) -> float: ...


class Costs:
    """Cost of a network as a function of its groups' widths (slots that stay, in the order of `groups`).

    A layer's side is as wide as its groups leave it, times the share of heads that stay.
    """

    def __init__(self, layers: Sequence[Layer], groups: Sequence[Group], rate_of: RateOf, rest: int = 0) -> None:
        self.layers, self.groups = layers, groups
        self.full = np.array([group.slots for group in groups], dtype=np.int64)
        self.rest = rest  # what lies in no listed layer
        self._dims = np.array([[row.in_dim, row.out_dim] for row in layers], dtype=np.float64).T  # 2 L
        self._per_slot = np.zeros((2, len(layers), len(groups)))
        self._heads: list[tuple[int, int, int]] = []  # side, layer, group
        rows = _rows_by_side(layers)
        for g, group in enumerate(groups):
            for member in group.members:
                for side, row in rows.get((member.layer, member.side), ()):
                    if group.kind == "head":
                        self._heads.append((side, row, g))
                    else:
                        self._per_slot[side, row, g] += len(member.positions) / group.slots
        self._coefficients = _coefficients(layers, groups, rate_of, rows)

    def total(self, widths: Widths) -> float:
        return self._cost(widths, self._coefficients) + self.rest

    def share(self, g: int) -> float:
        """The share of the network's cost that would go with all of group `g`."""
        widths = self.full.copy()
        widths[g] = 0
        whole = max(self._cost(self.full, self._coefficients), 1.0)
        return 1.0 - self._cost(widths, self._coefficients) / whole

    def dims(self, widths: Widths) -> Dims:
        """How wide the layers are then: 2 L, inputs and outputs."""
        dims: Dims = self._dims - self._per_slot @ (self.full - widths)
        for side, row, g in self._heads:
            dims[side, row] *= widths[g] / self.full[g]
        return dims

    def _cost(self, widths: Widths, coefficients: Coefficients) -> float:
        dims = self.dims(widths)
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


def reaches(layers: Sequence[Layer], groups: Sequence[Group]) -> list[int]:
    """Of each group, the number of products that read or write it; at least 1."""
    rows = _rows_by_side(layers)
    return [_reach(group, layers, rows) for group in groups]


def _reach(group: Group, layers: Sequence[Layer], rows: Mapping[tuple[str, str], list[tuple[int, int]]]) -> int:
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
    if rate_of == "latency":
        raise ValueError("A latency has no formula; it is measured, see LatencyCosts.")
    seen: set[tuple[str, str]] = set()
    for i, layer in enumerate(layers):
        if rate_of == "params" and (layer.name, layer.kind) in seen:
            continue  # a layer that runs twice has its weights once
        seen.add((layer.name, layer.kind))
        result[:, i] = layer.coefficients(rate_of)
    return result


def default_price(uniform: bool) -> Price:
    """Uniform networks keep the published decode head, which by its MACs would give nearly all of its width."""
    return "params" if uniform else "both"


def loss_weights(
    layers: Sequence[Layer], groups: Sequence[Group], rate_of: RateOf, price: Price = "both"
) -> list[float]:
    """What losing a given share of each group weighs: once for each product that reads or writes it, per price.

    Counted so, a stage's width that thirty products share is not given away like one block's hidden width. A group's
    price is the share of the network's cost that would go with all of it, by default of parameters and MACs alike:
    whoever asks for fewer parameters wants a faster network as well. For a rate of the channels it is their share.
    With price "none" every group weighs 1.
    """
    if price == "none":
        return [1.0] * len(groups)
    parts: dict[RateOf, float] = {"params": 1.0 - MACS_WEIGHT, "macs": MACS_WEIGHT}
    if price != "both":
        parts = {price: 1.0}
    elif rate_of == "channels":
        parts = {"channels": 1.0}
    priced = [(weight, Costs(layers, groups, unit)) for unit, weight in parts.items()]
    tiny = float(np.finfo(float).eps)
    return [
        reach / (tiny + sum(weight * costs.share(g) for weight, costs in priced))
        for g, reach in enumerate(reaches(layers, groups))
    ]
