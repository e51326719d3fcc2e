"""Which parameter gets which rate and decay, read off by name; and what optimisers make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from segprune.model import SegFormer
from segprune.training.optim import OPTIMIZERS, OptimizerName, make_optimizer, parameter_groups


def by_name(model: nn.Module, groups: list[dict[str, Any]], key: str) -> dict[str, float]:
    """The groups' value of `key` for every parameter's name."""
    values = {id(parameter): group[key] for group in groups for parameter in group["params"]}
    return {name: values[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("head_lr", [1.0, 10.0])
def test_every_parameter_is_there_exactly_once(small_model: SegFormer, head_lr: float) -> None:
    next(small_model.encoder.parameters()).requires_grad_(False)  # it may be thawed later
    groups = parameter_groups(small_model, 0.01, head_lr)
    given = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(given) == len(set(given))
    assert set(given) == {id(parameter) for parameter in small_model.parameters()}


def test_weights_decay_but_biases_and_norms_do_not(small_model: SegFormer) -> None:
    decays = by_name(small_model, parameter_groups(small_model, 0.05, 10.0), "weight_decay")
    for name, decay in decays.items():
        plain = name.endswith("weight") and "norm" not in name
        assert decay == (0.05 if plain else 0.0), name


def test_the_decode_head_has_its_factor_and_the_rest_the_run_s_rate(
    small_model: SegFormer,
) -> None:
    scales = by_name(small_model, parameter_groups(small_model, 0.01, 10.0), "lr_scale")
    assert all(
        scale == (10.0 if name.startswith("decode_head.") else 1.0)
        for name, scale in scales.items()
    )
    assert set(
        by_name(small_model, parameter_groups(small_model, 0.01), "lr_scale").values()
    ) == {1.0}


def test_a_shared_parameter_is_trained_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.01)) == 3


def test_a_rate_for_the_head_needs_one() -> None:
    assert len(parameter_groups(nn.Linear(2, 2), 0.01)) == 2  # without it any module will do
    with pytest.raises(
        ValueError,
        match="`head_lr` needs a submodule `decode_head`, which Linear lacks; set it to 1",
    ):
        parameter_groups(nn.Linear(2, 2), 0.01, head_lr=10.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_of_each_group_is_its_scale_times_as_long(name: OptimizerName) -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decode_head": nn.Linear(2, 2)}).double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make_optimizer(name, parameter_groups(model, 0.0, 10.0), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    steps = [
        (old - new.detach()).unique()
        for old, new in zip(before, model.parameters(), strict=True)
    ]
    expected = [0.01, 0.01, 0.1, 0.1]
    assert [float(step.mean()) for step in steps] == pytest.approx(expected)
    for group in optimizer.param_groups:  # as the loop sets it
        assert group["lr"] == pytest.approx(0.01 * group["lr_scale"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_is_the_share_of_the_last_gradients_that_is_kept(name: OptimizerName) -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    group = {"params": [weight], "weight_decay": 0.0, "lr_scale": 1.0}
    optimizer = make_optimizer(name, [group], lr=1.0, momentum=0.5)
    for gradient in (1.0, 0.0):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    state = optimizer.state[weight]
    kept = state["momentum_buffer"] if name == "sgd" else state["exp_avg"] / (1 - 0.5)
    assert float(kept) == pytest.approx(0.5)
