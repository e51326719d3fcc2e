"""A score per channel: how much the network would miss it. Higher stays.

L1: the sum of absolute weights a channel has in each layer it touches, rows and columns alike ("Pruning Filters
for Efficient ConvNets", arXiv 1608.08710). Layers of other shapes have other sums, so each layer's are divided by
their mean over the group before they are averaged. Raw sums would compare 9 weights of a depth-wise filter with
2048 of a reduction filter.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from segprune.pruning.groups import Group, Member
from segprune.pruning.trace import TRANSPOSED_CONVS

Scores = np.ndarray[tuple[int], np.dtype[np.float64]]


def l1_scores(model: nn.Module, groups: Iterable[Group]) -> dict[str, Scores]:
    """For each group by name, one score per channel, mean 1 over the group."""
    return {group.name: _l1_group(model, group) for group in groups}


def _l1_group(model: nn.Module, group: Group) -> Scores:
    total = np.zeros(group.num_channels)
    for member in group.members:
        module = model.get_submodule(member.layer)
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() < 2:
            continue  # a normalisation's weights scale channels, they do not carry them
        sums = np.bincount(member.channels, weights=_l1(module, member)[member.positions], minlength=group.num_channels)
        total += sums / max(sums.mean(), np.finfo(float).tiny)
    return total / max(total.mean(), np.finfo(float).tiny)


def _l1(module: nn.Module, member: Member) -> Scores:
    """Absolute sums along one side of a layer's weight."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    transposed = isinstance(module, TRANSPOSED_CONVS)
    dim = int((member.side == "in") != transposed)
    others = [d for d in range(weight.dim()) if d != dim]
    result: Scores = torch.linalg.vector_norm(weight.detach(), 1, dim=others, dtype=torch.float64).cpu().numpy()
    return result
