from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from segprune.model import SegFormer
from segprune.pruning.trace import eval_mode, is_depthwise, run, tensors_in, trace, width_of
from segprune.stats import layers


def test_a_traced_segformer_costs_what_the_formula_says(small_model: SegFormer) -> None:
    seen = trace(small_model, torch.zeros(2, 3, 65, 90).double())
    assert sorted(seen.layers, key=str) == sorted(layers(small_model.spec, (65, 90)), key=str)
    assert seen.unknown_attention == {}


class Convolutions(nn.Module):
    """Every kind of convolution there is, one layer run twice, one called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4)
        self.up = nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1, output_padding=1)
        self.grouped_up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.twice = nn.Conv2d(8, 8, 1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(input=self.grouped(self.depthwise(self.stem(x))))
        x = self.grouped_up(self.twice(self.twice(x)))
        return self.linear(x.permute(0, 2, 3, 1))


def test_macs_of_all_convolutions_equal_those_that_torch_counts() -> None:
    model, x = Convolutions(), torch.zeros(1, 3, 22, 30)
    with FlopCounterMode(display=False) as counter:
        model(x)
    rows = trace(model, x).layers
    assert 2 * sum(row.cost("macs") for row in rows) == counter.get_total_flops()
    once = {row.name: row.cost("params") for row in rows}
    assert sum(once.values()) == sum(p.numel() for p in model.parameters())


def test_costs_are_for_one_sample() -> None:
    model = Convolutions()
    assert (
        trace(model, torch.zeros(3, 3, 22, 30)).layers
        == trace(model, torch.zeros(1, 3, 22, 30)).layers
    )


class Product(nn.Module):
    """Multiplies its input with itself in the given way."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, x) @ self.weight


@pytest.mark.parametrize(
    "product",
    [
        lambda x, y: F.scaled_dot_product_attention(x, y, y),
        lambda x, y: x @ y.mT,
        lambda x, y: x.matmul(y),
        lambda x, y: x.bmm(y),
        lambda x, y: torch.baddbmm(x, x, y),
        lambda x, y: torch.einsum("bnc,bmc->bnm", x, y),
    ],
)
def test_a_product_of_activations_is_attention(
    product: Callable[[Tensor, Tensor], Tensor],
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Product(product))
    assert trace(model, torch.zeros(1, 4, 4)).unknown_attention == {"1": "Product"}


def test_torch_s_own_attention_is_seen() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert trace(layer, torch.zeros(1, 5, 8)).unknown_attention == {
        "self_attn": "MultiheadAttention"
    }


def test_a_product_with_a_parameter_is_not_attention() -> None:
    assert trace(Product(torch.add), torch.zeros(1, 4, 4)).unknown_attention == {}


def test_tracing_leaves_modes_statistics_and_hooks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    trace(model, torch.ones(2, 3, 8, 8))
    assert [module.training for module in model] == [True, False, True]
    assert model[1].num_batches_tracked == 0
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).train()
    with pytest.raises(RuntimeError, match="cannot be multiplied"), eval_mode(model):
        model(torch.zeros(1, 4))
    assert model[0].training


@pytest.mark.parametrize("inputs", [(2.0, 3.0), [2.0, 3.0], {"b": 3.0, "a": 2.0}])
def test_inputs_are_passed_as_they_are_shaped(inputs: Any) -> None:
    class Minus(nn.Module):
        def forward(self, a: float, b: float) -> float:
            return a - b

    assert run(Minus(), inputs) == -1.0


def test_tensors_are_found_in_nested_outputs() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    assert [t.data_ptr() for t in tensors_in({"x": a, "y": [b, (c, None, 3)]})] == [
        t.data_ptr() for t in (a, b, c)
    ]
    assert tensors_in(None) == []


@pytest.mark.parametrize(
    ("layer", "depthwise"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), True),
        (nn.Conv1d(4, 4, 3, groups=4), True),
        (nn.Conv2d(4, 8, 3, groups=4), False),
        (nn.Conv2d(4, 4, 3, groups=2), False),
        (nn.Conv2d(1, 1, 3), False),
        (nn.Linear(4, 4), False),
    ],
)
def test_depthwise_is_one_filter_per_channel(layer: nn.Module, depthwise: bool) -> None:
    assert is_depthwise(layer) == depthwise


@pytest.mark.parametrize(
    ("layer", "widths"),
    [
        (nn.Linear(3, 5), (3, 5)),
        (nn.Conv2d(3, 5, 1), (3, 5)),
        (nn.ConvTranspose2d(3, 5, 1), (3, 5)),
        (nn.LayerNorm(7, elementwise_affine=False), (7, 7)),
        (nn.BatchNorm2d(7, affine=False), (7, 7)),
    ],
)
def test_a_layer_s_width_is_known_without_its_weights(
    layer: nn.Module, widths: tuple[int, int]
) -> None:
    assert (width_of(layer, "in"), width_of(layer, "out")) == widths
