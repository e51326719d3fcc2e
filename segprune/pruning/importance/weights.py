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
    average_layers,
    sum_per_channel,
    weight_by_position,
    weighted_members,
)
from segprune.pruning.trace import NORMS


def l1(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """The sum of absolute weights that a channel has in each layer it touches, rows and columns alike.

    "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710).
    """
    return {group.name: average_layers(group, _sums(model, group, 1)) for group in groups}


def l2(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """The Euclidean norm of a channel's weights in each layer: "Soft Filter Pruning" (arXiv 1808.06866)."""
    return {
        group.name: average_layers(group, map(np.sqrt, _sums(model, group, 2)))
        for group in groups
    }


def fpgm(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """How far a channel's weights lie from those of all others, per layer: what is near others can be spared.

    "Filter Pruning via Geometric Median" (arXiv 1811.00250).
    """
    scores = {}
    for group in groups:
        layers = [
            _distances(group, member, module)
            for member, module in weighted_members(model, group)
        ]
        scores[group.name] = average_layers(group, layers)
    return scores


def lamp(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """A channel's squared weights as a share of those of all channels that are no weaker.

    "Layer-adaptive sparsity for the Magnitude-based Pruning" (arXiv 2010.07611), for channels in place of weights.
    """
    return {
        group.name: _share_of_stronger(average_layers(group, _sums(model, group, 2)))
        for group in groups
    }


def random(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """The control: uniform numbers, the same for the same seed and the same group, whichever others there are."""
    scores: dict[str, Scores] = {}
    for group in groups:
        # Not `hash`, which differs from one run of Python to the next.
        seeds = [settings.seed, zlib.crc32(group.name.encode())]
        scores[group.name] = np.random.default_rng(seeds).random(group.num_channels)
    return scores


def bn(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """Absolute gains of the normalisations that a channel passes: "Network Slimming" (arXiv 1708.06519).

    Groups whose channels pass none are ranked by l1.
    """
    scores = l1(model, groups, settings)
    for group in groups:
        gains = _gains(model, group)
        if gains:
            # A channel may pass several norms; each counts relative to its own mean.
            scores[group.name] = average_layers(group, gains)
    return scores


def _sums(model: nn.Module, group: Group, power: int) -> list[Scores]:
    """Returns for each layer of the group the sum of a channel's absolute weights to that power."""
    sums = []
    for member, module in weighted_members(model, group):
        weights = weight_by_position(module, member).double().abs()
        sums.append(sum_per_channel(group, member, weights.pow(power).sum(1)))
    return sums


def _distances(group: Group, member: Member, module: nn.Module) -> Scores:
    """Returns the sum of the distances of each channel's weights to every other channel's, in one layer."""
    rows = weight_by_position(module, member).double()

    # A channel may lie at several positions of the layer: their weights, one after the other, are its vector. Channels
    # with fewer positions than others are filled up with zeros.
    order = np.argsort(member.channels, kind="stable")
    channels, starts, counts = np.unique(
        member.channels[order], return_index=True, return_counts=True
    )
    channel_of_row = np.repeat(np.arange(len(channels)), counts)
    place_of_row = np.arange(len(order)) - np.repeat(starts, counts)

    vectors = rows.new_zeros(len(channels), counts.max(), rows.shape[1])
    owners, places, sources = (
        torch.from_numpy(index).to(rows.device)
        for index in (channel_of_row, place_of_row, order)
    )
    vectors[owners, places] = rows[sources]

    # The fast way of cdist, by a product, is too coarse for vectors that lie close together.
    flat = vectors.flatten(1)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").sum(1)

    result = np.zeros(group.num_channels)
    result[channels] = distances.cpu().numpy()
    return result


def _share_of_stronger(squares: Scores) -> Scores:
    # Summed from the strongest down: for each channel, itself and all that are no weaker.
    # The strongest has the share 1.
    order = np.argsort(squares, kind="stable")
    no_weaker = np.cumsum(squares[order][::-1])[::-1]
    result = np.zeros(len(squares))
    result[order] = squares[order] / np.maximum(no_weaker, TINY)
    return result


def _gains(model: nn.Module, group: Group) -> list[Scores]:
    gains = []
    for member in group.members:
        module = model.get_submodule(member.layer)
        if isinstance(module, NORMS) and isinstance(module.weight, Tensor):
            positions = torch.from_numpy(member.positions).to(module.weight.device)
            gains.append(
                sum_per_channel(group, member, module.weight.detach().abs()[positions])
            )
    return gains
