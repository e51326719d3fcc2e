"""What makes a network fast on a GPU changes no logits: the layout of what is upsampled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from segprune.fold import fold_decoder
from segprune.model import SegFormer

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda")


@pytest.mark.parametrize("head", ["folded", "mlp", "conv"])
@torch.no_grad()
def test_logits_do_not_depend_on_the_layout_of_what_is_upsampled(
    small_model: SegFormer, conv_model: SegFormer, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, so that another order of sums hardly shows."""
    networks = {"mlp": small_model, "folded": fold_decoder(small_model), "conv": conv_model}
    network, x = networks[head], torch.randn(2, 3, 64, 96).double()
    on_cpu = network(x)
    on_gpu = network.to(GPU)(x.to(GPU))
    assert on_gpu.is_contiguous()
    torch.testing.assert_close(on_gpu.cpu(), on_cpu)

    def leave(maps: Tensor) -> Tensor:
        return maps

    monkeypatch.setattr("segprune.model.to_upsample", leave)
    torch.testing.assert_close(network(x.to(GPU)), on_gpu)
