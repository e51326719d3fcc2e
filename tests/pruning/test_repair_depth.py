import copy

import pytest
import torch
from torch import Tensor

from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.depth import remove
from segprune.pruning.repair import repair_depth

STAGE = "encoder.stages.{}.blocks.{}"
NAMES = {
    "first of a stage": [STAGE.format(0, 0) + ".attn"],
    "last of a stage": [STAGE.format(0, 1) + ".mlp"],
    "block at the start": [STAGE.format(2, 0)],
    "block at the end": [STAGE.format(2, 1)],
    "several": [STAGE.format(0, 1), STAGE.format(1, 0) + ".attn", STAGE.format(2, 0) + ".mlp"],
}


@pytest.fixture
def dense(small_model: SegFormer) -> SegFormer:
    return fold_decoder(small_model)


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(24, 3, 64, 64).double(), torch.randn(8, 3, 64, 96).double()]


@torch.no_grad()
def error(model: SegFormer, dense: SegFormer, batches: list[Tensor]) -> float:
    return sum(float((model(x) - dense(x)).square().sum()) for x in batches) ** 0.5


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_logits_come_nearer_than_with_the_mean_alone(dense: SegFormer, batches: list[Tensor], names: list[str]) -> None:
    before = copy.deepcopy(dense.state_dict())
    bare, repaired = remove(dense, names, batches), repair_depth(dense, names, batches)
    assert repaired.spec == bare.spec
    assert [name for name, _ in repaired.named_modules()] == [name for name, _ in bare.named_modules()]
    assert error(repaired, dense, batches) < 0.8 * error(bare, dense, batches)
    others = [torch.randn(4, 3, 64, 64).double()]
    assert error(repaired, dense, others) < error(bare, dense, others)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_where_no_branch_goes_nothing_changes(dense: SegFormer, batches: list[Tensor]) -> None:
    repaired = repair_depth(dense, [], batches)
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(repaired.state_dict()[name], tensor, rtol=1e-8, atol=1e-8)


def test_what_a_remaining_branch_can_say_as_well_is_taken_over_exactly(dense: SegFormer, batches: list[Tensor]) -> None:
    """The second FFN says a linear combination of what the attention before it says, so that one can say both."""
    attention = dense.encoder.stages[2].blocks[1].attn
    mlp = dense.encoder.stages[2].blocks[1].mlp
    mix, bias = torch.randn(40, 40).double() / 6, torch.randn(40).double()
    said: dict[torch.Size, Tensor] = {}
    attention.register_forward_hook(lambda module, inputs, output: said.update({output.shape: output}))
    mlp.register_forward_hook(lambda module, inputs, output: said[output.shape] @ mix.T + bias)
    name = STAGE.format(2, 1) + ".mlp"
    repaired = repair_depth(dense, [name], batches, damping=1e-12)
    x = batches[0]
    wanted = dense(x)
    assert (repaired(x) - wanted).abs().max() < 1e-6


def test_progress_counts_the_blocks_of_the_dense_network_and_the_head(dense: SegFormer, batches: list[Tensor]) -> None:
    seen: list[tuple[int, int]] = []
    repair_depth(dense, NAMES["several"], batches, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 7) for i in range(1, 8)]


def test_what_cannot_be_removed_or_repaired_is_refused(dense: SegFormer, batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="Stage 4 would lose its last block"):
        repair_depth(dense, [STAGE.format(3, 0)], batches)
    with pytest.raises(ValueError, match="damping is 0; it must be above 0"):
        repair_depth(dense, [STAGE.format(2, 0)], batches, damping=0.0)
    with pytest.raises(ValueError, match="Repair needs images, and there are none"):
        repair_depth(dense, [STAGE.format(2, 0)], [])
