"""Pruner: fold, find groups, score, plan for the budget, cut once, repair. The steps, in order."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from segprune.fold import fold_decoder, unfold_decoder
from segprune.model import DecodeHead, SegFormer
from segprune.pruning.costs import RATES, Costs, Price, RateOf, loss_weights
from segprune.pruning.groups import Group, Grouping, find_groups
from segprune.pruning.importance import METHODS, Scores, scores
from segprune.pruning.latency import LatencyCosts, LatencyTable, dense_in_predicted_ms, meet
from segprune.pruning.patterns import matching_names
from segprune.pruning.plan import Limit, Normalise, Plan, PlanOptions, Scope, plan_of, solve
from segprune.pruning.repair import repair
from segprune.pruning.surgery import cut, read_spec
from segprune.pruning.trace import eval_mode, run, tensors_in, trace
from segprune.pruning.uniform import Problem, removed_unfolded, solve_uniform
from segprune.spec import Spec
from segprune.stats import Layer, layers
from segprune.uniform import uniform_problem

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

    def limit(self, unit: RateOf, rate: float) -> Limit:
        if unit == "latency":
            assert self.latency is not None
            return Limit(self.latency, rate, unit, self.wholes[unit])
        costs = Costs(self.rows, self.groups, unit, self.rest if unit == "params" else 0)
        return Limit(costs, rate, unit, self.wholes.get(unit))


class Pruner:
    """Removes the share `pruning_rate` of a network's parameters (or `rate_of` MACs, channels, latency) in one cut.

    The network may be a `SegFormer` or any module that holds parts of one, or none; what is not a stock SegFormer
    is traced with `example_inputs`, and attention that is not ours is left alone with a warning that names it.
    A stock SegFormer's decode head is folded first unless `keep_decoder`; what that saves counts towards the rate.

    >>> from segprune.spec import standard_spec
    >>> pruned = Pruner(SegFormer(standard_spec("b0", 8)), 0.5, method="l2").prune()
    >>> 0.49 < 1 - sum(p.numel() for p in pruned.parameters()) / 3716200 < 0.51
    True
    """

    def __init__(
        self,
        model: nn.Module,
        pruning_rate: float | Mapping[RateOf, float] | None = 0.5,
        ignored_layers: Iterable[nn.Module] = (),
        *,
        method: str = "l1",
        data: Iterable[Tensor] = (),
        repaired: bool = False,
        rate_of: RateOf = "params",
        scope: Scope = "global",
        round_to: int = 8,
        heads: bool = False,
        keep_decoder: bool = False,
        uniform: bool = False,
        price: Price = "both",
        normalise: Normalise = "share",
        max_rate: Mapping[str, float] | None = None,
        rates: Mapping[str, float] | None = None,
        ignore: Sequence[str] = (),
        sensitivity: Mapping[str, float] | None = None,
        widths: Mapping[str, int] | None = None,
        seed: int = 0,
        latency_table: LatencyTable | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`pruning_rate`: a share of what `rate_of` says; or shares by unit, each of which has to go at least; or None,
        and only `rates` or `widths` (by group, as in a plan) are carried out. `ignored_layers`: modules whose outputs
        stay, with all inside them; `ignore` the same by pattern (patterns.py). `method`: importance.METHODS. `data`:
        batches of normalised images B 3 H W, for methods that need them and for the repair, `repaired`. `scope`,
        `round_to`, `normalise`, `max_rate`, `rates`, `sensitivity`: see PlanOptions; `price`: see costs.loss_weights.
        `heads`: whole heads may go too. `uniform`: every stage stays uniform and the head as published, so that
        transformers' own classes can hold the network (uniform.py). `latency_table`: for a rate of the latency,
        times measured before. `progress`: of measuring steps and of the repair. Raises ValueError for what is not
        allowed.
        """
        self.model, self.latency_table = model, latency_table
        if not isinstance(pruning_rate, Mapping):
            pruning_rate = {} if pruning_rate is None else {rate_of: pruning_rate}
        self.rates_of: Mapping[RateOf, float] = pruning_rate
        self.ignored_layers = list(ignored_layers)
        self.method, self.data, self.repaired, self.seed, self.progress = method, list(data), repaired, seed, progress
        self.uniform = uniform
        self.heads, self.keep_decoder, self.ignore, self.price, self.widths = heads, keep_decoder, ignore, price, widths
        self.options = PlanOptions(round_to, scope, normalise, max_rate or {}, rates or {}, sensitivity or {})
        self.plan: Plan | None = None  # what the last prune() decided
        self._check()

    def _check(self) -> None:
        for rate_of, rate in self.rates_of.items():
            if rate_of not in RATES:
                raise ValueError(f"A rate of {rate_of!r} is unknown; choose one of {', '.join(RATES)}.")
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"The pruning rate is {rate:g}; it must be at least 0 and below 1.")
        for value, name, known in (
            (self.options.scope, "Scope", get_args(Scope)),
            (self.options.normalise, "Normalisation", get_args(Normalise)),
            (self.price, "Price", get_args(Price)),
            (self.method, "Method", tuple(METHODS)),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}.")
        if self.options.round_to < 1:
            raise ValueError(
                f"round_to is {self.options.round_to}; widths are kept multiples of a whole number from 1 up."
            )
        if self.uniform:
            self._check_uniform()
        if self.repaired and not self.data:
            raise ValueError("Repair needs images, and there are none; give a few dozen, labels are not needed.")

    def _check_uniform(self) -> None:
        against = {
            "heads": self.heads,
            "keep_decoder": self.keep_decoder,
            "rates": bool(self.options.rates),
            f"scope {self.options.scope}": self.options.scope != "global",
            "price none": self.price == "none",
            **{f"a rate of the {unit}": unit in self.rates_of for unit in ("channels", "latency")},
        }
        for name, found in against.items():
            if found:
                raise ValueError(
                    f"{name} does not go with uniform, whose stages have rules of their own; leave one out."
                )

    def prune(self, example_inputs: Any = None) -> nn.Module:
        """A new, smaller network; the one given is left as it was. At rate 0 it is a plain copy.

        `example_inputs` (B 3 H W, or what the network takes) sets the size at which MACs are counted, and is needed
        for a network that is not a stock SegFormer.
        """
        if self._asks_nothing():
            return copy.deepcopy(self.model)
        prepared = self.prepare(example_inputs)
        if self.repaired and not prepared.wholes:
            raise ValueError(f"{type(self.model).__name__} is not a stock SegFormer; only those can be repaired.")
        found = self.scores(prepared)
        if prepared.latency is not None:
            self.plan, model = self._cut_to_latency(prepared, found)
        else:
            self.plan = self._planned(prepared, found, self.rates_of)
            model = self._cut(prepared, self.plan, example_inputs)
        if self.repaired:
            model = self._repair(model, prepared, self.plan)
        return unfold_decoder(model) if self.uniform and isinstance(model, SegFormer) else model

    def _repair(self, model: nn.Module, prepared: Prepared, plan: Plan) -> SegFormer:
        assert isinstance(model, SegFormer)
        assert isinstance(prepared.model, SegFormer)
        return repair(model, prepared.model, prepared.groups, plan, self.data, progress=self.progress)

    def _cut(self, prepared: Prepared, plan: Plan, example_inputs: Any) -> nn.Module:
        model = copy.deepcopy(prepared.model) if self.repaired or prepared.latency is not None else prepared.model
        cut(model, prepared.groups, plan)
        if isinstance(model, SegFormer) and prepared.wholes:
            model.spec = read_spec(model)
            problem = uniform_problem(model.spec) if self.uniform else None
            if problem is not None:
                raise ValueError(f"The plan is not uniform, since {problem}; mend it, or leave out --uniform.")
        else:
            with eval_mode(model), torch.no_grad():
                _check_run(model, example_inputs)
        return model

    def _cut_to_latency(self, prepared: Prepared, found: Mapping[str, Scores]) -> tuple[Plan, nn.Module]:
        """Cut, measure, correct, until the measured latency is what is asked, or less where other budgets bind."""
        costs, dense_ms, plans = prepared.latency, prepared.wholes["latency"], []
        assert costs is not None

        def at(target_ms: float) -> tuple[nn.Module, float]:
            plan = self._planned(prepared, found, {**self.rates_of, "latency": 1.0 - target_ms / dense_ms})
            plans.append(plan)
            return self._cut(prepared, plan, None), (1.0 - plan.removed["latency"]) * dense_ms

        with eval_mode(self.model):
            met = meet(
                1.0 - self.rates_of["latency"],
                self.model,
                dense_ms,
                at,
                costs.input_shape,
                device=costs.table.place.device,
                at_most=len(self.rates_of) > 1,
            )
        return plans[-1], met.network

    def decide(self, example_inputs: Any = None) -> tuple[Plan, tuple[Group, ...]]:
        """What `prune` would do, and the groups it could choose from; nothing is cut."""
        prepared = self.prepare(example_inputs)
        self.plan = self._planned(prepared, self.scores(prepared), self.rates_of)
        return self.plan, prepared.groups

    def _asks_nothing(self) -> bool:
        return not any(self.rates_of.values()) and not self.options.rates and self.widths is None

    def prepare(self, example_inputs: Any = None) -> Prepared:
        """A copy of the network, folded if it is to be, and the groups that may be cut in it."""
        protected = self._protected_names()
        spec = stock_spec(self.model)
        if spec is not None:
            return self._prepare_stock(spec, example_inputs, protected)
        if example_inputs is None:
            raise ValueError(
                f"{type(self.model).__name__} is not a stock SegFormer and must be traced: "
                "pass example_inputs to prune(), for instance torch.randn(1, 3, 512, 512)."
            )
        return self._prepare_traced(example_inputs, protected)

    def scores(self, prepared: Prepared) -> dict[str, Scores]:
        """By group name, a score per channel."""
        fallback = "l1" if self.method == "bn" else None  # for groups without a normalisation
        return scores(self.method, prepared.model, prepared.groups, self.data, seed=self.seed, fallback=fallback)

    def _planned(self, prepared: Prepared, found: Mapping[str, Scores], rates_of: Mapping[RateOf, float]) -> Plan:
        groups = prepared.groups
        units: list[RateOf] = [*rates_of, "params", "macs"]
        limits = {unit: prepared.limit(unit, rates_of.get(unit, 0.0)) for unit in units}
        if self.uniform:
            return self._planned_uniform(prepared, dict(found))
        if self.widths is not None:
            plan = plan_of(groups, found, _checked(self.widths, groups))
        else:
            weights = loss_weights(prepared.rows, groups, next(iter(rates_of), "params"), self.price)
            plan = solve([limits[unit] for unit in rates_of], groups, found, weights, self.options)
        widths = np.array([len(plan.keep[group.name]) // group.parts for group in groups], dtype=np.int64)
        return replace(plan, removed={unit: limit.removed(widths) for unit, limit in limits.items()})

    def _planned_uniform(self, prepared: Prepared, found: dict[str, Scores]) -> Plan:
        dense, folded, groups = self.model, prepared.model, prepared.groups
        if not (isinstance(dense, SegFormer) and isinstance(folded, SegFormer) and prepared.wholes):
            raise ValueError(f"{type(dense).__name__} is not a stock SegFormer; only those have uniform stages.")
        shape, widths = prepared.input_shape, self.widths
        if widths is None:
            problem = Problem(folded.spec, dense.spec, shape, groups, prepared.rows)
            widths = solve_uniform(problem, self.rates_of, found, self.options, self.price)
        plan = plan_of(groups, found, _checked(widths, groups))
        return replace(plan, removed=removed_unfolded(folded.spec, dense.spec, shape, groups, plan))

    def _collect_ignored_layers(self) -> list[nn.Module]:
        """Layers whose outputs are never cut: the first convolution, the classifier, and what the user named."""
        ignored = list(self.ignored_layers)
        ignored += [m for m in self.model.modules() if isinstance(m, nn.Conv2d)][:1]
        ignored += [m.classifier for m in self.model.modules() if isinstance(m, DecodeHead)]
        return ignored

    def _protected_names(self) -> set[str]:
        inside = {id(inner) for layer in self._collect_ignored_layers() for inner in layer.modules()}
        names = [name for name, _ in self.model.named_modules() if name]
        by_pattern = matching_names(self.ignore, names, "--ignore")
        return by_pattern | {name for name, module in self.model.named_modules() if id(module) in inside}

    def _prepare_stock(self, spec: Spec, example_inputs: Any, protected: set[str]) -> Prepared:
        assert isinstance(self.model, SegFormer)
        height, width = (512, 512) if example_inputs is None else tensors_in(example_inputs)[0].shape[2:]
        dense_rows = layers(spec, (height, width))
        fold = not (self.keep_decoder or protected & {f"decode_head.{n}" for n in _FOLDED_AWAY})
        model = fold_decoder(self.model) if fold else copy.deepcopy(self.model)
        parameter = next(model.parameters())
        x = torch.zeros(1, 3, *TRACE_SHAPE, device=parameter.device, dtype=parameter.dtype)
        grouping = find_groups(model, x, protected, heads=self.heads)
        assert not grouping.unsupported
        wholes: dict[RateOf, float] = {
            "params": float(sum(row.cost("params") for row in dense_rows)),
            "macs": float(sum(row.cost("macs") for row in dense_rows)),
        }
        groups, latency = _some(grouping, model), None
        if "latency" in self.rates_of:
            table = self.latency_table or LatencyTable(parameter.device)
            latency = LatencyCosts(model.spec, groups, table, (height, width), progress=self.progress)
            with eval_mode(self.model):
                wholes["latency"] = dense_in_predicted_ms(self.model, model, latency)
        rows = layers(model.spec, (height, width))
        return Prepared(model, groups, rows, wholes, latency=latency, input_shape=(height, width))

    def _prepare_traced(self, example_inputs: Any, protected: set[str]) -> Prepared:
        if "latency" in self.rates_of:
            raise ValueError(
                f"{type(self.model).__name__} is not a stock SegFormer; its latency cannot be predicted: ask for a "
                "rate of params or macs."
            )
        model = copy.deepcopy(self.model)
        seen = trace(model, example_inputs)
        names = [name for name, _ in model.named_modules()]
        inside = {n for owner in seen.unknown_attention for n in names if not owner or f"{n}.".startswith(f"{owner}.")}
        grouping = find_groups(model, example_inputs, protected | inside, heads=self.heads)
        unsupported = {name: kind for name, kind in grouping.unsupported.items() if name not in inside}
        _warn_left_alone(seen.unknown_attention, unsupported)
        listed = {row.name: row for row in seen.layers}
        total = sum(p.numel() for p in model.parameters())
        rest = total - sum(row.cost("params") for row in listed.values())
        return Prepared(model, _some(grouping, model), seen.layers, {}, rest)


def _some(grouping: Grouping, model: nn.Module) -> tuple[Group, ...]:
    if not grouping.groups:
        raise ValueError(
            f"Nothing in {type(model).__name__} can be pruned: every group of channels is protected, "
            "leads to the network's outputs or belongs to attention that is not known."
        )
    return grouping.groups


def _checked(widths: Mapping[str, int], groups: Sequence[Group]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The widths in the order of the groups. ValueError for names or widths that do not fit."""
    slots = {group.name: group.slots for group in groups}
    if widths.keys() != slots.keys():
        name = min(widths.keys() ^ slots.keys())
        where = "which this network cannot cut" if name in widths else "which the plan does not name"
        raise ValueError(f"The plan is not one for this network and these flags: group {name}, {where}.")
    for name, width in widths.items():
        if not 1 <= width <= slots[name]:
            raise ValueError(f"The plan leaves {width} channels of {name}; it must be 1 to {slots[name]}.")
    return np.array([widths[group.name] for group in groups], dtype=np.int64)


def _check_run(model: nn.Module, example_inputs: Any) -> None:
    """What was traced wrongly must fail here, not in the user's hands."""
    try:
        run(model, example_inputs)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__} no longer runs once its channels are cut ({error}); something in it depends on "
            "their number in a way that tracing does not see: name its layers in ignored_layers."
        ) from error


_FOLDED_AWAY = ("fuse", *(f"branches.{i}" for i in range(4)))


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
