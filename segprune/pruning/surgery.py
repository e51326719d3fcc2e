"""Carries a plan out: slices weights, and reads the new spec off the cut network."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from segprune.model import Attention, Block, SegFormer
from segprune.pruning.groups import Group, Side
from segprune.pruning.plan import Plan
from segprune.pruning.prepare import Prepared
from segprune.pruning.trace import (
    NORMS,
    TRANSPOSED_CONVS,
    is_depthwise,
    width_of,
)
from segprune.spec import BlockSpec, Spec, block_name, stage_name


def cut(prepared: Prepared, plan: Plan) -> nn.Module:
    """Returns a new network with only the channels that the plan keeps; a stock SegFormer's has its new spec.

    Whether any other network was traced rightly is checked by verify.py.
    """
    model = copy.deepcopy(prepared.model)
    cut_channels(model, prepared.groups, plan)

    # Our own layers are sliced as their groups say, so that only the spec has to follow.
    if prepared.stock:
        assert isinstance(model, SegFormer)
        model.spec = read_spec(model)
    return model


def cut_channels(model: nn.Module, groups: Iterable[Group], plan: Plan) -> None:
    """Removes from `model`, in place, every channel that the plan does not keep."""
    # Slicing alone would leave the old number of heads, and the forward pass would split
    # wrongly.
    groups = list(groups)
    for group in groups:
        if group.kind == "head":
            attention = model.get_submodule(group.name.removesuffix(".heads"))
            assert isinstance(attention, Attention)
            attention.num_heads = len(plan.keep[group.name])

    # Each side of a layer is sliced once, with everything that any group takes from it.
    for (layer, side), positions in removed_positions(groups, plan).items():
        _slice(model.get_submodule(layer), side, positions)


def removed_positions(groups: Iterable[Group], plan: Plan) -> dict[tuple[str, Side], set[int]]:
    """Returns what the plan takes from each side of each layer that it touches."""
    removed: dict[tuple[str, Side], set[int]] = {}
    for group in groups:
        kept = np.zeros(group.num_channels, dtype=bool)
        kept[list(plan.keep[group.name])] = True
        if kept.all():
            continue

        # Groups may overlap: a removed head takes positions that its queries, keys and
        # values name too.
        for member in group.members:
            positions = member.positions[~kept[member.channels]].tolist()
            removed.setdefault((member.layer, member.side), set()).update(positions)
    return removed


def _slice(module: nn.Module, side: Side, removed: set[int]) -> None:
    if isinstance(module, NORMS) or is_depthwise(module):
        _slice_one_sided(module, removed)
        return

    # Outputs come first in a weight, but in a transposed convolution inputs do.
    dim = int((side == "in") != isinstance(module, TRANSPOSED_CONVS))
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    keep = _complement(removed, weight.shape[dim], weight.device)
    module.weight = _parameter(weight, dim, keep)

    # The bias belongs to the outputs alone.
    if side == "out" and isinstance(module.bias, nn.Parameter):
        module.bias = _parameter(module.bias, 0, keep)

    # The stored widths have to agree with the weight: repr, tracing and `read_spec` read them.
    names = (
        ("out_features", "out_channels") if side == "out" else ("in_features", "in_channels")
    )
    setattr(module, names[0] if isinstance(module, nn.Linear) else names[1], len(keep))


def _slice_one_sided(module: nn.Module, removed: set[int]) -> None:
    """Slices a normalisation or a depth-wise convolution, whose tensors all have the channels in front."""
    size = width_of(module, "out")
    for name, parameter in list(module.named_parameters(recurse=False)):
        keep = _complement(removed, size, parameter.device)
        setattr(module, name, _parameter(parameter, 0, keep))

    # Running statistics have a number per channel; BatchNorm's count of batches has none.
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.dim() > 0:
            keep = _complement(removed, size, buffer.device)
            setattr(module, name, buffer[keep].clone())

    width = size - len(removed)
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (width,)
    elif isinstance(module, NORMS):
        module.num_features = width
    else:
        module.in_channels = module.out_channels = module.groups = width  # type: ignore[assignment]


def _complement(removed: set[int], size: int, device: torch.device) -> torch.Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[list(removed)] = False
    return mask.nonzero().flatten().to(device)


def _parameter(old: nn.Parameter, dim: int, keep: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(
        old.detach().index_select(dim, keep).clone(), requires_grad=old.requires_grad
    )


def read_spec(model: SegFormer) -> Spec:
    """Returns the spec of a cut network: widths off its layers, everything else from the old spec."""
    stages = []
    for i, stage in enumerate(model.spec.stages):
        blocks = []
        for j, block in enumerate(stage.blocks):
            module = model.get_submodule(block_name(i, j))
            assert isinstance(module, Block)
            blocks.append(_read_block(block, module))

        # The patch embedding writes the residual stream first, and all of the stage is as wide.
        width = width_of(model.get_submodule(f"{stage_name(i)}.patch_embed.proj"), "out")
        stages.append(replace(stage, width=width, blocks=tuple(blocks)))

    # The branches of a folded head write the sum itself, and have no widths of their own.
    head = model.decode_head
    dims = tuple(width_of(branch, "out") for branch in head.branches)
    return replace(
        model.spec,
        stages=tuple(stages),
        branch_dims=None if model.spec.folded else dims,
        decoder_dim=head.norm.num_features,
    )


def _read_block(block: BlockSpec, module: Block) -> BlockSpec:
    if module.mlp is not None:
        block = replace(block, ffn_dim=module.mlp.fc1.out_features)
    attention = module.attn
    if attention is None:
        return block

    # Queries, keys and values lie head by head, all heads equally wide.
    return replace(
        block,
        num_heads=attention.num_heads,
        qk_dim=attention.q.out_features // attention.num_heads,
        v_dim=attention.v.out_features // attention.num_heads,
        reduction_dim=None if attention.sr is None else attention.sr.out_channels,
    )
