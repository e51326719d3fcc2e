"""Criteria that read nothing but weights."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from segprune.pruning.groups import Group, Member
from segprune.pruning.importance.settings import (
    TINY,
    Scores,
    Settings,
    by_position,
    layer_average,
    per_channel,
    weighted,
)
from segprune.pruning.trace import NORMS


def l1(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """The sum of absolute weights that a channel has in each layer it touches, rows and columns alike.

    "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710).
    """
    return {group.name: _sums(model, group, 1) for group in groups}


def l2(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """The Euclidean norm of a channel's weights in each layer: "Soft Filter Pruning" (arXiv 1808.06866)."""
    return {
        group.name: layer_average(
            group,
            (
                np.sqrt(per_channel(group, member, by_position(module, member).double().square().sum(1)))
                for member, module in weighted(model, group)
            ),
        )
        for group in groups
    }


def fpgm(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """How far a channel's weights lie from those of all others, per layer: what is near others can be spared.

    "Filter Pruning via Geometric Median" (arXiv 1811.00250).
    """
    return {
        group.name: layer_average(group, (_distances(group, *found) for found in weighted(model, group)))
        for group in groups
    }


def lamp(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """A channel's squared weights as a share of those of all channels that are no weaker.

    "Layer-adaptive sparsity for the Magnitude-based Pruning" (arXiv 2010.07611), for channels in place of weights.
    """
    return {group.name: _share_of_stronger(_sums(model, group, 2)) for group in groups}


def random(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """The control: uniform numbers, the same for the same seed and the same group, whichever others there are."""
    return {
        group.name: np.random.default_rng([settings.seed, zlib.crc32(group.name.encode())]).random(group.num_channels)
        for group in groups
    }


def bn(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """Absolute gains of the normalisations that a channel passes: "Network Slimming" (arXiv 1708.06519).

    Groups without any are ranked by the fallback, or refused if there is none.
    """
    gains = {group.name: _gains(model, group) for group in groups}
    without = [group for group in groups if not gains[group.name]]
    if without and settings.fallback is None:
        kinds = ", ".join(dict.fromkeys(group.kind for group in without))
        raise ValueError(
            f"Method bn finds no normalisation with gains in the groups of kind {kinds}; "
            "say by what to rank those, for instance fallback='l1'."
        )
    fallback = settings.fallback or {}
    return {g.name: layer_average(g, gains[g.name]) if gains[g.name] else fallback[g.name] for g in groups}


def _sums(model: nn.Module, group: Group, power: int) -> Scores:
    return layer_average(
        group,
        (
            per_channel(group, member, by_position(module, member).double().abs().pow(power).sum(1))
            for member, module in weighted(model, group)
        ),
    )


def _distances(group: Group, member: Member, module: nn.Module) -> Scores:
    """Sum of the distances of each channel's weights to every other channel's."""
    rows = by_position(module, member).double()
    order = np.argsort(member.channels, kind="stable")
    channels, starts, counts = np.unique(member.channels[order], return_index=True, return_counts=True)
    slot = np.arange(len(order)) - np.repeat(starts, counts)  # which of its channel's positions
    owner = np.repeat(np.arange(len(channels)), counts)

    vectors = rows.new_zeros(len(channels), counts.max(), rows.shape[1])
    place = tuple(torch.from_numpy(indices).to(rows.device) for indices in (owner, slot))
    vectors[place] = rows[torch.from_numpy(order).to(rows.device)]

    sums = torch.cdist(vectors.flatten(1), vectors.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").sum(1)
    result = np.zeros(group.num_channels)
    result[channels] = sums.cpu().numpy()
    return result


def _share_of_stronger(squares: Scores) -> Scores:
    order = np.argsort(squares, kind="stable")
    left = np.cumsum(squares[order][::-1])[::-1]  # from each on upwards
    result = np.zeros(len(squares))
    result[order] = squares[order] / np.maximum(left, TINY)
    return result


def _gains(model: nn.Module, group: Group) -> list[Scores]:
    found = []
    for member in group.members:
        module = model.get_submodule(member.layer)
        if isinstance(module, NORMS) and isinstance(module.weight, Tensor):
            positions = torch.from_numpy(member.positions).to(module.weight.device)
            found.append(per_channel(group, member, module.weight.detach().abs()[positions]))
    return found
