import copy
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.trained_like import fill
from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.groups import Group, find_groups
from segprune.pruning.importance import METHODS, NEED_IMAGES, gradients, score_channels
from segprune.pruning.importance.settings import Settings
from segprune.spec import Spec


@pytest.fixture
def model(small_model: SegFormer) -> SegFormer:
    return fold_decoder(small_model)


@pytest.fixture(scope="module")
def groups(small_spec: Spec) -> tuple[Group, ...]:
    """Found once: only the widths matter, and tracing takes longer than most tests here."""
    network = fold_decoder(SegFormer(small_spec))
    return find_groups(network, torch.zeros(1, 3, 64, 64), set(), heads=True).groups


def scale_channel(model: nn.Module, group: Group, channel: int, factor: float) -> None:
    """Multiply every weight that the channel has in the group's layers."""
    for member in group.members:
        weight = model.get_submodule(member.layer).weight
        if weight.dim() > 1:
            rows = member.positions[member.channels == channel]
            with torch.no_grad():
                weight.transpose(0, int(member.side == "in"))[rows] *= factor


def test_every_channel_of_every_group_gets_a_finite_score_above_zero(
    model: SegFormer, groups
) -> None:
    found = score_channels(model, groups)
    assert found.keys() == {group.name for group in groups}
    for group in groups:
        assert found[group.name].shape == (group.num_channels,)
        assert np.isfinite(found[group.name]).all()
        assert (found[group.name] > 0).all()


def test_the_same_network_gets_the_same_scores(model: SegFormer, groups) -> None:
    first, second = score_channels(model, groups), score_channels(model, groups)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["ffn", "qk", "v", "head", "reduction", "stage", "decoder"])
def test_a_channel_without_weights_scores_least_and_one_with_large_weights_most(
    model, groups, kind: str
) -> None:
    group = next(group for group in groups if group.kind == kind)
    last = group.num_channels - 1
    scale_channel(model, group, 0, 0.0)
    scale_channel(model, group, last, 10.0)
    found = score_channels(model, groups)[group.name]
    assert found[0] == 0.0
    assert (found[1:] > 0.0).all()
    assert found.argmax() == last


def test_scores_follow_their_channels_when_these_are_reordered(
    model: SegFormer, groups
) -> None:
    group = next(group for group in groups if group.kind == "ffn")
    before = score_channels(model, [group])[group.name]
    order = torch.randperm(group.num_channels)
    mlp = model.get_submodule(group.name.removesuffix(".ffn"))
    with torch.no_grad():
        mlp.fc1.weight.copy_(mlp.fc1.weight[order])
        mlp.dwconv.weight.copy_(mlp.dwconv.weight[order])
        mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])
    np.testing.assert_allclose(
        score_channels(model, [group])[group.name], before[order.numpy()]
    )


def test_a_layer_of_zeros_scores_zero_and_not_nan(model: SegFormer, groups) -> None:
    group = next(group for group in groups if group.kind == "qk")
    for channel in range(group.num_channels):
        scale_channel(model, group, channel, 0.0)
    assert (score_channels(model, [group])[group.name] == 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_ranks_as_double_precision_does(
    model: SegFormer, groups, dtype: torch.dtype
) -> None:
    exact = score_channels(model, groups)
    rounded = score_channels(model.to(dtype), groups)
    for name in exact:
        np.testing.assert_allclose(rounded[name], exact[name], rtol=2e-2)


def test_one_minus_of_a_weight_counts_as_much_as_one_plus(model: SegFormer, groups) -> None:
    before = score_channels(model, groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    after = score_channels(model, groups)
    assert all(np.array_equal(before[name], after[name]) for name in before)


# Every method


@pytest.fixture
def images() -> list[torch.Tensor]:
    return [torch.randn(2, 3, 64, 64).double(), torch.randn(1, 3, 64, 64).double()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ranks_every_group_and_leaves_the_network_alone(
    model, groups, images, method: str
) -> None:
    model.train()
    model.encoder.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    found = score_channels(model, groups, method, images)
    for group in groups:
        values = found[group.name]
        assert values.shape == (group.num_channels,)
        assert np.isfinite(values).all()
        assert (values >= 0.0).all()
        assert values.mean() == pytest.approx(1.0)
        assert (
            len(np.unique(values)) > 0.6 * group.num_channels or group.kind == "head"
        )  # some channels are dead
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.encoder.parameters()] == [False] * len(
        list(model.encoder.parameters())
    )
    assert model.training


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ranks_the_branches_of_a_conv_head(
    conv_model: SegFormer, images, method: str
) -> None:
    found_groups = find_groups(conv_model, torch.zeros(1, 3, 64, 64).double(), set()).groups
    branches = [group for group in found_groups if group.kind in ("branch", "decoder")]
    assert len(branches) == 5
    for values in score_channels(conv_model, branches, method, images).values():
        assert np.isfinite(values).all()
        assert values.mean() == pytest.approx(1.0)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_scores(model, groups, images, method: str) -> None:
    first, second = (score_channels(model, groups, method, images) for _ in range(2))
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-9)


# Against the formulas, on a small network: two convolutions and what is between them


@pytest.fixture
def pair() -> tuple[nn.Sequential, Group]:
    """Channels of the first convolution: its rows, a BatchNorm, a depth-wise convolution, the last one's columns."""
    layers = [
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(6, 4, 1),
    ]
    network = nn.Sequential(*layers).double().eval()
    fill(network)
    (group,) = find_groups(network, torch.zeros(1, 3, 8, 8).double(), set()).groups
    assert group.num_channels == 6
    return network, group


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 3, 8, 8).double()


def relative(*layers: np.ndarray) -> np.ndarray:
    return np.mean([values / values.mean() for values in layers], axis=0)


def slices(network: nn.Sequential) -> list[torch.Tensor]:
    """Per layer the weights of each of the six channels."""
    first, depthwise, last = (network[i].weight.detach() for i in (0, 3, 4))
    return [first.flatten(1), depthwise.flatten(1), last[:, :, 0, 0].T]


def raw_scores(method: str, pair: tuple[nn.Module, Group], data=()) -> np.ndarray:
    """As the criterion gives them, before they are divided by their mean."""
    network, group = pair
    return METHODS[method](network, [group], Settings(list(data), 0))[group.name]


@pytest.fixture
def _squared_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are those of a loss that is easy to write down again."""
    monkeypatch.setattr(gradients, "self_labelled_loss", squared_logits)


def test_l1_and_l2_are_norms_of_a_channels_weights(pair) -> None:
    for method, power in (("l1", 1), ("l2", 2)):
        layers = [
            np.array([np.linalg.norm(row, power) for row in layer.numpy()])
            for layer in slices(pair[0])
        ]
        np.testing.assert_allclose(raw_scores(method, pair), relative(*layers))


def test_fpgm_is_the_sum_of_distances_to_the_other_channels(pair) -> None:
    layers = [
        np.array([sum(float((a - b).norm()) for b in layer) for a in layer])
        for layer in slices(pair[0])
    ]
    np.testing.assert_allclose(raw_scores("fpgm", pair), relative(*layers))


def test_fpgm_compares_whole_heads(model: SegFormer, groups) -> None:
    group = next(group for group in groups if group.kind == "head")
    attention = model.get_submodule(group.name.removesuffix(".heads"))
    layers = []
    for weight in (
        attention.q.weight,
        attention.k.weight,
        attention.v.weight,
        attention.proj.weight.T,
    ):
        heads = weight.detach().unflatten(0, (attention.num_heads, -1)).flatten(1)
        layers.append(np.array([sum(float((a - b).norm()) for b in heads) for a in heads]))
    found = raw_scores("fpgm", (model, group))
    np.testing.assert_allclose(found, relative(*layers))


def test_lamp_is_the_share_of_the_squares_that_are_no_smaller(pair) -> None:
    squares = relative(*[layer.square().sum(1).numpy() for layer in slices(pair[0])])
    expected = [s / sum(t for t in squares if t >= s) for s in squares]
    np.testing.assert_allclose(raw_scores("lamp", pair), expected)


def test_wanda_weighs_weights_by_the_norm_of_what_comes_in(pair, x) -> None:
    network = pair[0]
    inputs = [x, network[:3](x), network[:4](x)]
    norms = [part.detach().square().sum((0, 2, 3)).sqrt() for part in inputs]
    first, depthwise, last = (network[i].weight.detach().abs() for i in (0, 3, 4))
    layers = [
        torch.einsum("oikl,i->o", first, norms[0]),
        torch.einsum("oikl,o->o", depthwise, norms[1]),
        torch.einsum("oikl,i->i", last, norms[2]),
    ]
    expected = relative(*[layer.numpy() for layer in layers])
    np.testing.assert_allclose(raw_scores("wanda", pair, list(x.split(2))), expected)


def squared_logits(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def products(
    network: nn.Sequential, batch: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weights, gradients) of the six channels: rows, biases, gains, columns."""
    network.zero_grad()
    squared_logits(network, batch).backward()
    found = [(p, p.grad) for layer in network[:4] for p in layer.parameters()]
    found.append((network[4].weight.transpose(0, 1), network[4].weight.grad.transpose(0, 1)))
    return [
        (p.detach().flatten(1) if p.dim() > 1 else p.detach()[:, None], g.reshape(6, -1))
        for p, g in found
    ]


@pytest.mark.usefixtures("_squared_loss")
def test_taylor_is_the_first_order_change_of_the_loss_batch_by_batch(pair, x) -> None:
    expected = np.zeros(6)
    for batch in x.split(2):
        expected += sum((p * g).sum(1) for p, g in products(pair[0], batch)).abs().numpy() / 3
    np.testing.assert_allclose(raw_scores("taylor", pair, list(x.split(2))), expected)


@pytest.mark.usefixtures("_squared_loss")
def test_taylor_foretells_what_a_slightly_weaker_channel_does_to_the_loss(pair, x) -> None:
    """Scaling all that the last convolution reads of a channel: the columns' part of the sum, by finite differences."""
    network, group = pair
    columns = Group("columns", "other", 6, tuple(m for m in group.members if m.side == "in"))
    found = raw_scores("taylor", (network, columns), [x])
    with torch.no_grad():
        before = squared_logits(network, x)
        for channel in range(6):
            weaker = copy.deepcopy(network)
            weaker[4].weight[:, channel] *= 1 - 1e-6
            change = float(abs(squared_logits(weaker, x) - before)) / 1e-6
            assert found[channel] == pytest.approx(change, rel=1e-3)


@pytest.mark.usefixtures("_squared_loss")
def test_fisher_is_half_the_squared_weight_times_the_squared_gradient_of_each_image(
    pair, x
) -> None:
    expected = np.zeros(6)
    for image in x.split(1):
        parts = products(pair[0], image)
        expected += sum((p.square() * g.square()).sum(1) for p, g in parts).numpy() / 2 / 5
    np.testing.assert_allclose(raw_scores("fisher", pair, list(x.split(2))), expected)


def test_the_networks_own_decisions_are_the_labels(
    pair, x, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        logits = model(batch)
        return nn.functional.cross_entropy(logits, logits.argmax(1))

    own = raw_scores("taylor", pair, [x])
    monkeypatch.setattr(gradients, "self_labelled_loss", loss)
    np.testing.assert_allclose(own, raw_scores("taylor", pair, [x]), 1e-5)


def test_bn_ranks_by_gains_and_by_l1_where_there_are_none(
    pair, model: SegFormer, groups
) -> None:
    gains = pair[0][1].weight.detach().abs().numpy()
    np.testing.assert_allclose(raw_scores("bn", pair), gains / gains.mean())
    mixed, weights = score_channels(model, groups, "bn"), score_channels(model, groups)
    for group in groups:
        same = np.allclose(mixed[group.name], weights[group.name])
        assert same == (group.kind not in ("stage", "reduction", "decoder")), group.name


def test_random_depends_on_seed_and_group_alone(model: SegFormer, groups) -> None:
    every, one = (
        score_channels(model, groups, "random"),
        score_channels(model, groups[:1], "random"),
    )
    assert np.array_equal(every[groups[0].name], one[groups[0].name])
    assert not np.array_equal(
        score_channels(model, groups[:1], "random", seed=1)[groups[0].name], one[groups[0].name]
    )


# Refusals


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=re.compile(r"^[A-Z`][^\n]*\.$")) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("method", NEED_IMAGES)
def test_a_method_that_needs_images_is_refused_without(model, groups, method: str) -> None:
    text = refusal(lambda: score_channels(model, groups, method))
    assert f"Method {method} needs `images`" in text


def test_an_unknown_method_is_refused(model, groups) -> None:
    text = refusal(lambda: score_channels(model, groups, "l3"))
    assert "'l3'" in text
    assert text.endswith("choose one of l1, l2, fpgm, lamp, random, bn, taylor, fisher, wanda.")


@pytest.mark.parametrize("method", NEED_IMAGES)
def test_images_that_are_not_finite_are_refused(model, groups, images, method: str) -> None:
    images[0][0, 0, 0, 0] = float("nan")
    assert refusal(lambda: score_channels(model, groups, method, images)) == (
        f"Method {method} gives scores that are not finite; the weights or the images hold values that are not."
    )
