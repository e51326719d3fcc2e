"""L1Pruner: fold, find groups, score by L1, plan for the budget, cut once. The steps, in order."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from segprune.fold import fold_decoder
from segprune.model import DecodeHead, SegFormer
from segprune.pruning.groups import Grouping, find_groups
from segprune.pruning.importance import l1_scores
from segprune.pruning.plan import RATES, Costs, Plan, RateOf, solve
from segprune.pruning.surgery import cut, read_spec
from segprune.pruning.trace import eval_mode, run, tensors_in, trace
from segprune.spec import Spec
from segprune.stats import Layer, layers

TRACE_SHAPE = (64, 64)  # H W at which a stock network is traced: its groups do not depend on the size


class L1Pruner:
    """Removes the share `pruning_rate` of a network's parameters (or `rate_of` MACs, channels) in one cut.

    The network may be a `SegFormer` or any module that holds parts of one, or none; what is not a stock SegFormer
    is traced with `example_inputs`, and attention that is not ours is left alone with a warning that names it.
    A stock SegFormer's decode head is folded first unless `keep_decoder`; what that saves counts towards the rate.

    >>> from segprune.spec import standard_spec
    >>> pruned = L1Pruner(SegFormer(standard_spec("b0", 8)), pruning_rate=0.5).prune()
    >>> 0.49 < 1 - sum(p.numel() for p in pruned.parameters()) / 3716200 < 0.51
    True
    """

    def __init__(
        self,
        model: nn.Module,
        pruning_rate: float = 0.5,
        ignored_layers: Iterable[nn.Module] = (),
        *,
        rate_of: RateOf = "params",
        scope: Literal["global", "local"] = "global",
        round_to: int = 8,
        heads: bool = False,
        keep_decoder: bool = False,
    ) -> None:
        """`ignored_layers`: modules whose outputs stay, with all inside them. `scope` "local": every group loses
        the same share. `heads`: whole heads may go too. Raises ValueError for a rate outside [0, 1)."""
        if not 0.0 <= pruning_rate < 1.0:
            raise ValueError(f"The pruning rate is {pruning_rate:g}; it must be at least 0 and below 1.")
        if rate_of not in RATES:
            raise ValueError(f"A rate of {rate_of!r} is unknown; choose one of {', '.join(RATES)}.")
        if scope not in ("global", "local"):
            raise ValueError(f"Scope {scope!r} is unknown; choose global or local.")
        if round_to < 1:
            raise ValueError(f"round_to is {round_to}; widths are kept multiples of a whole number from 1 up.")
        self.model = model
        self.pruning_rate = pruning_rate
        self.ignored_layers = list(ignored_layers)
        self.rate_of: RateOf = rate_of
        self.scope = scope
        self.round_to = round_to
        self.heads = heads
        self.keep_decoder = keep_decoder
        self.plan: Plan | None = None  # what the last prune() decided

    def prune(self, example_inputs: Any = None) -> nn.Module:
        """A new, smaller network; the one given is left as it was. At rate 0 it is a plain copy.

        `example_inputs` (B 3 H W, or what the network takes) sets the size at which MACs are counted, and is needed
        for a network that is not a stock SegFormer.
        """
        if self.pruning_rate == 0.0:
            return copy.deepcopy(self.model)
        protected = self._protected_names()
        spec = stock_spec(self.model)
        if spec is not None:
            return self._prune_stock(spec, example_inputs, protected)
        if example_inputs is None:
            raise ValueError(
                f"{type(self.model).__name__} is not a stock SegFormer and must be traced: "
                "pass example_inputs to prune(), for instance torch.randn(1, 3, 512, 512)."
            )
        return self._prune_traced(example_inputs, protected)

    def _collect_ignored_layers(self) -> list[nn.Module]:
        """Layers whose outputs are never cut: the first convolution, the classifier, and what the user named."""
        ignored = list(self.ignored_layers)
        ignored += [m for m in self.model.modules() if isinstance(m, nn.Conv2d)][:1]
        ignored += [m.classifier for m in self.model.modules() if isinstance(m, DecodeHead)]
        return ignored

    def _protected_names(self) -> set[str]:
        inside = {id(inner) for layer in self._collect_ignored_layers() for inner in layer.modules()}
        return {name for name, module in self.model.named_modules() if id(module) in inside}

    def _prune_stock(self, spec: Spec, example_inputs: Any, protected: set[str]) -> nn.Module:
        assert isinstance(self.model, SegFormer)
        height, width = (512, 512) if example_inputs is None else tensors_in(example_inputs)[0].shape[2:]
        dense_rows = layers(spec, (height, width))
        fold = not (self.keep_decoder or protected & {f"decode_head.{n}" for n in _FOLDED_AWAY})
        model = fold_decoder(self.model) if fold else copy.deepcopy(self.model)
        parameter = next(model.parameters())
        x = torch.zeros(1, 3, *TRACE_SHAPE, device=parameter.device, dtype=parameter.dtype)
        grouping = find_groups(model, x, protected, heads=self.heads)
        assert not grouping.unsupported
        whole = None if self.rate_of == "channels" else float(sum(row.cost(self.rate_of) for row in dense_rows))
        self._cut(model, grouping, layers(model.spec, (height, width)), whole)
        model.spec = read_spec(model)
        return model

    def _prune_traced(self, example_inputs: Any, protected: set[str]) -> nn.Module:
        model = copy.deepcopy(self.model)
        seen = trace(model, example_inputs)
        names = [name for name, _ in model.named_modules()]
        inside = {n for owner in seen.unknown_attention for n in names if not owner or f"{n}.".startswith(f"{owner}.")}
        grouping = find_groups(model, example_inputs, protected | inside, heads=self.heads)
        unsupported = {name: kind for name, kind in grouping.unsupported.items() if name not in inside}
        _warn_left_alone(seen.unknown_attention, unsupported)
        if not grouping.groups:
            raise ValueError(
                f"Nothing in {type(model).__name__} can be pruned: every group of channels is protected, "
                "leads to the network's outputs or belongs to attention that is not known."
            )
        listed = {row.name: row for row in seen.layers}
        rest = 0
        if self.rate_of == "params":
            total = sum(p.numel() for p in model.parameters())
            rest = total - sum(row.cost("params") for row in listed.values())
        self._cut(model, grouping, seen.layers, None, rest)
        with eval_mode(model), torch.no_grad():
            _check_run(model, example_inputs)
        return model

    def _cut(self, model: nn.Module, grouping: Grouping, rows: list[Layer], whole: float | None, rest: int = 0) -> None:
        costs = Costs(rows, grouping.groups, self.rate_of, rest)
        scores = l1_scores(model, grouping.groups)
        self.plan = solve(
            costs,
            scores,
            self.pruning_rate,
            rate_of=self.rate_of,
            whole=whole,
            round_to=self.round_to,
            local=self.scope == "local",
        )
        cut(model, grouping.groups, self.plan)


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
        warnings.warn(f"Left as it is, with all channels tied to it: {'; '.join(parts)}.", stacklevel=4)


def _listing(names: dict[str, str]) -> str:
    """Classes with how often, and the first name of each: SegformerAttention (8, first encoder.block.0)."""
    by_class: dict[str, list[str]] = {}
    for name, kind in names.items():
        by_class.setdefault(kind, []).append(name)
    return ", ".join(
        f"{kind} ({len(found)}, first {found[0] or 'the network itself'})" for kind, found in by_class.items()
    )
