"""Pruner: fold, find groups, score, plan for the budget, cut once, repair. The steps, in order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from segprune.checkpoint.published import uniform_problem
from segprune.fold import unfold_decoder
from segprune.model import DecodeHead, SegFormer
from segprune.pruning.costs import RATES, Price, RateOf, default_price, loss_weights
from segprune.pruning.groups import Group, group_names, is_protected
from segprune.pruning.importance import METHODS, Scores, scores
from segprune.pruning.latency import LatencyCosts, LatencyTable, meet
from segprune.pruning.patterns import matching_names
from segprune.pruning.plan import Normalise, Plan, PlanOptions, Scope, check_widths, plan_of, solve
from segprune.pruning.prepare import Prepared, check_head, prepare_stock, prepare_traced, stock_spec
from segprune.pruning.repair import repair
from segprune.pruning.surgery import cut, read_spec
from segprune.pruning.trace import eval_mode, run
from segprune.pruning.uniform import Problem, removed_unfolded, solve_uniform
from segprune.spec import Spec


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
        price: Price | None = None,
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
        """`pruning_rate`: a share of what `rate_of` says; or shares by unit, each of which has to go at least; or
        None, and only `rates` or `widths` (by group, as in a plan) are carried out. `ignored_layers`: modules whose
        outputs stay, with all inside them; `ignore` the same by pattern (patterns.py), and groups by name. `method`:
        importance.METHODS. `data`: batches of normalised images B 3 H W, for methods that need them and for the
        repair, `repaired`. `scope`, `round_to`, `normalise`, `max_rate`, `rates`, `sensitivity`: see PlanOptions;
        `price`: see costs.loss_weights, costs.default_price. `heads`: whole heads may go too. `uniform`: every stage
        stays uniform and the head as published, so that transformers' own classes can hold the network (uniform.py).
        `latency_table`: for a rate of the latency, times measured before. `progress`: of measuring steps and of the
        repair. Raises ValueError for what is not allowed.
        """
        self.model, self.latency_table = model, latency_table
        if not isinstance(pruning_rate, Mapping):
            pruning_rate = {} if pruning_rate is None else {rate_of: pruning_rate}
        self.rates_of: Mapping[RateOf, float] = pruning_rate
        self.ignored_layers = list(ignored_layers)
        self.method, self.data, self.repaired, self.seed, self.progress = method, list(data), repaired, seed, progress
        self.uniform = uniform
        self.heads, self.keep_decoder, self.ignore, self.widths = heads, keep_decoder, ignore, widths
        self.price = price or default_price(uniform)
        self.options = PlanOptions(round_to, scope, normalise, max_rate or {}, rates or {}, sensitivity or {})
        self.plan: Plan | None = None  # what the last prune() decided
        self.left_alone: tuple[str, ...] = ()  # groups that prune() could cut but for `ignore`
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
        if isinstance(self.model, SegFormer):
            check_head(self.model.spec, {"keep_decoder": self.keep_decoder, "uniform": self.uniform})
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
                costs.table.place,
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
        prepared = self._prepare(example_inputs)
        known = {group.name for group in (*prepared.groups, *prepared.protected)}
        unknown = sorted(self.options.sensitivity.keys() - known)
        if unknown:
            raise ValueError(
                f"The sensitivities are of another network: this one has no group {unknown[0]}; scan it with the flags "
                "that it is pruned with."
            )
        always = self._fixed_names()
        self.left_alone = tuple(group.name for group in prepared.protected if not is_protected(group, always))
        return prepared

    def _prepare(self, example_inputs: Any) -> Prepared:
        protected = self.protected_names()
        if stock_spec(self.model) is not None:
            assert isinstance(self.model, SegFormer)
            return prepare_stock(
                self.model,
                example_inputs,
                protected,
                heads=self.heads,
                keep_decoder=self.keep_decoder,
                latency=self._latency_costs if "latency" in self.rates_of else None,
            )
        kind = type(self.model).__name__
        if example_inputs is None:
            raise ValueError(
                f"{kind} is not a stock SegFormer and must be traced: "
                "pass example_inputs to prune(), for instance torch.randn(1, 3, 512, 512)."
            )
        if "latency" in self.rates_of:
            raise ValueError(
                f"{kind} is not a stock SegFormer; its latency cannot be predicted: ask for a rate of params or macs."
            )
        return prepare_traced(self.model, example_inputs, protected, heads=self.heads)

    def _latency_costs(self, spec: Spec, groups: tuple[Group, ...], shape: tuple[int, int]) -> LatencyCosts:
        table = self.latency_table or LatencyTable(next(self.model.parameters()).device)
        return LatencyCosts(spec, groups, table, shape, progress=self.progress)

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
            plan = plan_of(groups, found, check_widths(self.widths, groups))
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
        plan = plan_of(groups, found, check_widths(widths, groups))
        return replace(plan, removed=removed_unfolded(folded.spec, dense.spec, shape, groups, plan))

    def _collect_ignored_layers(self) -> list[nn.Module]:
        """Layers whose outputs are never cut: the first convolution, the classifier, and what the user named."""
        ignored = list(self.ignored_layers)
        ignored += [m for m in self.model.modules() if isinstance(m, nn.Conv2d)][:1]
        ignored += [m.classifier for m in self.model.modules() if isinstance(m, DecodeHead)]
        return ignored

    def _fixed_names(self) -> set[str]:
        inside = {id(inner) for layer in self._collect_ignored_layers() for inner in layer.modules()}
        return {name for name, module in self.model.named_modules() if id(module) in inside}

    def protected_names(self) -> set[str]:
        """Modules whose outputs stay, and groups that `ignore` names as such."""
        names = [name for name, _ in self.model.named_modules() if name]
        known = list(dict.fromkeys([*names, *group_names(self.model)]))
        return matching_names(self.ignore, known, "--ignore") | self._fixed_names()


def _check_run(model: nn.Module, example_inputs: Any) -> None:
    """What was traced wrongly must fail here, not in the user's hands."""
    try:
        run(model, example_inputs)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__} no longer runs once its channels are cut ({error}); something in it depends on "
            "their number in a way that tracing does not see: name its layers in ignored_layers."
        ) from error
