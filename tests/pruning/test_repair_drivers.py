"""The repair on another machine's linear algebra: a GPU's drivers differ from the CPU's, and no test here has one.

CUDA has one driver for least squares, `gels`, which needs full rank; its decompositions fail where a number is not
finite, and choose other signs. `another_driver` does the same to the CPU's.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import segprune
from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.curves import measure_curves
from segprune.pruning.depth import branch_scores
from segprune.pruning.groups import Group, find_groups
from segprune.pruning.importance import METHODS, score_channels
from segprune.pruning.plan import Plan, keep_best
from segprune.pruning.repair import repair
from segprune.pruning.synthetic import synthetic_images
from segprune.timing import tf32_products
from tests.pruning.cutting import STEM, cut_copy

HEADS = ("folded", "mlp", "conv")


@contextmanager
def another_driver() -> Iterator[list[str]]:
    """Yields the names of the decompositions that were taken, in order."""
    taken: list[str] = []
    lstsq, eigh, svd = torch.linalg.lstsq, torch.linalg.eigh, torch.linalg.svd

    def random_signs(vectors: Tensor) -> Tensor:
        return (torch.randint(2, (*vectors.shape[:-2], 1, vectors.shape[-1])) * 2 - 1).to(
            vectors
        )

    def refuse_what_is_not_finite(name: str, matrix: Tensor) -> None:
        taken.append(name)
        if not matrix.isfinite().all():
            raise torch.linalg.LinAlgError(f"linalg.{name}: the algorithm failed to converge")

    def driver_lstsq(a: Tensor, b: Tensor) -> object:
        taken.append("lstsq")
        return lstsq(a, b, driver="gels")

    def driver_eigh(matrix: Tensor) -> object:
        refuse_what_is_not_finite("eigh", matrix)
        values, vectors = eigh(matrix)
        return torch.return_types.linalg_eigh((values, vectors * random_signs(vectors)))

    def driver_svd(matrix: Tensor) -> object:
        refuse_what_is_not_finite("svd", matrix)
        u, s, vh = svd(matrix)
        signs = random_signs(u)
        return torch.return_types.linalg_svd((u * signs, s, signs.mT * vh))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "lstsq", driver_lstsq)
        patch.setattr(torch.linalg, "eigh", driver_eigh)
        patch.setattr(torch.linalg, "svd", driver_svd)
        yield taken


@pytest.fixture
def dense_of(small_model: SegFormer, conv_model: SegFormer) -> Callable[[str], SegFormer]:
    """The small network with each kind of head: folded, as published (keep_decoder), mmsegmentation's."""
    return {
        "mlp": small_model,
        "folded": fold_decoder(small_model),
        "conv": conv_model,
    }.__getitem__


@torch.no_grad()
def error(model: nn.Module, other: nn.Module, batches: list[Tensor]) -> float:
    """Relative, of the logits."""
    wrong = sum(float((model(x) - other(x)).square().sum()) for x in batches)
    return (wrong / sum(float(other(x).square().sum()) for x in batches)) ** 0.5


Case = tuple[SegFormer, SegFormer, list[Group], Plan]


def cut_to_two_thirds(dense: SegFormer, method: str, batches: list[Tensor]) -> Case:
    """The network, what was cut of it, and how: the channels that the method ranks highest are kept."""
    groups = list(find_groups(dense, batches[0][:1], {STEM}).groups)
    ranks = score_channels(dense, groups, method, batches)
    plan = keep_best(
        groups, ranks, np.array([max(1, 2 * group.slots // 3) for group in groups])
    )
    return cut_copy(dense, groups, plan), dense, groups, plan


def assert_same(network: SegFormer, other: SegFormer) -> None:
    state = other.state_dict()
    for name, tensor in network.state_dict().items():
        scale = float(tensor.double().abs().max())
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(
    ("method", "head"), list(zip(METHODS, cycle(HEADS), strict=False))
)  # every method, and every kind of head several times
def test_the_repair_gives_the_same_network_with_another_driver(
    dense_of: Callable[[str], SegFormer], method: str, head: str
) -> None:
    batches = list(torch.randn(3, 3, 64, 64).double().split(2))
    pruned, dense, groups, plan = cut_to_two_thirds(dense_of(head), method, batches)

    usual = repair(pruned, dense, groups, plan, batches)
    with another_driver() as taken:
        other = repair(pruned, dense, groups, plan, batches)

    assert {"eigh", "svd"} <= set(taken)
    before, after, between = (
        error(*pair, batches) for pair in ((pruned, dense), (usual, dense), (other, usual))
    )
    assert after < before
    assert between < 1e-8
    assert_same(other, usual)


@pytest.mark.parametrize("head", HEADS)
def test_rounding_does_not_choose_where_few_images_leave_directions_open(
    dense_of: Callable[[str], SegFormer], head: str
) -> None:
    """Reductions here have fewer tokens than channels. The images get what another device would round otherwise."""
    batches = list(torch.randn(3, 3, 64, 64).double().split(2))
    pruned, dense, groups, plan = cut_to_two_thirds(dense_of(head), "l1", batches)

    usual = repair(pruned, dense, groups, plan, batches)
    rounded = [x * (1.0 + 1e-14 * torch.randn_like(x)) for x in batches]
    other = repair(pruned, dense, groups, plan, rounded)

    assert_same(other, usual)
    unseen = error(other, usual, [torch.randn(2, 3, 64, 64).double()])
    assert unseen < 1e-8


def test_a_gpu_may_not_round_the_factors_of_products_while_scores_are_taken_and_layers_solved(
    small_model: SegFormer,
) -> None:
    """Whatever is set, as by a training run in TF32 before; afterwards it is set again."""
    seen = set()

    def note(module: nn.Module, inputs: object, output: object) -> None:
        seen.add(switches())

    def switches() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    batches = [torch.randn(1, 3, 64, 64).double()]
    hook = small_model.encoder.stages[0].patch_embed.proj.register_forward_hook(note)
    with tf32_products(True):
        pruned, dense, groups, plan = cut_to_two_thirds(small_model, "wanda", batches)
        seen.clear()  # tracing the groups ran the network, too
        score_channels(dense, groups, "wanda", batches)
        repair(pruned, dense, groups, plan, batches)
        branch_scores(dense, batches)
        measure_curves(dense, groups, batches, [(group.slots,) for group in groups])
        synthetic_images(dense, (32, 32), count=1)
        assert switches() == (True, True)

    hook.remove()
    assert seen == {(False, False)}


def test_least_squares_that_need_full_rank_are_nowhere_in_the_package() -> None:
    """`lstsq` and `solve` fail, or give numbers without meaning, where a matrix lacks rank: on CUDA, and not here."""
    refused = {"lstsq", "solve", "inv", "lu_solve"}
    for path in Path(segprune.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        linalg = [
            call
            for call in calls
            if isinstance(call, ast.Attribute) and "torch" in ast.unparse(call.value)
        ]
        used = {call.attr for call in linalg} & refused
        assert not used, f"{path}: {used}; take pinv, or cholesky of a damped matrix"
