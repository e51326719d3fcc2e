"""What a pruner starts from: a copy that can be cut, folded if it is to be, its free groups and their costs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.costs import Costs, RateOf
from segprune.pruning.groups import Group, Grouping, find_groups
from segprune.pruning.latency import LatencyCosts, dense_in_predicted_ms
from segprune.pruning.plan import Limit
from segprune.pruning.trace import eval_mode, tensors_in, trace
from segprune.spec import Spec
from segprune.stats import Layer, layers

TRACE_SHAPE = (64, 64)  # H W at which a stock network is traced: its groups do not depend on the size


@dataclass(frozen=True)
class Prepared:
    """A copy of the network that can be cut, what can go, and what it costs."""

    model: nn.Module
    groups: tuple[Group, ...]
    rows: list[Layer]
    wholes: Mapping[RateOf, float]  # the cost before folding; empty for what is not a stock SegFormer
    rest: int = 0  # parameters that lie in no row
    input_shape: tuple[int, int] = (512, 512)  # H W at which MACs are counted
    latency: LatencyCosts | None = None  # where a rate of the latency is asked
    protected: tuple[Group, ...] = ()  # what could go but for what the caller protects

    def limit(self, unit: RateOf, rate: float) -> Limit:
        if unit == "latency":
            assert self.latency is not None
            return Limit(self.latency, rate, unit, self.wholes[unit])
        costs = Costs(self.rows, self.groups, unit, self.rest if unit == "params" else 0)
        return Limit(costs, rate, unit, self.wholes.get(unit))


def stock_spec(model: nn.Module) -> Spec | None:
    """The spec if `model` is a SegFormer exactly as its spec builds it, else None."""
    if type(model) is not SegFormer:
        return None
    with torch.device("meta"):
        reference = SegFormer(model.spec)
    same_modules = [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in reference.named_modules()
    ]
    shapes = {n: p.shape for n, p in model.state_dict().items()}
    return model.spec if same_modules and shapes == {n: p.shape for n, p in reference.state_dict().items()} else None


def check_head(spec: Spec, asked: Mapping[str, bool]) -> None:
    """ValueError where something is asked, by name, that only decode heads as published can have."""
    for name in (name for name, is_asked in asked.items() if is_asked and spec.head == "conv"):
        raise ValueError(
            f"{name} is for decode heads as published, and this network's has a BatchNorm and a ReLU in each branch; "
            "leave it out."
        )


_FOLDED_AWAY = ("fuse", *(f"branches.{i}" for i in range(4)))


def prepare_stock(
    dense: SegFormer,
    example_inputs: Any,
    protected: set[str],
    *,
    heads: bool,
    keep_decoder: bool,
    latency: Callable[[Spec, tuple[Group, ...], tuple[int, int]], LatencyCosts] | None = None,
) -> Prepared:
    """Of a network as its spec builds it; the head is folded unless it is kept or a protected layer would go.

    `latency` makes the costs where a rate of the latency is asked.
    """
    height, width = (512, 512) if example_inputs is None else tensors_in(example_inputs)[0].shape[2:]
    dense_rows = layers(dense.spec, (height, width))
    fold = not (keep_decoder or protected & {f"decode_head.{n}" for n in _FOLDED_AWAY})
    model = fold_decoder(dense) if fold else copy.deepcopy(dense)
    parameter = next(model.parameters())
    x = torch.zeros(1, 3, *TRACE_SHAPE, device=parameter.device, dtype=parameter.dtype)
    grouping = find_groups(model, x, protected, heads=heads)
    assert not grouping.unsupported
    wholes: dict[RateOf, float] = {
        "params": float(sum(row.cost("params") for row in dense_rows)),
        "macs": float(sum(row.cost("macs") for row in dense_rows)),
    }
    groups, costs = _some(grouping, model), None
    if latency is not None:
        costs = latency(model.spec, groups, (height, width))
        with eval_mode(dense):
            wholes["latency"] = dense_in_predicted_ms(dense, model, costs)
    rows = layers(model.spec, (height, width))
    return Prepared(
        model, groups, rows, wholes, latency=costs, input_shape=(height, width), protected=grouping.protected
    )


def prepare_traced(network: nn.Module, example_inputs: Any, protected: set[str], *, heads: bool) -> Prepared:
    """Of any other network, run once on `example_inputs`."""
    model = copy.deepcopy(network)
    seen = trace(model, example_inputs)
    names = [name for name, _ in model.named_modules()]
    inside = {n for owner in seen.unknown_attention for n in names if not owner or f"{n}.".startswith(f"{owner}.")}
    grouping = find_groups(model, example_inputs, protected | inside, heads=heads)
    unsupported = {name: kind for name, kind in grouping.unsupported.items() if name not in inside}
    _warn_left_alone(seen.unknown_attention, unsupported)
    listed = {row.name: row for row in seen.layers}
    total = sum(p.numel() for p in model.parameters())
    rest = total - sum(row.cost("params") for row in listed.values())
    return Prepared(model, _some(grouping, model), seen.layers, {}, rest, protected=grouping.protected)


def _some(grouping: Grouping, model: nn.Module) -> tuple[Group, ...]:
    if not grouping.groups:
        raise ValueError(
            f"Nothing in {type(model).__name__} can be pruned: every group of channels is protected, "
            "leads to the network's outputs or belongs to attention that is not known."
        )
    return grouping.groups


def _warn_left_alone(attention: dict[str, str], unsupported: dict[str, str]) -> None:
    """One warning for all that was traced but cannot be cut."""
    parts = []
    if attention:
        parts.append(f"attention that segprune does not know: {_listing(attention)}")
    if unsupported:
        parts.append(f"layers that it cannot cut: {_listing(unsupported)}")
    if parts:
        warnings.warn(f"Left as it is, with all channels tied to it: {'; '.join(parts)}.", stacklevel=5)


def _listing(names: dict[str, str]) -> str:
    """Classes with how often, and the first name of each: SegformerAttention (8, first encoder.block.0)."""
    by_class: dict[str, list[str]] = {}
    for name, kind in names.items():
        by_class.setdefault(kind, []).append(name)
    return ", ".join(
        f"{kind} ({len(found)}, first {found[0] or 'the network itself'})" for kind, found in by_class.items()
    )
