"""int8 that holds: the layers that cost most are ranked, found again in the file, and left in float32."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from segprune.data import draw_shapes
from segprune.export import LayerCost, Limits, export, open_exported
from segprune.export.int8 import find_fewest, find_kept, rank_layers
from segprune.export.job import Job
from segprune.export.manifest import Manifest
from segprune.export.network import Deployed
from segprune.export.openvino import find_products
from segprune.model import SegFormer
from tests.exporting import tiny_network

SIZE = (64, 96)
WORST = "encoder.stages.2.blocks.0.mlp.fc1"
MANIFEST = Manifest("b0", 5, "onnx", "int8", (1, *SIZE), preprocess=False, argmax=False)


def calibration_images(number: int) -> list[Any]:
    return [draw_shapes(8, "train", index, SIZE)[0] for index in range(number)]


@pytest.fixture(scope="module")
def uneven() -> SegFormer:
    """One layer whose weights, large and small in every channel, cannot be held in 7 bits."""
    network = tiny_network()
    weight = network.get_submodule(WORST).weight
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad():
        # The huge column reads a channel that is always zero.
        weight[:, 0] = 1e4
        norm = network.get_submodule("encoder.stages.2.blocks.0.norm2")
        norm.weight[0] = norm.bias[0] = 0.0  # type: ignore[operator,index]
    return network


@pytest.fixture(scope="module")
def job(uneven: SegFormer) -> Job:
    manifest = replace(MANIFEST, spec=uneven.spec)
    return Job(Deployed(uneven), manifest, SIZE, calibration_images(2))


def test_the_layer_that_quantising_hurts_most_comes_first(job: Job, uneven: SegFormer) -> None:
    before = {name: weight.clone() for name, weight in uneven.state_dict().items()}
    costs = rank_layers(job)
    assert costs[0].name == WORST
    assert costs[0].distance > 3 * costs[1].distance > 0
    assert [cost.distance for cost in costs] == sorted(
        (cost.distance for cost in costs), reverse=True
    )
    after = uneven.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())

    # Ranking leaves the network as it was, without a hook.
    assert rank_layers(job) == costs


@pytest.mark.parametrize("least", [1, 2, 7, 12, 13])
def test_the_fewest_that_hold_are_found_in_few_trials(least: int) -> None:
    trials = []

    def holds(number: int) -> bool:
        trials.append(number)
        return number >= least

    assert find_fewest(13, holds) == least
    assert len(trials) <= 5
    assert find_fewest(least - 1, holds) is None


def test_layers_are_found_again_by_their_weights(job: Job) -> None:
    network = job.network.network
    assert isinstance(network, SegFormer)
    weight = network.get_submodule(WORST).weight
    assert isinstance(weight, torch.Tensor)
    products = {
        "same": weight.detach().numpy(),
        "transposed": weight.detach().numpy().T,
        "other": np.zeros_like(weight.detach().numpy()),
    }
    named = replace(job, manifest=replace(MANIFEST, float32=(WORST,)))
    assert find_kept(named, products) == ["same", "transposed"]
    assert find_kept(job, products) == []


def test_an_onnx_file_leaves_the_worst_layer_in_float32(
    uneven: SegFormer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every trial writes a file for seconds; how few are needed has a test of its own.
    monkeypatch.setattr(
        "segprune.export.find_fewest",
        lambda most, holds: next(number for number in range(1, most + 1) if holds(number)),
    )
    ranked: list[LayerCost] = []
    accepted: list[tuple[str, ...]] = []

    # Judged by what the file says of itself, so that one layer is what it takes.
    def accept(runtime: Any) -> bool:
        accepted.append(runtime.manifest.float32)
        return WORST in runtime.manifest.float32

    path = tmp_path / "it.onnx"
    manifest, _ = export(
        uneven,
        path,
        size=SIZE,
        precision="int8",
        images=calibration_images(2),
        limits=Limits(None, 0.0),
        accept=accept,
        on_ranked=ranked.extend,
    )
    assert accepted[0] == ()
    assert manifest.float32 == (WORST,) == (ranked[0].name,)
    assert open_exported(path).manifest == manifest

    # Its weights are there as they are, and all others are integers.
    tensors = onnx.load(path).graph.initializer
    weights = [tensor for tensor in tensors if len(tensor.dims) > 1]
    full = [tensor for tensor in weights if tensor.data_type == onnx.TensorProto.FLOAT]
    assert [sorted(tensor.dims) for tensor in full] == [[40, 96]]
    assert len(weights) == len(ranked)


def test_openvino_has_seven_bits_for_weights_but_of_depthwise_filters(
    uneven: SegFormer, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"format": "openvino", "precision": "int8", "size": SIZE}
    images, limits = calibration_images(2), Limits(None, 0.0)
    path = tmp_path / "it.xml"
    export(uneven, path, images=images, limits=limits, **options)

    weights = []
    for layer in pytest.importorskip("openvino").Core().read_model(path).get_ordered_ops():
        if layer.get_type_name() == "Constant" and layer.data.dtype == np.int8:
            weights.append(layer.data.astype(int))
    largest = [np.abs(weight).max() for weight in weights if weight.ndim < 5]
    assert len(largest) > 20
    assert max(largest) <= 64


def test_every_layer_is_found_in_openvinos_graph(job: Job) -> None:
    openvino = pytest.importorskip("openvino")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates what OpenVINO calls
        model = openvino.convert_model(job.trace())
    model.reshape([1, 3, *SIZE])
    names = tuple(cost.name for cost in rank_layers(job))
    every = replace(job, manifest=replace(MANIFEST, float32=names))
    products = find_products(model)
    assert len(products) == len(names)
    assert find_kept(every, products) == list(products)
