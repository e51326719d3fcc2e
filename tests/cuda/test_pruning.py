"""Scores, cut and repair on a GPU against the CPU's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.curves import measure_curves
from segprune.pruning.depth import branch_scores, remove
from segprune.pruning.groups import Group, find_groups
from segprune.pruning.importance import METHODS, score_channels
from segprune.pruning.plan import Plan, keep_best
from segprune.pruning.repair import repair
from segprune.spec import standard_spec
from tests.pruning.cutting import STEM, cut_copy

pytestmark = pytest.mark.cuda

GPU = torch.device("cuda")
DenseOf = Callable[[str], SegFormer]


@pytest.fixture
def dense_of(small_model: SegFormer, conv_model: SegFormer) -> DenseOf:
    """The small network in float64 with each kind of head: folded, as published (keep_decoder), mmsegmentation's."""
    return {
        "mlp": small_model,
        "folded": fold_decoder(small_model),
        "conv": conv_model,
    }.__getitem__


def moved(model: SegFormer) -> SegFormer:
    return copy.deepcopy(model).to(GPU)


def images(number: int, size: int = 64) -> list[Tensor]:
    return list(torch.randn(number, 3, size, size).split(2))


@torch.no_grad()
def error(on_gpu: nn.Module, on_cpu: nn.Module, batches: list[Tensor]) -> float:
    """Relative, of the logits."""
    wrong = size = 0.0
    for x in batches:
        expected = on_cpu(x)
        wrong += float((on_gpu(x.to(GPU)).cpu() - expected).square().sum())
        size += float(expected.square().sum())
    return (wrong / size) ** 0.5


def two_thirds(
    dense: SegFormer, method: str, batches: list[Tensor]
) -> tuple[list[Group], Plan]:
    """The groups and the plan that keeps two thirds of each, by the scores of the CPU."""
    groups = list(find_groups(dense, batches[0][:1], {STEM}).groups)
    ranks = score_channels(dense, groups, method, batches)
    return groups, keep_best(
        groups, ranks, np.array([max(1, 2 * group.slots // 3) for group in groups])
    )


@pytest.mark.parametrize("method", METHODS)
def test_channels_have_the_cpus_scores(small_model: SegFormer, method: str) -> None:
    batches = [x.double() for x in images(4)]
    groups = list(find_groups(small_model, batches[0][:1], {STEM}, heads=True).groups)
    on_cpu = score_channels(small_model, groups, method, batches)
    on_gpu = score_channels(moved(small_model), groups, method, [x.to(GPU) for x in batches])

    for name, values in on_cpu.items():
        np.testing.assert_allclose(
            on_gpu[name], values, rtol=1e-4, atol=1e-5, err_msg=name
        )  # their mean is 1


@pytest.mark.parametrize("head", ["folded", "mlp", "conv"])
@pytest.mark.parametrize("method", ["l1", "wanda"])
def test_the_repair_gives_the_cpus_network(dense_of: DenseOf, method: str, head: str) -> None:
    """In float64, where hardly anything is rounded, and with fewer tokens than channels here and there."""
    dense, batches = dense_of(head), [x.double() for x in images(3)]
    groups, plan = two_thirds(dense, method, batches)
    pruned = cut_copy(dense, groups, plan)

    on_cpu = repair(pruned, dense, groups, plan, batches)
    on_gpu = repair(moved(pruned), moved(dense), groups, plan, batches)

    assert error(on_gpu, on_cpu, batches) < 1e-8
    assert error(on_gpu, on_cpu, [x.double() for x in images(2)]) < 1e-6  # never seen
    assert error(on_gpu, dense, batches) < 0.7 * error(moved(pruned), dense, batches)


def test_a_b0_is_repaired_in_float32_as_on_the_cpu(
    trained_like: Callable[[nn.Module], nn.Module],
) -> None:
    model = trained_like(SegFormer(standard_spec("b0", 8)).eval())
    assert isinstance(model, SegFormer)
    dense, batches = fold_decoder(model), images(4, size=128)
    groups, plan = two_thirds(dense, "l1", batches)
    pruned = cut_copy(dense, groups, plan)

    on_cpu = repair(pruned, dense, groups, plan, batches)
    on_gpu = repair(moved(pruned), moved(dense), groups, plan, batches)

    assert error(on_gpu.double(), on_cpu.double(), [x.double() for x in batches]) < 1e-3
    assert error(on_gpu, on_cpu, [x.double() for x in images(2, size=128)]) < 1e-2  # never seen


def test_curves_are_the_cpus(small_model: SegFormer) -> None:
    dense = fold_decoder(small_model)
    groups = find_groups(dense, torch.zeros(1, 3, 64, 64).double(), {STEM}).groups
    widths = [
        (max(1, group.slots // 4), max(1, group.slots // 2), group.slots) for group in groups
    ]
    batches = [x.double() for x in images(4)]

    on_cpu = measure_curves(dense, groups, batches, widths)
    on_gpu = measure_curves(moved(dense), groups, [x.to(GPU) for x in batches], widths)
    for curve, expected in zip(on_gpu, on_cpu, strict=True):
        assert curve.losses == pytest.approx(expected.losses, rel=1e-4)


def test_branches_are_scored_and_removed_as_on_the_cpu(small_model: SegFormer) -> None:
    batches = [x.double() for x in images(2)]
    on_cpu, on_gpu = (
        branch_scores(small_model, batches),
        branch_scores(moved(small_model), batches),
    )
    assert on_gpu == pytest.approx(on_cpu, rel=1e-6)

    least = [min(on_cpu, key=on_cpu.__getitem__)]
    shallower = remove(moved(small_model), least, batches)
    assert error(shallower, remove(small_model, least, batches), batches) < 1e-8
