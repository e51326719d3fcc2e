"""What a pruner starts from: a copy of the network, folded if it is to be, its groups and the costs of its layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.coarser import choose_factors, with_factors
from segprune.pruning.groups import Group, find_groups
from segprune.pruning.options import PruneOptions, RateOf
from segprune.pruning.trace import tensors_in, trace
from segprune.shapes_only import without_weights
from segprune.spec import Spec, list_kv_reductions
from segprune.stats import Layer, count, layers

TRACE_SHAPE = (
    64,
    64,
)  # H W at which a stock network is traced: its groups do not depend on the size


@dataclass(frozen=True)
class Prepared:
    """A network before anything is removed from it. Nothing here is changed later: `surgery.cut` cuts a copy.

    `dense` is the network as given and `model` the one that groups, layers and plans are of: a copy whose decode head
    is folded, unless it is kept, and whose keys and values come from a coarser map, if they are to. `stock`: it is a
    SegFormer exactly as its spec builds it.
    """

    dense: nn.Module
    model: nn.Module
    stock: bool
    groups: tuple[Group, ...]  # what can be removed
    protected: tuple[Group, ...]  # what could be removed, did the caller not protect it
    rows: list[Layer]
    input_shape: tuple[int, int]  # H W at which MACs are counted
    example_inputs: Any = None  # what a network that is not stock runs on
    rest: int = 0  # parameters that lie in no row

    @property
    def wholes(self) -> Mapping[RateOf, float]:
        """The costs that shares are taken of, before folding; empty for what is not a stock SegFormer."""
        if not self.stock:
            return {}
        assert isinstance(self.dense, SegFormer)
        counts = count(self.dense.spec, self.input_shape)
        return {"params": float(counts.parameters), "macs": float(counts.macs)}


def stock_spec(model: nn.Module) -> Spec | None:
    """Returns the spec if `model` is a SegFormer exactly as its spec builds it, else None."""
    # A subclass may compute anything, and so may a network with modules replaced or reshaped.
    if type(model) is not SegFormer:
        return None

    # On the meta device the reference has names and shapes, but takes no memory.
    with without_weights():
        reference = SegFormer(model.spec)

    modules, expected = (
        [(name, type(m)) for name, m in net.named_modules()] for net in (model, reference)
    )
    shapes, expected_shapes = (
        {name: t.shape for name, t in net.state_dict().items()} for net in (model, reference)
    )

    # Weights that two layers share would part when one of them is cut.
    shared = len(list(model.parameters())) < len(list(reference.parameters()))
    equal = modules == expected and shapes == expected_shapes and not shared
    return model.spec if equal else None


def check_published(spec: Spec, options: PruneOptions) -> None:
    """Raises ValueError for an option that only networks as published can have."""
    coarse = any(factor > 1 for factor in list_kv_reductions(spec).values())
    if coarse and options.uniform and not options.kv_factors:
        raise ValueError(
            "`uniform` is for stock classes, which average no keys and values, and this network does; undo it with "
            "`kv_reduction` 1, or leave `uniform` out."
        )
    if spec.head_form.linear:
        return
    for name in options.given(("keep_decoder", "uniform")):
        raise ValueError(
            f"`{name}` is for decode heads as published, and this network's has {spec.head_form.branches}; "
            "leave it out."
        )


def prepare(
    model: nn.Module, example_inputs: Any, protected: set[str], options: PruneOptions
) -> Prepared:
    """Finds what can be removed from a copy of the network. `protected` names layers whose outputs, and groups, stay.

    Raises ValueError where nothing can be removed, and where a network of the user's own comes without inputs.
    """
    if stock_spec(model) is not None:
        assert isinstance(model, SegFormer)
        return _prepare_stock(model, example_inputs, protected, options)

    if options.kv_factors:
        raise ValueError(
            f"{type(model).__name__} is not a stock SegFormer, and `kv_reduction` is for those alone; leave it out."
        )
    if example_inputs is None:
        raise ValueError(
            f"{type(model).__name__} is not a stock SegFormer and must be traced: "
            "pass example_inputs to prune(), for instance torch.randn(1, 3, 512, 512)."
        )
    return _prepare_traced(model, example_inputs, protected, options)


_FOLDED_AWAY = ("fuse", *(f"branches.{i}" for i in range(4)))


def may_fold(protected: set[str], options: PruneOptions) -> bool:
    """Returns whether the decode head is folded: not where it is kept, or a protected layer would disappear."""
    layers_lost = protected & {f"decode_head.{name}" for name in _FOLDED_AWAY}
    return not (options.keep_decoder or layers_lost)


def _prepare_stock(
    dense: SegFormer, example_inputs: Any, protected: set[str], options: PruneOptions
) -> Prepared:
    """Prepares a network as its spec builds it. The head is not folded where a protected layer would disappear."""
    # MACs depend on the size; the groups do not, so that tracing uses a small one.
    height, width = (
        options.input_shape
        if example_inputs is None
        else tensors_in(example_inputs)[0].shape[2:]
    )
    fold = may_fold(protected, options)
    model = fold_decoder(dense) if fold else copy.deepcopy(dense)
    if options.kv_factors:
        factors = choose_factors(model.spec, options.kv_factors, (height, width))
        model = with_factors(model, factors)

    parameter = next(model.parameters())
    shape = (1, dense.spec.in_channels, *TRACE_SHAPE)
    x = torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
    grouping = find_groups(model, x, protected, heads=options.heads)

    # Each kind of layer of our own can be cut.
    assert not grouping.unsupported

    return Prepared(
        dense,
        model,
        stock=True,
        groups=check_some(grouping.groups, model),
        protected=grouping.protected,
        rows=layers(model.spec, (height, width)),
        input_shape=(height, width),
    )


def _prepare_traced(
    dense: nn.Module, example_inputs: Any, protected: set[str], options: PruneOptions
) -> Prepared:
    """Prepares any other network, run once on `example_inputs`. Attention that is not ours keeps all its channels."""
    # A network of the user's own may raise anything here.
    with _refused(
        f"{type(dense).__name__} cannot be copied",
        "first make permanent what it computes weights from (torch.nn.utils.prune.remove, remove_weight_norm)",
    ):
        model = copy.deepcopy(dense)
    with _refused(f"{type(dense).__name__} does not run", "give the inputs that it takes"):
        seen = trace(model, example_inputs)

    names = [name for name, _ in model.named_modules()]

    # Attention we do not know may tie channels in ways that tracing does not show: all
    # layers inside it are protected. An owner without a name is the network itself.
    inside = set()
    for owner in seen.unknown_attention:
        inside |= {name for name in names if not owner or f"{name}.".startswith(f"{owner}.")}

    with _refused(f"torch-pruning cannot trace {type(dense).__name__}", "prune a part of it"):
        grouping = find_groups(model, example_inputs, protected | inside, heads=options.heads)

    # Layers inside such attention are not named again: its own name says it.
    unsupported = {
        name: kind for name, kind in grouping.unsupported.items() if name not in inside
    }
    _warn_left_alone(seen.unknown_attention, unsupported)

    # A layer that runs twice is listed twice, and has its parameters once.
    listed = {row.name: row for row in seen.layers}
    total = sum(p.numel() for p in model.parameters())
    return Prepared(
        dense,
        model,
        stock=False,
        groups=check_some(grouping.groups, model),
        protected=grouping.protected,
        rows=seen.layers,
        input_shape=options.input_shape,
        example_inputs=example_inputs,
        rest=total - sum(row.cost("params") for row in listed.values()),
    )


@contextmanager
def _refused(what: str, remedy: str) -> Iterator[None]:
    """Turns whatever is raised inside into one sentence; what is said by ourselves passes."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {error}); {remedy}.") from error


def check_some(groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
    """Returns the groups; raises ValueError where there are none."""
    if not groups:
        raise ValueError(
            f"Nothing in {type(model).__name__} can be pruned: every group of channels is protected, "
            "leads to the network's outputs or was left as it is, as the warning says."
        )
    return groups


def _warn_left_alone(attention: dict[str, str], unsupported: dict[str, str]) -> None:
    """Warns once of all that was traced but cannot be cut."""
    parts = []
    if attention:
        parts.append(f"attention that segprune does not know: {summarise(attention)}")
    if unsupported:
        parts.append(f"layers that it cannot cut: {summarise(unsupported)}")
    if parts:
        # Six frames up is the line that calls Pruner.prune.
        warnings.warn(
            f"Left as it is, with all channels tied to it: {'; '.join(parts)}.", stacklevel=6
        )


def summarise(names: dict[str, str]) -> str:
    """Returns classes with their number, and the first name of each: SegformerAttention (8, first encoder.block.0)."""
    by_class: dict[str, list[str]] = {}
    for name, kind in names.items():
        by_class.setdefault(kind, []).append(name)
    return ", ".join(
        f"{kind} ({len(own)}, first {own[0] or 'the network itself'})"
        for kind, own in by_class.items()
    )
