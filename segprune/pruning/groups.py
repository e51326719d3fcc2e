"""Which channels go together, and which may not go.

torch-pruning's `DependencyGraph` finds what residuals, concatenations and depth-wise convolutions tie together,
in our networks and in a user's own. Inside attention the groups are ours: a tracer ties queries, keys and values
together, although query/key and value dimensions can go separately. So for tracing each `Attention` is replaced
by a stand-in linear layer, and its inner groups are added by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from segprune.model import Attention, DecodeHead, Mlp, PatchEmbed
from segprune.pruning.trace import (
    CONVS,
    NORMS,
    TRANSPOSED_CONVS,
    eval_mode,
    is_depthwise,
    run,
    tensors_in,
    width_of,
)

MAX_STEPS = (
    8000  # of the tracer in one group; a b5 takes 574, 48 layers joined as in DenseNet 2645
)
Side = Literal["out", "in"]
Indices = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Member:
    """Where a group's channels lie in one layer: `positions[i]` of its side belongs to `channels[i]`.

    Normalisations and depth-wise convolutions have only an "out" side.
    """

    layer: str
    side: Side
    positions: Indices
    channels: Indices


@dataclass(frozen=True)
class Group:
    """Channels cut together. `parts` > 1: the channels are split evenly (heads), and each part loses equally many.

    Channel c belongs to part c // slots and is its slot c % slots.
    """

    name: str
    kind: str
    num_channels: int
    members: tuple[Member, ...]
    parts: int = 1

    @property
    def slots(self) -> int:
        return self.num_channels // self.parts


@dataclass(frozen=True)
class Grouping:
    """The prunable groups, the protected ones, and layers left alone as their kind cannot be cut (name: class)."""

    groups: tuple[Group, ...]
    protected: tuple[Group, ...]
    unsupported: dict[str, str]


def find_groups(
    model: nn.Module, example_inputs: Any, protected: Set[str], *, heads: bool = False
) -> Grouping:
    """Finds all groups of `model` whose every output side is free.

    `protected` has names of layers whose outputs stay, or of groups; the network's own outputs always stay. `heads`
    adds a group of whole heads per attention that has several. The model is left as it was.
    """
    modules = dict(model.named_modules())

    # What residuals and concatenations tie together is traced; the inside of our attention is known.
    groups, unsupported = _traced_groups(model, example_inputs, modules)
    for name, module in modules.items():
        if type(module) is Attention:
            groups += _attention_groups(name, module, heads=heads)

    # Weights that two layers share would part when one of them is cut.
    tied = _find_tied(modules)
    for group in groups:
        shared = {member.layer for member in group.members} & tied
        unsupported |= {name: type(modules[name]).__name__ for name in sorted(shared)}
    groups = [
        group for group in groups if not any(member.layer in tied for member in group.members)
    ]

    # A protected group is kept apart and not dropped: it still has to be shown and named.
    free = tuple(group for group in groups if not is_protected(group, protected))
    kept = tuple(group for group in groups if is_protected(group, protected))
    return Grouping(free, kept, unsupported)


def is_protected(group: Group, names: Set[str]) -> bool:
    """Returns whether it is named itself, or one of its layers, whose outputs have to stay."""
    return group.name in names or any(
        member.side == "out" and member.layer in names for member in group.members
    )


def _find_tied(modules: dict[str, nn.Module]) -> set[str]:
    """Returns the layers that have a parameter which another layer has too."""
    owners: dict[int, set[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    return set().union(*(names for names in owners.values() if len(names) > 1))


class _StandIn(nn.Linear):
    """Takes an attention's place while tracing: width in, width out, nothing tied in between."""

    def forward(self, input: Tensor, height: int = 0, width: int = 0) -> Tensor:
        return super().forward(input)


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """Every parameter with a gradient for a while: torch-pruning follows gradients and would miss frozen layers."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    # The tracer then sees one product in place of an attention, and cannot tie its queries,
    # keys and values together.
    replaced: list[tuple[nn.Module, str, nn.Module]] = []

    # A list, since the tree is changed while it is walked.
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is Attention:  # a subclass may compute anything
                weight = child.q.weight
                width = child.q.in_features
                stand_in = _StandIn(width, width, device=weight.device, dtype=weight.dtype)
                setattr(parent, name, stand_in)
                replaced.append((parent, name, child))
    try:
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


def _traced_groups(
    model: nn.Module, example_inputs: Any, modules: dict[str, nn.Module]
) -> tuple[list[Group], dict[str, str]]:
    # Imported here, where it is used: everything else in the package works without it.
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "Pruning needs torch-pruning, which is not installed; run: pip install torch-pruning==1.6.1"
        ) from error

    groups: list[Group] = []
    unsupported: dict[str, str] = {}
    graph = torch_pruning.DependencyGraph()
    output_kind = torch_pruning.ops._OutputOp

    with eval_mode(model), _trainable(model), _stand_ins(model), torch.enable_grad():
        # Read only now, so that a stand-in has the name of the attention that it replaces.
        names = {module: name for name, module in model.named_modules()}

        # torch-pruning runs the network once and follows autograd's graph back from the
        # outputs.
        graph.build_dependency(
            model, example_inputs, forward_fn=run, output_transform=tensors_in, verbose=False
        )

        # Some networks send the tracer in circles, so that it may only follow so many ties.
        steps = _bound_steps(graph)
        visited: set[nn.Module] = set()
        for layer in list(graph.module2node):
            # A depth-wise convolution belongs to the group of what it reads.
            roots = (nn.Linear, *CONVS, *TRANSPOSED_CONVS)
            if not isinstance(layer, roots) or layer in visited:
                continue
            steps.left = steps.most
            try:
                items = _trace_group(graph, layer)
            except (IndexError, RecursionError):
                # Into a recurrent layer, for instance, it counts beyond the channels.
                unsupported[names[layer]] = type(layer).__name__
                continue
            visited |= {
                item.module
                for item in items
                if graph.is_out_channel_pruning_fn(item.dep.handler)
            }

            # The network's own outputs stay as they are.
            if any(
                isinstance(item.module, output_kind) or _is_last(graph, item.dep)
                for item in items
            ):
                continue

            # One layer that cannot be cut protects all channels that are tied to it.
            strange = _find_strange(graph, items, names)
            if strange:
                unsupported |= strange
                continue

            # Positions beyond a layer's width: the tracer has lost count, so that nothing
            # is cut there.
            members = _find_members(graph, items, names, modules)
            misread = {
                m.layer: type(modules[m.layer]).__name__
                for m in members
                if not _fits(m, modules[m.layer])
            }
            if misread:
                unsupported |= misread
                continue

            # The first item is the layer that the group was found from; its outputs number
            # the channels.
            groups.append(_named_group(members, len(items[0].positions), modules))

    return groups, unsupported


class _Item(NamedTuple):
    """What the tracer says of one layer in a group: the channels of the group, and where they lie in the layer."""

    dep: Any
    positions: list[int]
    channels: list[int]

    @property
    def module(self) -> Any:
        return self.dep.target.module


@dataclass
class _Steps:
    """How often the tracer may still go on from one layer to the next while it looks for one group."""

    most: int
    left: int = 0


class _Ties(list[Any]):
    """What a traced layer is tied to; raises RecursionError where it is followed too often."""

    def __init__(self, ties: list[Any], steps: _Steps) -> None:
        super().__init__(ties)
        self.steps = steps

    def __iter__(self) -> Iterator[Any]:
        self.steps.left -= 1
        if self.steps.left < 0:
            raise RecursionError("the tracer runs in circles")
        return super().__iter__()


def _bound_steps(graph: Any) -> _Steps:
    steps = _Steps(MAX_STEPS)
    for node in graph.module2node.values():
        node.dependencies = _Ties(node.dependencies, steps)
    return steps


def _trace_group(graph: Any, layer: nn.Module) -> list[_Item]:
    """Returns what is tied to the outputs of a layer; its own item is the first."""
    pruner = graph.get_pruner_of_module(layer)
    channels = list(range(pruner.get_out_channels(layer)))
    group = graph.get_pruning_group(layer, pruner.prune_out_channels, channels)
    return [_Item(item.dep, item.idxs, item.root_idxs) for item in group]


def _is_last(graph: Any, dep: Any) -> bool:
    """Returns whether a layer's outputs are the network's own, so that cutting them would change its result."""
    return not dep.target.outputs and graph.is_out_channel_pruning_fn(dep.handler)


def _find_strange(
    graph: Any, items: list[_Item], names: dict[nn.Module, str]
) -> dict[str, str]:
    """Returns the layers and bare parameters of a traced group that cannot be cut, with their classes."""
    strange = {}
    for item in items:
        # A bare parameter has no layer whose width could be set beside it.
        if isinstance(item.module, nn.Parameter):
            strange[graph._param_to_name[item.module]] = "Parameter"
        elif (
            isinstance(item.module, nn.Module)
            and item.module in names
            and not _can_cut(item.module)
        ):
            strange[names[item.module]] = type(item.module).__name__
    return strange


def _find_members(
    graph: Any, items: list[_Item], names: dict[nn.Module, str], modules: dict[str, nn.Module]
) -> list[Member]:
    members: list[Member] = []
    for item in items:
        # The tracer's own items, for concatenations and reshapes, hold no channels to remove.
        if isinstance(item.module, nn.Module) and item.module in names:
            members += _members(graph, item, names[item.module], modules)
    return members


def _can_cut(module: nn.Module) -> bool:
    # A parametrised weight (weight_norm, spectral_norm, a pruning mask) is computed anew from
    # tensors of other names before each pass.
    weight = getattr(module, "weight", None)
    if weight is not None and "weight" not in module._parameters:
        return False

    # In a grouped convolution each output reads a slice of the inputs, and the slices would
    # have to remain equally wide. Depth-wise ones are simply one filter per channel.
    if isinstance(module, CONVS):
        return module.groups == 1 or is_depthwise(module)
    if isinstance(module, TRANSPOSED_CONVS):
        return bool(module.groups == 1)

    # A LayerNorm over several dimensions has a weight per position, and not per channel.
    if isinstance(module, nn.LayerNorm):
        return len(module.normalized_shape) == 1
    if isinstance(module, (nn.Linear, *NORMS)):
        return True

    # GroupNorm takes statistics over sets of neighbouring channels, which a cut would
    # shift; instance norms are not sliced by surgery.py.
    if isinstance(
        module, nn.GroupNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
    ):
        return False

    # Activations, pooling and the like work at any width; unknown layers with weights do not.
    return not any(True for _ in module.parameters())


def _fits(member: Member, module: nn.Module) -> bool:
    """Returns False behind a reshape that mixes channels with space: the tracer then counts beyond the width."""
    return bool(member.positions.max() < width_of(module, member.side))


def _members(
    graph: Any, item: _Item, name: str, modules: dict[str, nn.Module]
) -> Iterator[Member]:
    """Yields where a group's channels lie in one traced layer; an attention's stand-in has several layers behind it."""
    module = item.module
    if not any(True for _ in module.parameters()) and not isinstance(module, NORMS):
        return  # an activation or the like: nothing to cut

    positions = np.asarray(item.positions, dtype=np.int64)
    channels = np.asarray(item.channels, dtype=np.int64)

    # Layers whose input and output channels are the same are listed once, as an output side.
    one_sided = isinstance(module, NORMS) or is_depthwise(module)
    side: Side = (
        "out" if one_sided or graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
    )

    if not isinstance(module, _StandIn):
        yield Member(name, side, positions, channels)
    elif side == "out":
        yield Member(f"{name}.proj", "out", positions, channels)
    else:
        attention = modules[name]
        assert isinstance(attention, Attention)

        # A stand-in's input is read by the layers that read the attention's: queries
        # always, and keys and values, directly or through the reduction.
        readers = ("q", "k", "v") if attention.sr is None else ("q", "sr")
        for reader in readers:
            yield Member(f"{name}.{reader}", "in", positions, channels)


def _named_group(
    members: list[Member], num_channels: int, modules: dict[str, nn.Module]
) -> Group:
    """Returns a group with kind and name by the glossary where the layers are ours; else "other", by the first layer.

    A stage's width is a stage's even where the decode head reads it: kinds are looked for in that order.
    """
    names: dict[str, str] = {}
    for member in members:
        parent_name, _, leaf = member.layer.rpartition(".")
        parent = modules.get(parent_name)
        grandparent = modules.get(parent_name.rpartition(".")[0])

        # One member decides a kind: the patch embedding starts the residual stream, the head's
        # BatchNorm reads the fused sum, the depth-wise convolution lies within the FFN.
        if member.side == "out" and isinstance(parent, PatchEmbed):
            names["stage"] = parent_name.removesuffix("patch_embed") + "width"
        elif isinstance(parent, DecodeHead) and leaf == "norm":
            names["decoder"] = f"{parent_name}.width"
        elif isinstance(parent, Mlp) and leaf == "dwconv":
            names["ffn"] = f"{parent_name}.ffn"
        elif isinstance(grandparent, DecodeHead) and member.side == "out":
            names.setdefault("branch", member.layer)

    for kind in ("stage", "decoder", "ffn", "branch"):
        if kind in names:
            return Group(names[kind], kind, num_channels, tuple(members))
    return Group(members[0].layer, "other", num_channels, tuple(members))


def group_names(model: nn.Module) -> list[str]:
    """Returns the names that groups of our own layers have, protected or not; others are called after a layer."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, PatchEmbed):
            names.append(name.removesuffix("patch_embed") + "width")
        elif isinstance(module, DecodeHead):
            names.append(f"{name}.width")
        elif isinstance(module, Mlp):
            names.append(f"{name}.ffn")
        elif type(module) is Attention:
            names += [group.name for group in _attention_groups(name, module, heads=True)]
    return names


def _attention_groups(name: str, module: Attention, *, heads: bool) -> Iterator[Group]:
    num_heads = module.num_heads
    qk, v = module.q.out_features, module.v.out_features

    # Queries and keys share their channels, and so do values and the output product.
    yield _block_group(f"{name}.qk", "qk", qk, [("q", "out"), ("k", "out")], name, num_heads)
    yield _block_group(f"{name}.v", "v", v, [("v", "out"), ("proj", "in")], name, num_heads)

    # What the reduction puts out is normalised, and read by keys and values.
    if module.sr is not None:
        sides: list[tuple[str, Side]] = [
            ("sr", "out"),
            ("norm", "out"),
            ("k", "in"),
            ("v", "in"),
        ]
        yield _block_group(
            f"{name}.reduction", "reduction", module.sr.out_channels, sides, name, 1
        )

    # A whole head takes its channels out of all four layers.
    if heads and num_heads > 1:
        totals: list[tuple[str, Side, int]] = [
            ("q", "out", qk),
            ("k", "out", qk),
            ("v", "out", v),
            ("proj", "in", v),
        ]

        # Channel h of this group is head h, which owns total / num_heads neighbouring
        # positions.
        members = [
            Member(
                f"{name}.{layer}",
                side,
                np.arange(total),
                np.arange(total) // (total // num_heads),
            )
            for layer, side, total in totals
        ]
        yield Group(f"{name}.heads", "head", num_heads, tuple(members))


def _block_group(
    name: str,
    kind: str,
    num_channels: int,
    sides: list[tuple[str, Side]],
    prefix: str,
    parts: int,
) -> Group:
    every = np.arange(num_channels)
    members = tuple(Member(f"{prefix}.{layer}", side, every, every) for layer, side in sides)
    return Group(name, kind, num_channels, members, parts)
