"""ONNX of any batch and size, whose tracing with symbols takes longer than all fixed sizes together."""

from pathlib import Path

import onnx
import torch

from segmenter import open_segmenter
from segprune.data import draw_shapes, normalise
from segprune.export import export, open_exported
from segprune.inference.label_maps import EvalMode, Network, label_maps, prepare
from tests.exporting import tiny_network


def test_onnx_of_any_size_takes_any_and_names_its_free_sides(tmp_path: Path) -> None:
    network, path = tiny_network(), tmp_path / "any.onnx"
    manifest, difference = export(network, path, dynamic=True, preprocess=True, size=(64, 96))
    assert manifest.shape is None
    dims = [
        dim.dim_param or dim.dim_value
        for dim in onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    ]
    assert dims == ["batch", "height", "width", 3]
    assert difference.num_images == 6  # two of the size, one odd, a batch of three
    runtime = open_exported(path)
    for number, size in ((1, (65, 99)), (3, (128, 64))):
        x = torch.stack(
            [normalise(draw_shapes(9, "train", index, size)[0]) for index in range(number)]
        )
        with torch.no_grad():
            torch.testing.assert_close(runtime(x), network(x), rtol=1e-4, atol=1e-4)
    segmenter = open_segmenter(str(path), (128, 160), threads=1)  # of examples/serve
    picture, how = draw_shapes(9, "train", 0, (90, 130))[0], EvalMode(input_shape=(128, 160))
    with torch.no_grad():
        (expected,) = label_maps(Network(network, 5, "cpu", 1), [prepare(picture, how)], how)
    assert (segmenter(picture) == expected.numpy()).mean() >= 0.999
