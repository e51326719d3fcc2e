"""What the criteria share: the record they take and how a channel's weights are gathered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segprune.pruning.groups import Group, Member
from segprune.pruning.trace import TRANSPOSED_CONVS

Scores = np.ndarray[tuple[int], np.dtype[np.float64]]
TINY = float(np.finfo(float).tiny)


@dataclass(frozen=True)
class Settings:
    """`images`: batches, empty where none are needed; `seed`: of random."""

    images: list[Any]
    seed: int


def weighted_members(model: nn.Module, group: Group) -> Iterator[tuple[Member, nn.Module]]:
    """Yields members whose layer carries channels by a weight; a normalisation's weights only scale them."""
    for member in group.members:
        module = model.get_submodule(member.layer)
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() >= 2:
            yield member, module


def channel_dim(module: nn.Module, member: Member) -> int:
    """Returns along which dimension of the layer's weight the member's positions lie."""
    return int((member.side == "in") != isinstance(module, TRANSPOSED_CONVS))


def weight_by_position(module: nn.Module, member: Member) -> Tensor:
    """Returns the layer's weight with the member's positions in front: positions, everything else."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows = weight.detach().movedim(channel_dim(module, member), 0).flatten(1)
    return rows[torch.from_numpy(member.positions).to(rows.device)]


def sum_per_channel(group: Group, member: Member, values: Tensor) -> Scores:
    """Sums over the positions that belong to each channel."""
    # A whole head, or a channel behind a reshape, has several positions in one layer.
    sums = np.bincount(member.channels, values.double().cpu().numpy(), group.num_channels)
    return sums.astype(np.float64)


def average_layers(group: Group, layers: Iterable[Scores]) -> Scores:
    """Averages over the layers, each divided by its mean before: layers of other shapes have other sums.

    Raw sums would compare 9 weights of a depth-wise filter with 2048 of a reduction filter.
    """
    total = np.zeros(group.num_channels)

    # A running mean, so that `layers` may be a generator.
    for count, values in enumerate(layers, start=1):
        total += (values / max(values.mean(), TINY) - total) / count
    return total
