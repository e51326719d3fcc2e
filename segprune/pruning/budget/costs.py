"""What a network costs as a function of its groups' widths, in closed form; and what losing part of a group weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from segprune.pruning.groups import Group
from segprune.pruning.options import Price, RateOf
from segprune.pruning.plan import Widths
from segprune.stats import Layer

MACS_WEIGHT = 0.6  # of MACs beside parameters in a group's price; measured, see docs/log.md
Dims = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Coefficients = np.ndarray[tuple[int, int], np.dtype[np.float64]]  # (a, b, c) of each layer: 3 L


class Cost(Protocol):
    """What a budget is a share of: `total` of the groups' widths, never smaller for wider groups."""

    groups: Sequence[Group]
    full: Widths

    def total(self, widths: Widths) -> float: ...


class Costs:
    """Cost of a network as a function of its groups' widths (slots that are kept, in the order of `groups`).

    A layer's side is as wide as its groups leave it, times the share of heads that are kept. L is the number of
    layers, G of groups.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        groups: Sequence[Group],
        rate_of: RateOf,
        rest: int = 0,
        coefficients: Coefficients | None = None,
    ) -> None:
        """`coefficients` (3 L) replace those of the unit `rate_of`."""
        self.layers, self.groups = layers, groups
        self.full = np.array([group.slots for group in groups], dtype=np.int64)
        self.rest = rest  # what lies in no listed layer

        # How wide the layers are, and how much narrower
        # each side becomes with one slot of each group.
        dims = [[row.in_dim for row in layers], [row.out_dim for row in layers]]
        self._dims = np.array(dims, dtype=np.float64)  # 2 L
        self._per_slot = np.zeros((2, len(layers), len(groups)))  # 2 L G

        # Whole heads scale a side of a layer. One slot
        # of any other group takes channels off it.
        self._heads: list[tuple[int, int, int]] = []  # side, layer, group

        rows = _rows_by_side(layers)
        for g, group in enumerate(groups):
            for member in group.members:
                for side, row in rows.get((member.layer, member.side), ()):
                    if group.kind == "head":
                        self._heads.append((side, row, g))
                    else:
                        self._per_slot[side, row, g] += len(member.positions) / group.slots

        self.coefficients = (
            _coefficients(layers, groups, rate_of, rows)
            if coefficients is None
            else coefficients
        )

    def total(self, widths: Widths) -> float:
        return self._cost(widths) + self.rest

    def share(self, g: int) -> float:
        """Returns the share of the network's cost that disappears with all of group `g`."""
        widths = self.full.copy()
        widths[g] = 0
        return 1.0 - self._cost(widths) / max(self._cost(self.full), 1.0)

    def dims(self, widths: Widths) -> Dims:
        """Returns how wide the layers are then: 2 L, inputs and outputs."""
        # Linear in the slots that are removed: (2 L G) @ (G). Heads then scale what is left.
        dims: Dims = self._dims - self._per_slot @ (self.full - widths)
        for side, row, g in self._heads:
            dims[side, row] *= widths[g] / self.full[g]
        return dims

    def slope(self, dims: Dims, g: int) -> float:
        """Returns the cost of one slot of group `g`, which is no group of heads, where layers are as wide as `dims`."""
        a, b, c = self.coefficients

        # Derivative of a · in · out + b · in + c · out
        # by the group's slots, by the product rule.
        ins, outs = self._per_slot[:, :, g]
        return float(((a * dims[1] + b) * ins + (a * dims[0] + c) * outs).sum())

    def _cost(self, widths: Widths) -> float:
        ins, outs = self.dims(widths)
        a, b, c = self.coefficients
        return float((a * ins * outs + b * ins + c * outs).sum())


def mix_costs(parts: Sequence[tuple[float, Costs]]) -> Costs:
    """Returns one cost for several of the same network: the weighted sum of the shares of their totals."""
    first = parts[0][1]

    # A cost is linear in its coefficients (3 L), so costs are mixed by mixing these.
    coefficients = sum(
        weight / cost.total(cost.full) * cost.coefficients for weight, cost in parts
    )
    assert isinstance(coefficients, np.ndarray)
    return Costs(first.layers, first.groups, "macs", coefficients=coefficients)


def _rows_by_side(layers: Sequence[Layer]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Returns which widths (0 in, 1 out; row) the side of a layer sets. q's outputs and v's are attention's two."""
    rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for i, layer in enumerate(layers):
        if layer.kind == "attention":
            # Queries times keys is as wide as q's outputs, the second product as wide as v's.
            rows.setdefault((f"{layer.name}.q", "out"), []).append((0, i))
            rows.setdefault((f"{layer.name}.v", "out"), []).append((1, i))
            continue

        rows.setdefault((layer.name, "out"), []).append((1, i))

        # A norm or depth-wise layer has one width, its
        # output's. Only products read another one.
        if layer.kind == "product":
            rows.setdefault((layer.name, "in"), []).append((0, i))
    return rows


def count_products(layers: Sequence[Layer], groups: Sequence[Group]) -> list[int]:
    """Returns for each group the number of products that read or write it; at least 1."""
    rows = _rows_by_side(layers)
    counts = []
    for group in groups:
        # Several members may set the same side of a layer; it counts once.
        sides: set[tuple[int, int]] = set()
        for member in group.members:
            sides.update(rows.get((member.layer, member.side), ()))
        counts.append(max(1, sum(layers[row].kind == "product" for _, row in sides)))
    return counts


def _coefficients(
    layers: Sequence[Layer],
    groups: Sequence[Group],
    rate_of: RateOf,
    rows: Mapping[tuple[str, str], list[tuple[int, int]]],
) -> Coefficients:
    """Returns (a, b, c) of each layer, 3 L: its cost is a · in · out + b · in + c · out."""
    if rate_of == "latency":
        raise ValueError("A latency has no formula; it is measured, see LatencyCosts.")

    result = np.zeros((3, len(layers)))
    if rate_of == "channels":
        # Each group counts once, as wide as the first layer that puts it out.
        for group in groups:
            outs = [m.layer for m in group.members if m.side == "out"]
            if group.kind != "head" and outs:
                result[2, rows[outs[0], "out"][0][1]] = 1
        return result

    seen: set[tuple[str, str]] = set()
    for i, layer in enumerate(layers):
        # A layer that runs twice has its weights once.
        if rate_of == "params" and (layer.name, layer.kind) in seen:
            continue
        seen.add((layer.name, layer.kind))
        result[:, i] = layer.coefficients(rate_of)
    return result


def price_parts(price: Price) -> dict[RateOf, float]:
    """Returns how much each unit weighs in a price. Whoever asks for fewer parameters wants a faster network too."""
    if price == "both":
        return {"params": 1.0 - MACS_WEIGHT, "macs": MACS_WEIGHT}
    assert price != "none"
    return {price: 1.0}


def loss_weights(
    layers: Sequence[Layer], groups: Sequence[Group], rate_of: RateOf, price: Price = "both"
) -> list[float]:
    """Returns the weight of each group in the ranking: (products that read or write it) / (its share of the cost).

    Without the first factor a stage's width, which thirty layers share, would be pruned as readily as one block's
    hidden width. `price` says whose cost: parameters and MACs by default, and channels for a rate of the channels.
    With price "none" every group weighs 1.
    """
    if price == "none":
        return [1.0] * len(groups)

    # A rate of the channels is priced in channels
    # too, unless the caller asks for another price.
    parts: dict[RateOf, float] = (
        {"channels": 1.0} if (price, rate_of) == ("both", "channels") else price_parts(price)
    )
    costs = {unit: Costs(layers, groups, unit) for unit in parts}

    # A group that costs nothing would otherwise divide by zero.
    tiny = float(np.finfo(float).eps)

    weights = []
    for g, products in enumerate(count_products(layers, groups)):
        share = sum(weight * costs[unit].share(g) for unit, weight in parts.items())
        weights.append(products / (tiny + share))
    return weights
