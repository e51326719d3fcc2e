"""What can be known of the builder without TensorRT: shapes, messages, and in which order it asks a stand-in."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnxruntime
import pytest
import torch

from examples import build_tensorrt_engine as builder
from examples.build_tensorrt_engine import LARGEST, SMALLEST, USUAL, Model, ranges
from segprune.export.manifest import MIN_DYNAMIC, Manifest
from segprune.export.tensorrt import command_line
from tests.examples.drawn import WEIGHT, drawn

ANY = Model(Path("any.onnx"), "fp32", None, preprocess=False, argmax=False)
FIXED = Model(Path("it.onnx"), "fp32", (2, 64, 96), preprocess=True, argmax=True)
NONE = (None, None, None)


def test_a_file_says_itself_what_it_takes(tmp_path: Path) -> None:
    assert builder.read(Path(drawn(tmp_path / "any.onnx"))) == Model(tmp_path / "any.onnx", "fp32", None, False, False)
    baked = builder.read(Path(drawn(tmp_path / "baked.onnx", baked=True)))
    assert (baked.shape, baked.source, baked.result) == ((2, 64, 96), "pixels", "classes")
    assert (baked.full((2, 64, 96)), ANY.full((2, 64, 96))) == ((2, 64, 96, 3), (2, 3, 64, 96))


@pytest.mark.parametrize("preprocess", [False, True])
def test_the_ranges_are_those_that_trtexec_gets_from_segprune_export(preprocess: bool) -> None:
    manifest = Manifest("b0", 5, "onnx", "fp32", None, preprocess=preprocess, argmax=False)
    model = Model(Path("c.onnx"), "fp32", None, preprocess, False)
    shapes = re.findall(r"Shapes=(\w+):([\dx]+)", command_line(Path("c.onnx"), manifest))
    sizes = map(model.full, ranges(model, NONE))
    assert shapes == [(model.source, "x".join(map(str, size))) for size in sizes]
    assert SMALLEST[1] == MIN_DYNAMIC


def test_ranges_follow_what_is_asked_for_and_a_fixed_size_is_its_own() -> None:
    assert ranges(ANY, NONE) == (SMALLEST, USUAL, LARGEST)
    assert ranges(ANY, (None, (16, 1024, 4096), None)) == (SMALLEST, (16, 1024, 4096), (16, 2048, 4096))
    assert ranges(ANY, ((1, 100, 100), (1, 100, 200), (2, 300, 300))) == ((1, 100, 100), (1, 100, 200), (2, 300, 300))
    assert ranges(FIXED, NONE) == ((2, 64, 96),) * 3


@pytest.mark.parametrize(
    ("model", "asked", "message"),
    [
        (FIXED, (None, USUAL, None), r"^it\.onnx takes 2×64×96 alone; leave out --smallest, --usual and --largest\.$"),
        (ANY, ((1, 32, 64), None, None), r"^--smallest is 1 32 64; a batch of 1 and sides of 64 are the least\.$"),
        (ANY, ((0, 64, 64), None, None), r"^--smallest is 0 64 64; a batch of 1 and sides of 64 are the least\.$"),
        (
            ANY,
            (None, None, (1, 256, 256)),
            r"^The sizes 1 64 64, 1 512 512 and 1 256 256 do not grow; give batch, height and width from --smallest",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(model: Model, asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranges(model, asked)


def test_what_is_compared_is_the_files_own_output_and_differences_are_seen(tmp_path: Path) -> None:
    model = builder.read(Path(drawn(tmp_path / "any.onnx")))
    x = builder.example(model, (2, 65, 99))
    assert (x.shape, x.dtype) == ((2, 3, 65, 99), np.float32)
    logits = builder.run_file(onnxruntime, model, x)
    expected = torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(WEIGHT)).numpy()
    assert builder.difference(model, logits, expected)[0] < 1e-6
    half = builder.difference(model, logits, logits * 1.01)
    assert half == (pytest.approx(0.01, rel=1e-3), 1.0)
    assert (
        builder.verdict(model, *half) == "logits differ by 1.0e-02 of the largest, equal class on 100.000 % of pixels"
    )
    for worse in (logits * 1.05, logits[:, ::-1], logits * np.float32("nan")):
        with pytest.raises(
            ValueError, match=r"^The engine is too far from the file \(.*\) and was not kept; give --no"
        ):
            builder.verdict(model, *builder.difference(model, logits, worse))
    assert builder.example(FIXED, (2, 64, 96)).dtype == np.uint8
    classes = logits.argmax(1).astype(np.uint8)
    assert builder.verdict(FIXED, *builder.difference(FIXED, classes, classes)) == "equal class on 100.000 % of pixels"


@pytest.fixture
def trt() -> MagicMock:
    """Stands in for TensorRT, which answers that all went well."""
    module = MagicMock(__version__="10.0")
    module.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
    config = module.Builder.return_value.create_builder_config.return_value
    config.get_timing_cache.return_value.serialize.return_value = b"timed"
    module.Builder.return_value.build_serialized_network.return_value = b"plan"
    return module


def test_an_engine_of_any_size_is_strongly_typed_and_gets_its_ranges(trt: MagicMock) -> None:
    made, config = trt.Builder.return_value, trt.Builder.return_value.create_builder_config.return_value
    profile = made.create_optimization_profile.return_value
    assert builder.build(trt, ANY, ranges(ANY, NONE), None) == b"plan"
    made.create_network.assert_called_once_with(2)
    trt.OnnxParser.return_value.parse_from_file.assert_called_once_with("any.onnx")
    profile.set_shape.assert_called_once_with("images", (1, 3, 64, 64), (1, 3, 512, 512), (8, 3, 2048, 2048))
    config.add_optimization_profile.assert_called_once_with(profile)
    config.clear_flag.assert_not_called()
    builder.build(trt, FIXED, ranges(FIXED, NONE), None, tf32=False)
    profile.set_shape.assert_called_once()
    config.clear_flag.assert_called_once_with(trt.BuilderFlag.TF32)


def test_timings_are_kept_and_those_of_another_gpu_begun_anew(
    trt: MagicMock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, timings = trt.Builder.return_value.create_builder_config.return_value, tmp_path / "timings"
    builder.build(trt, FIXED, ranges(FIXED, NONE), timings)
    assert timings.read_bytes() == b"timed"
    config.set_timing_cache.return_value = False
    builder.build(trt, FIXED, ranges(FIXED, NONE), timings)
    assert [call.args[0] for call in config.create_timing_cache.call_args_list] == [b"", b"timed", b""]
    assert capsys.readouterr().out == f"{timings} is of another GPU or TensorRT and was begun anew.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["timings"]


def test_what_tensorrt_refuses_is_said_in_one_sentence(trt: MagicMock) -> None:
    sizes = ranges(FIXED, NONE)
    trt.Builder.return_value.build_serialized_network.return_value = None
    with pytest.raises(ValueError, match=r"^TensorRT built no engine, its messages above say why; give smaller sizes"):
        builder.build(trt, FIXED, sizes, None)
    parser = trt.OnnxParser.return_value
    parser.parse_from_file.return_value, parser.num_errors = False, 1
    parser.get_error.return_value.desc.return_value = "no importer for Odd"
    with pytest.raises(
        ValueError, match=r"^TensorRT cannot read it\.onnx \(no importer for Odd\); try a newer TensorRT,"
    ):
        builder.build(trt, FIXED, sizes, None)
    trt.Builder.side_effect = TypeError("pybind11::init(): factory function returned nullptr")
    with pytest.raises(
        ValueError, match=r"^TensorRT found no GPU that it can use; build on the machine that the engine"
    ):
        builder.build(trt, FIXED, sizes, None)
    trt.Runtime.return_value.deserialize_cuda_engine.return_value = None
    with pytest.raises(ValueError, match=r"^TensorRT does not take back the engine that it built; its messages above"):
        builder.run_engine(trt, torch, FIXED, b"plan", np.zeros((2, 64, 96, 3), np.uint8))


def ended(monkeypatch: pytest.MonkeyPatch, *flags: object) -> str:
    monkeypatch.setattr(sys, "argv", ["build_tensorrt_engine.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        builder.main()
    return str(stopped.value)


def test_mistakes_and_missing_packages_end_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawn(tmp_path / "int8.onnx", precision="int8")
    model = drawn(tmp_path / "it.onnx")
    Path("text.onnx").write_text("hello")
    wrote = "give an .onnx file that segprune export wrote."
    assert ended(monkeypatch, "no.onnx") == f"Error: no.onnx does not exist; {wrote}"
    assert ended(monkeypatch, "text.onnx") == (
        "Error: text.onnx is no .onnx file that segprune export wrote; export it again."
    )
    assert ended(monkeypatch, "int8.onnx") == (
        "Error: int8.onnx has int8's scales of ONNX Runtime, which TensorRT does not take; export it as fp16."
    )
    assert ended(monkeypatch, model, "--output", "no/it.engine") == (
        "Error: no is no folder; give a path in one as --output."
    )
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert ended(monkeypatch, model) == (
        "Error: Building an engine needs tensorrt, which cannot be imported here; pip install tensorrt."
    )
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert ended(monkeypatch, model) == (
        "Error: Reading the file needs onnx, which cannot be imported here; pip install onnx."
    )


def test_an_engine_is_written_beside_the_file_and_says_that_it_was_not_compared(
    trt: MagicMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = drawn(tmp_path / "it.onnx")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["build_tensorrt_engine.py", model])
    builder.main()
    assert (tmp_path / "it.engine").read_bytes() == b"plan"
    assert capsys.readouterr().out == (
        "Not compared with the file: PyTorch sees no GPU.\n"
        f"Saved: {tmp_path}/it.engine, 0.0 MB, for this kind of GPU and TensorRT 10.0.\n"
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    builder.main()
    assert capsys.readouterr().out.startswith("Not compared with the file: onnxruntime is not installed.\n")


def test_an_engine_that_is_far_from_its_file_is_not_kept(
    trt: MagicMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = drawn(tmp_path / "it.onnx")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        builder, "run_engine", lambda trt, torch, model, plan, x: np.zeros((1, 5, 512, 512), np.float32)
    )
    assert ended(monkeypatch, model).startswith(
        "Error: The engine is too far from the file (logits differ by 1.0e+00 of"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["it.onnx"]
