from pathlib import Path

from segprune.export.manifest import Manifest
from segprune.export.tensorrt import command_line


def test_a_fixed_size_needs_no_more_than_the_file() -> None:
    manifest = Manifest("b0", 5, "onnx", "fp32", (1, 64, 64), preprocess=False, argmax=False)
    assert (
        command_line(Path("a b/c.onnx"), manifest)
        == "trtexec '--onnx=a b/c.onnx' '--saveEngine=a b/c.engine'"
    )


def test_any_size_gets_a_range_and_half_precision_follows_the_file() -> None:
    manifest = Manifest("b0", 5, "onnx", "fp16", None, preprocess=False, argmax=False)
    assert command_line(Path("c.onnx"), manifest) == (
        "trtexec --onnx=c.onnx --saveEngine=c.engine --stronglyTyped --minShapes=images:1x3x64x64 "
        "--optShapes=images:1x3x512x512 --maxShapes=images:8x3x2048x2048"
    )


def test_pixels_lie_as_the_file_takes_them() -> None:
    manifest = Manifest("b0", 5, "onnx", "fp32", None, preprocess=True, argmax=False)
    assert "--optShapes=pixels:1x512x512x3" in command_line(Path("c.onnx"), manifest)
