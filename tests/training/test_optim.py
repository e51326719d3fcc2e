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


@pytest.mark.parametrize("head_lr_factor", [1.0, 10.0])
@pytest.mark.parametrize("layer_decay", [0.9, 1.0])
def test_every_parameter_is_there_exactly_once(
    small_model: SegFormer, head_lr_factor: float, layer_decay: float
) -> None:
    next(small_model.encoder.parameters()).requires_grad_(False)  # it may be thawed later
    groups = parameter_groups(small_model, 0.01, head_lr_factor, layer_decay)
    given = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(given) == len(set(given))
    assert set(given) == {id(parameter) for parameter in small_model.parameters()}


def test_weights_decay_but_biases_and_norms_do_not(small_model: SegFormer) -> None:
    decays = by_name(small_model, parameter_groups(small_model, 0.05, 10.0, 0.9), "weight_decay")
    for name, decay in decays.items():
        plain = name.endswith("weight") and "norm" not in name
        assert decay == (0.05 if plain else 0.0), name


def test_the_decode_head_has_its_factor_and_the_rest_the_run_s_rate(small_model: SegFormer) -> None:
    scales = by_name(small_model, parameter_groups(small_model, 0.01, 10.0), "lr_scale")
    assert all(scale == (10.0 if name.startswith("decode_head.") else 1.0) for name, scale in scales.items())
    assert set(by_name(small_model, parameter_groups(small_model, 0.01), "lr_scale").values()) == {1.0}


def test_the_rate_shrinks_with_every_block_away_from_the_head(small_model: SegFormer) -> None:
    """The small network has 2, 1, 2 and 1 blocks."""
    scales = by_name(small_model, parameter_groups(small_model, 0.01, 4.0, layer_decay=0.5), "lr_scale")
    away = {
        "stages.0.patch_embed.proj.weight": 6,
        "stages.0.blocks.0.attn.q.weight": 6,
        "stages.0.blocks.1.mlp.fc1.bias": 5,
        "stages.0.norm.weight": 5,
        "stages.1.patch_embed.norm.bias": 4,
        "stages.1.blocks.0.norm1.weight": 4,
        "stages.1.norm.bias": 4,
        "stages.2.patch_embed.proj.bias": 3,
        "stages.2.blocks.1.attn.proj.weight": 2,
        "stages.2.norm.weight": 2,
        "stages.3.patch_embed.proj.weight": 1,
        "stages.3.blocks.0.attn.v.weight": 1,
        "stages.3.norm.weight": 1,
    }
    assert {name: scales[f"encoder.{name}"] for name in away} == {name: 0.5**n for name, n in away.items()}
    assert {scale for name, scale in scales.items() if name.startswith("decode_head.")} == {4.0}


def test_a_stage_without_blocks_goes_with_the_next_ones_first(small_model: SegFormer) -> None:
    stage = small_model.encoder.stages[1]
    assert isinstance(stage, nn.Module)
    stage.blocks = nn.ModuleList()
    scales = by_name(small_model, parameter_groups(small_model, 0.01, layer_decay=0.5), "lr_scale")
    names = ("stages.1.patch_embed.proj.weight", "stages.1.norm.weight", "stages.2.blocks.0.norm1.weight")
    assert len({scales[f"encoder.{name}"] for name in names}) == 2


def test_a_shared_parameter_is_trained_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.01)) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"head_lr_factor": 10.0}, "head_lr_factor needs a submodule `decode_head`, which Linear lacks; set it to 1"),
        ({"layer_decay": 0.9}, "layer_decay needs a submodule `encoder`, which Linear lacks; set it to 1"),
        ({"head_lr_factor": 0.0}, r"head_lr_factor is 0\.0; it must be above 0, and 1 treats all layers alike\."),
        ({"head_lr_factor": float("nan")}, "head_lr_factor is nan; it must be above 0"),
        ({"layer_decay": 1.5}, r"layer_decay is 1\.5; it must be above 0, and at most 1, which"),
    ],
)
def test_what_a_module_lacks_or_a_factor_cannot_be_is_refused(settings: dict[str, float], said: str) -> None:
    assert len(parameter_groups(nn.Linear(2, 2), 0.01)) == 2  # without factors any module will do
    with pytest.raises(ValueError, match=said):
        parameter_groups(nn.Linear(2, 2), 0.01, **settings)


def test_an_encoder_without_stages_of_blocks_has_no_layers_to_decay_over() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"layer_decay needs `encoder\.stages` with `blocks`, which ModuleDict lacks"):
        parameter_groups(model, 0.01, layer_decay=0.9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_of_each_group_is_its_scale_times_as_long(name: OptimizerName) -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decode_head": nn.Linear(2, 2)}).double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make_optimizer(name, parameter_groups(model, 0.0, 10.0), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    steps = [(old - new.detach()).unique() for old, new in zip(before, model.parameters(), strict=True)]
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


def test_unknown_optimizers_and_momenta_out_of_range_are_refused() -> None:
    groups = parameter_groups(nn.Linear(2, 2), 0.01)
    with pytest.raises(ValueError, match=r"Optimizer 'lion' is unknown; choose one of adamw, sgd\."):
        make_optimizer("lion", groups, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"momentum is 1\.0; it must be from 0 to below 1\."):
        make_optimizer("sgd", groups, lr=0.1, momentum=1.0)
