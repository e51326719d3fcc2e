import numpy as np
import pytest
import torch
from torch import nn

from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.groups import Group, find_groups
from segprune.pruning.importance import l1_scores


@pytest.fixture
def model(small_model: SegFormer) -> SegFormer:
    return fold_decoder(small_model)


@pytest.fixture
def groups(model: SegFormer) -> tuple[Group, ...]:
    return find_groups(model, torch.zeros(1, 3, 64, 64).double(), set(), heads=True).groups


def scale_channel(model: nn.Module, group: Group, channel: int, factor: float) -> None:
    """Multiply every weight that the channel has in the group's layers."""
    for member in group.members:
        weight = model.get_submodule(member.layer).weight
        if weight.dim() > 1:
            rows = member.positions[member.channels == channel]
            with torch.no_grad():
                weight.transpose(0, int(member.side == "in"))[rows] *= factor


def test_every_channel_of_every_group_gets_a_finite_score_above_zero(model: SegFormer, groups) -> None:
    scores = l1_scores(model, groups)
    assert scores.keys() == {group.name for group in groups}
    for group in groups:
        assert scores[group.name].shape == (group.num_channels,)
        assert np.isfinite(scores[group.name]).all()
        assert (scores[group.name] > 0).all()


def test_the_same_network_gets_the_same_scores(model: SegFormer, groups) -> None:
    first, second = l1_scores(model, groups), l1_scores(model, groups)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["ffn", "qk", "v", "head", "reduction", "stage", "decoder"])
def test_a_channel_without_weights_scores_least_and_one_with_large_weights_most(model, groups, kind: str) -> None:
    group = next(group for group in groups if group.kind == kind)
    last = group.num_channels - 1
    scale_channel(model, group, 0, 0.0)
    scale_channel(model, group, last, 10.0)
    scores = l1_scores(model, groups)[group.name]
    assert scores[0] == 0.0
    assert (scores[1:] > 0.0).all()
    assert scores.argmax() == last


def test_scores_follow_their_channels_when_these_are_reordered(model: SegFormer, groups) -> None:
    group = next(group for group in groups if group.kind == "ffn")
    before = l1_scores(model, [group])[group.name]
    order = torch.randperm(group.num_channels)
    mlp = model.get_submodule(group.name.removesuffix(".ffn"))
    with torch.no_grad():
        mlp.fc1.weight.copy_(mlp.fc1.weight[order])
        mlp.dwconv.weight.copy_(mlp.dwconv.weight[order])
        mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])
    np.testing.assert_allclose(l1_scores(model, [group])[group.name], before[order.numpy()])


def test_a_layer_of_zeros_scores_zero_and_not_nan(model: SegFormer, groups) -> None:
    group = next(group for group in groups if group.kind == "qk")
    for channel in range(group.num_channels):
        scale_channel(model, group, channel, 0.0)
    assert (l1_scores(model, [group])[group.name] == 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_ranks_as_double_precision_does(model: SegFormer, groups, dtype: torch.dtype) -> None:
    exact = l1_scores(model, groups)
    rounded = l1_scores(model.to(dtype), groups)
    for name in exact:
        np.testing.assert_allclose(rounded[name], exact[name], rtol=2e-2)


def test_one_minus_of_a_weight_counts_as_much_as_one_plus(model: SegFormer, groups) -> None:
    before = l1_scores(model, groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    after = l1_scores(model, groups)
    assert all(np.array_equal(before[name], after[name]) for name in before)
