"""The penalty of training towards a plan: on what goes, all of it, and on nothing else."""

from __future__ import annotations

import pytest
import torch

from segprune.model import SegFormer
from segprune.pruning.pruner import Pruner
from segprune.pruning.sparsity import group_lasso
from segprune.pruning.surgery import cut, removed_positions


@pytest.fixture
def planned(small_model: SegFormer):
    pruner = Pruner(small_model, 0.5, round_to=1)
    prepared = pruner.prepare()
    plan, groups = pruner.decide()
    return prepared.model, groups, plan


def test_only_what_goes_is_pulled(planned) -> None:
    model, groups, plan = planned
    group_lasso(groups, plan)(model).backward()
    gone = removed_positions(groups, plan)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        pulled = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for side, dim in (("out", 0), ("in", 1)):
            lost = sorted(gone.get((name, side), ()))
            if lost:
                assert (pulled.index_select(dim, torch.tensor(lost)).abs().amax() > 0) or not weight.any()
        touched = torch.zeros_like(weight, dtype=torch.bool)
        touched[sorted(gone.get((name, "out"), ()))] = True
        if weight.dim() > 1:
            touched[:, sorted(gone.get((name, "in"), ()))] = True
        assert not pulled[~touched].any(), name


def test_it_is_the_sum_of_the_channels_norms(planned) -> None:
    model, groups, plan = planned
    (group,) = [g for g in groups if g.name.endswith("stages.2.blocks.0.mlp.ffn")]
    mlp = model.encoder.stages[2].blocks[0].mlp
    gone = sorted(set(range(group.num_channels)) - set(plan.keep[group.name]))
    assert gone
    expected = sum(
        torch.cat([mlp.fc1.weight[c], mlp.dwconv.weight[c].flatten(), mlp.fc2.weight[:, c]]).norm() for c in gone
    )
    assert group_lasso([group], plan)(model).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_network_trained_down_to_no_penalty_loses_nothing_when_cut(planned) -> None:
    model, groups, plan = planned
    with torch.no_grad():
        for (name, side), lost in removed_positions(groups, plan).items():
            module = model.get_submodule(name)
            index = sorted(lost)
            if side == "out":
                module.weight[index] = 0
                if module.bias is not None:
                    module.bias[index] = 0
            elif module.weight.dim() > 1:
                module.weight[:, index] = 0
    assert group_lasso(groups, plan)(model).item() < 1e-3
    ffns = [group for group in groups if group.kind == "ffn"]
    x = torch.randn(1, 3, 64, 64).double()
    before = model.eval()(x)
    cut(model, ffns, plan)
    assert torch.allclose(model(x), before, atol=1e-10)
