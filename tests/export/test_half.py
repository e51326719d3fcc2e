"""fp16 of networks whose activations pass fp16's range: wrong where all is halved, right where those stay float32."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import fx, nn

from segprune.export import export, open_exported
from segprune.export.half import halve
from segprune.export.network import Deployed
from segprune.model import Attention, SegFormer
from tests.exporting import tiny_network

SIZE = (64, 96)
WHERE = "encoder.stages.1.blocks.0.attn"


def attention_of(network: nn.Module) -> Attention:
    attention = network.get_submodule(WHERE)
    assert isinstance(attention, Attention)
    return attention


@pytest.fixture(scope="module")
def overflowing() -> SegFormer:
    """Values of 1e6 and more in one attention, which its projection takes back: the same logits in float32."""
    network = tiny_network()
    attention = attention_of(network)
    with torch.no_grad():
        attention.v.weight.mul_(1e6)
        attention.v.bias.mul_(1e6)
        attention.proj.weight.div_(1e6)
    return network


@pytest.fixture(scope="module")
def half(overflowing: SegFormer) -> tuple[fx.GraphModule, tuple[str, ...]]:
    return halve_on(overflowing, images())


def halve_on(network: SegFormer, x: torch.Tensor) -> tuple[fx.GraphModule, tuple[str, ...]]:
    return halve(torch.export.export(Deployed(network), (x,)), [x])


def images() -> torch.Tensor:
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def distance(network: SegFormer, logits: torch.Tensor, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected = network(x)
    return float((logits - expected).abs().max() / expected.abs().max())


def test_what_overflows_computes_in_float32_and_all_else_in_half(
    overflowing: SegFormer, half: tuple[fx.GraphModule, tuple[str, ...]]
) -> None:
    graph, names = half
    x = images()
    assert set(names) == {f"{WHERE}.v", WHERE, f"{WHERE}.proj"}
    assert distance(overflowing, graph(x), x) < 1e-2
    assert next(overflowing.parameters()).dtype == torch.float32

    types = {name: weight.dtype for name, weight in graph.named_parameters()}
    full = {name for name, dtype in types.items() if dtype == torch.float32}
    expected = {f"network.{WHERE}.{name}" for name in ("v.weight", "v.bias", "proj.weight")}
    assert full == expected | {f"network.{WHERE}.proj.bias"}

    # All of it in half gives other logits, so keeping these in float32 is what helps.
    with torch.no_grad():
        wrong = Deployed(overflowing).network.half()(x.half()).float()
    assert not distance(overflowing, wrong, x) < 1e-2


def test_products_inside_attention_count_as_well() -> None:
    network, x = tiny_network(), images()
    with torch.no_grad():
        for product in (attention_of(network).q, attention_of(network).k):
            product.weight.mul_(1e3)
    graph, names = halve_on(network, x)
    assert names == (WHERE,)
    assert all(weight.dtype == torch.float16 for weight in graph.parameters())


def test_an_onnx_file_names_what_stays_float32(overflowing: SegFormer, tmp_path: Path) -> None:
    path, x = tmp_path / "it.onnx", images()
    manifest, difference = export(overflowing, path, size=SIZE, precision="fp16")
    assert set(manifest.float32) == {f"{WHERE}.v", WHERE, f"{WHERE}.proj"}
    assert difference.relative is not None
    assert difference.relative < 1e-2

    runtime = open_exported(path)
    assert runtime.manifest == manifest
    assert distance(overflowing, runtime(x), x) < 1e-2
    weights = [tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) > 1]
    full = [tensor for tensor in weights if tensor.data_type == onnx.TensorProto.FLOAT]
    assert len(full) == 2
    assert len(weights) > 2 * len(full)


def test_openvino_is_told_to_leave_them_in_float32(
    overflowing: SegFormer, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    path, x = tmp_path / "it.xml", images()
    export(overflowing, path, size=SIZE, format="openvino", precision="fp16")
    assert distance(overflowing, open_exported(path)(x), x) < 1e-2

    products = []
    for layer in openvino.Core().read_model(path).get_ordered_ops():
        if layer.get_type_name() == "MatMul":
            full = layer.get_output_element_type(0) == openvino.Type.f32
            assert full == ("DisablePrecisionConversion_0" in layer.get_rt_info())
            products.append(full)
    assert sum(products) == 2
    assert len(products) > 2 * sum(products)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
def test_on_a_gpu_the_logits_are_right_as_well(
    overflowing: SegFormer, half: tuple[fx.GraphModule, tuple[str, ...]]
) -> None:
    x = images()
    with torch.no_grad():
        logits = half[0].cuda()(x.cuda()).cpu()
    assert distance(overflowing, logits, x) < 1e-2
