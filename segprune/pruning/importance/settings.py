"""What the criteria share: the records they take and how a channel's weights are gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segprune.pruning.groups import Group, Member
from segprune.pruning.trace import TRANSPOSED_CONVS

Scores = np.ndarray[tuple[int], np.dtype[np.float64]]
Loss = Callable[[nn.Module, Any], Tensor]
TINY = float(np.finfo(float).tiny)


@dataclass(frozen=True)
class Settings:
    """`data`: batches, empty where none are needed; `fallback`: scores for groups that a criterion cannot rank."""

    data: list[Any]
    loss: Loss | None
    seed: int
    fallback: Mapping[str, Scores] | None


def weighted(model: nn.Module, group: Group) -> Iterator[tuple[Member, nn.Module]]:
    """Members whose layer carries channels by a weight; a normalisation's weights only scale them."""
    for member in group.members:
        module = model.get_submodule(member.layer)
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() >= 2:
            yield member, module


def channel_dim(module: nn.Module, member: Member) -> int:
    """Along which dimension of the layer's weight the member's positions lie."""
    return int((member.side == "in") != isinstance(module, TRANSPOSED_CONVS))


def by_position(module: nn.Module, member: Member) -> Tensor:
    """The layer's weight with the member's positions in front: positions, everything else."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows = weight.detach().movedim(channel_dim(module, member), 0).flatten(1)
    return rows[torch.from_numpy(member.positions).to(rows.device)]


def per_channel(group: Group, member: Member, values: Tensor) -> Scores:
    """Sums over the positions that belong to each channel."""
    sums = np.bincount(member.channels, values.double().cpu().numpy(), group.num_channels)
    return sums.astype(np.float64)


def layer_average(group: Group, layers: Iterable[Scores]) -> Scores:
    """Layers of other shapes have other sums, so each layer's are divided by their mean before they are averaged.

    Raw sums would compare 9 weights of a depth-wise filter with 2048 of a reduction filter.
    """
    total = np.zeros(group.num_channels)
    for count, values in enumerate(layers, start=1):
        total += (values / max(values.mean(), TINY) - total) / count
    return total
