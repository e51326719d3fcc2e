"""Every format really written, opened again and held against PyTorch."""

import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from segprune.benchmark.cases import grid
from segprune.data import draw_shapes, normalise
from segprune.export import FORMATS, Limits, Manifest, export, open_exported
from segprune.export.job import Job
from segprune.export.manifest import MIN_DYNAMIC
from segprune.export.runtimes import Runtime, is_compiled
from segprune.model import SegFormer
from segprune.pruning.coarser import with_factors
from tests.exporting import tiny_network

SIZE = (64, 96)
LEFT = {
    "openvino": ["it.bin", "it.xml"],
    "ncnn": ["it.ncnn.bin", "it.ncnn.json", "it.ncnn.param"],
}
CASES: dict[str, dict[str, Any]] = {
    "onnx": {"format": "onnx"},
    "onnx baked": {"format": "onnx", "preprocess": True, "argmax": True, "batch": 1},
    "onnx fp16": {"format": "onnx", "precision": "fp16"},
    "onnx int8": {"format": "onnx", "precision": "int8"},
    "openvino": {"format": "openvino", "batch": 1},
    "openvino fp16 baked": {
        "format": "openvino",
        "precision": "fp16",
        "preprocess": True,
        "argmax": True,
        "batch": 1,
    },
    "openvino int8": {"format": "openvino", "precision": "int8", "batch": 1},
    "pt2": {"format": "pt2", "preprocess": True, "argmax": True, "batch": 1},
    "torchscript": {"format": "torchscript"},
    "ncnn": {"format": "ncnn", "batch": 1},
    "ncnn fp16": {"format": "ncnn", "batch": 1, "precision": "fp16"},
    "torchscript any size": {"format": "torchscript", "dynamic": True},
}
Case = tuple[str, Path, Manifest, float, Runtime]


@pytest.fixture(scope="module")
def network() -> SegFormer:
    return tiny_network()


@pytest.fixture(scope="module", autouse=True)
def _trace_once() -> Iterator[None]:
    """Files that compute the same share one graph of torch.export, which takes longer to trace than to write."""
    traces: dict[object, torch.export.ExportedProgram] = {}
    trace = Job.trace

    def trace_once(job: Job) -> torch.export.ExportedProgram:
        # Equal manifests come from the one network of this module; the dtype tells what computes in half precision.
        same = replace(job.manifest, format="", precision="fp32", class_names=())
        key = (same.text, next(job.network.parameters()).dtype)
        if key not in traces:
            traces[key] = trace(job)
        return traces[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "trace", trace_once)
        yield


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, network: SegFormer, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    """Name, file, what it says of itself, the share of pixels that agreed, and the file opened."""
    options = {"batch": 2} | CASES[request.param]
    path = tmp_path_factory.mktemp("export") / f"it{FORMATS[options['format']].suffix}"
    if options.get("precision") == "int8":  # random weights stand it worse than trained ones
        options |= {"images": calibration_images(6), "limits": Limits(None, 0.5)}
    manifest, difference = export(
        network, path, size=SIZE, class_names=("sky", "Straße"), **options
    )
    runtime = open_exported(path, trust=True)
    return request.param, path, manifest, difference.agreement, runtime


def calibration_images(number: int) -> list[Any]:
    return [draw_shapes(8, "train", index, SIZE)[0] for index in range(number)]


def images(number: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.stack(
        [normalise(draw_shapes(9, "train", index, size)[0]) for index in range(number)]
    )


def relative(runtime: Runtime, network: SegFormer, x: torch.Tensor) -> float:
    """Largest difference over the largest logit."""
    with torch.no_grad():
        expected = network(x)
    return float((runtime(x) - expected).abs().max() / expected.abs().max())


def test_the_file_gives_the_networks_logits_in_batches_of_any_size(
    case: Case, network: SegFormer
) -> None:
    name, _, manifest, agreement, runtime = case
    x = images(3)  # no multiple of the file's batch
    if manifest.argmax:
        with torch.no_grad():
            same = runtime(x).argmax(1) == network(x).argmax(1)
        assert float(same.float().mean()) > {"fp32": 0.9999, "fp16": 0.995}[manifest.precision]
    else:
        assert (
            relative(runtime, network, x)
            < {"fp32": 1e-5, "fp16": 1e-2, "int8": 1.0}[manifest.precision]
        ), name
    assert agreement > {"fp32": 0.9999, "fp16": 0.995, "int8": 0.5}[manifest.precision]


def test_the_file_itself_says_what_it_takes_and_gives(
    case: Case,
) -> None:
    name, _, manifest, _, runtime = case
    options = CASES[name]
    assert runtime.manifest == manifest
    assert (manifest.format, manifest.num_classes, manifest.variant) == (
        options["format"],
        5,
        "b0",
    )
    assert manifest.shape == (
        None if options.get("dynamic") else (options.get("batch", 2), *SIZE)
    )
    assert manifest.class_names == ("sky", "Straße")


def test_nothing_else_is_left_in_the_folder(case: Case) -> None:
    _, path, manifest, _, _ = case
    assert sorted(os.listdir(path.parent)) == LEFT.get(manifest.format, [path.name])


def test_a_size_that_the_file_does_not_take_is_refused_and_the_right_one_named(
    case: Case, network: SegFormer
) -> None:
    _, _, manifest, _, runtime = case
    if manifest.shape is None:
        assert relative(runtime, network, images(1, (MIN_DYNAMIC + 1, 109))) < 1e-5
        with pytest.raises(
            ValueError,
            match=r"takes images of 64 pixels a side and more, got 60×96; give a larger",
        ):
            runtime(images(1, (60, 96)))
    else:
        with pytest.raises(
            ValueError,
            match=r"takes images of 64×96 alone, got 96×64; give `input_shape` 64 96, or",
        ):
            runtime(images(1, (96, 64)))


@pytest.mark.parametrize(
    "case", [name for name in CASES if name.startswith("onnx")], indirect=True, scope="module"
)
def test_onnx_has_an_opset_from_17_up_and_no_batchnorm_left(
    case: Case,
) -> None:
    _, path, manifest, _, _ = case
    model = onnx.load(path)
    assert [(o.domain, o.version) for o in model.opset_import if o.domain == ""] == [("", 18)]
    kinds = {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in kinds
    assert ("QuantizeLinear" in kinds) == (manifest.precision == "int8")
    names = {True: ("pixels", "classes"), False: ("images", "logits")}[manifest.preprocess]
    assert (model.graph.input[0].name, model.graph.output[0].name) == names
    if manifest.argmax:  # TensorRT makes uint8 of floats alone
        float32, uint8 = model.graph.node[-2:]
        assert [
            onnx.helper.get_attribute_value(cast.attribute[0]) for cast in (float32, uint8)
        ] == [1, 2]
    weights = {t.data_type for t in model.graph.initializer if len(t.dims) > 1}
    assert {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}.get(
        manifest.precision, onnx.TensorProto.FLOAT
    ) in weights
    if manifest.precision == "fp16":
        assert onnx.TensorProto.FLOAT not in weights


def test_int8_in_openvino_refuses_to_calibrate_in_batches(
    network: SegFormer, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError,
        match="nncf calibrates on one image at a time; for int8 give `batch_size` 1, or",
    ):
        export(
            network,
            tmp_path / "it.xml",
            format="openvino",
            precision="int8",
            size=SIZE,
            images=calibration_images(4),
            batch=2,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "int8"},
            "int8 needs images to calibrate on, like those the network will see; give some.",
        ),
        (
            {"format": "pt2"},
            r"it.onnx ends in '.onnx', where a file of the format pt2 ends in .pt2.$",
        ),
        (
            {"format": "tflite"},
            "The format 'tflite' is unknown; choose one of onnx, openvino, pt2, aotinductor, torch",
        ),
        ({"size": (31, 64)}, "The input is 31×64 pixels; both sides must be at least 32"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    options: dict[str, Any], message: str, network: SegFormer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export(network, tmp_path / "it.onnx", **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "options", [{"dynamic": True}, {"batch": 2}, {"preprocess": True}, {"argmax": True}]
)
def test_what_ncnn_cannot_take_is_refused(
    options: dict[str, Any], network: SegFormer, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError,
        match=r"takes one normalised image of one size and returns logits; leave out `dyn",
    ):
        export(network, tmp_path / "it.ncnn.param", format="ncnn", size=SIZE, **options)


def test_windows_that_are_larger_than_a_map_are_refused_for_ncnn(
    network: SegFormer, tmp_path: Path
) -> None:
    coarse = with_factors(network, {"encoder.stages.3.blocks.0.attn": 3})
    with pytest.raises(
        ValueError, match=r"of stage 4 are averaged over 3 × 3, and at 64×96 .* is 2 high or"
    ):
        export(coarse, tmp_path / "it.ncnn.param", format="ncnn", size=(64, 96))
    assert os.listdir(tmp_path) == []


def test_a_network_that_pnnx_cannot_convert_is_refused(
    network: SegFormer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pnnx

    monkeypatch.setattr(pnnx, "EXEC_PATH", "false")
    with pytest.raises(
        ValueError,
        match=r"^pnnx could not convert the network \(.*\); choose another format\.$",
    ):
        export(network, tmp_path / "it.ncnn.param", format="ncnn", size=SIZE)


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2", ".torchscript", ".ncnn.param"])
def test_a_file_of_the_right_name_and_the_wrong_content_is_refused(
    suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(np.random.default_rng(0).bytes(2000))
    with pytest.raises(
        ValueError,
        match=r"bad\.[\w.]+ is no file that segprune export wrote \(.+\); export it again\.$",
    ):
        open_exported(path, trust=True)


class Harmful:
    """What a hostile file puts in the place of a tensor."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def test_a_file_that_runs_code_is_opened_only_with_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickled = io.BytesIO()
    torch.save(Harmful(), pickled)
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(1, 3, 4, 4),))
    torch.export.save(program, "good.pt2")
    with zipfile.ZipFile("good.pt2") as good, zipfile.ZipFile("evil.pt2", "w") as evil:
        for name in good.namelist():
            data = pickled.getvalue() if "sample_inputs" in name else good.read(name)
            evil.writestr(name, data)

    for name in ("evil.pt2", "script.torchscript"):
        Path("script.torchscript").write_bytes(b"anything")
        with pytest.raises(
            ValueError, match=rf"{name} is a program, .*; give `trust`.* \.onnx"
        ):
            open_exported(name)
        with pytest.raises(ValueError, match=rf"{name} is a program"):
            grid([name], sizes=((64, 64),))
    assert not Path("harmed").exists()

    # The same file does harm where it is trusted, so the refusal above is what kept it from that.
    with pytest.raises(ValueError, match="no file that segprune export wrote"):
        open_exported("evil.pt2", trust=True)
    assert Path("harmed").exists()


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(
            torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)),
            str(tmp_path / "other.torchscript"),
        )
    with pytest.raises(
        ValueError, match="it holds no description by segprune of what it takes"
    ):
        open_exported(tmp_path / "other.torchscript", trust=True)
    assert not is_compiled(tmp_path / "other.torchscript")


@pytest.mark.parametrize(
    "case", ["openvino", "openvino fp16 baked"], indirect=True, scope="module"
)
def test_an_openvino_file_of_one_size_takes_no_other_and_names_what_it_gives(
    case: Case,
) -> None:
    _, path, manifest, _, _ = case
    preprocess = manifest.preprocess
    model = pytest.importorskip("openvino").Core().read_model(path)
    ((source,), (result,)) = model.inputs, model.outputs
    height, width = SIZE
    expected = [1, height, width, 3] if preprocess else [1, 3, height, width]
    assert source.partial_shape.is_static
    assert list(source.shape) == expected
    assert list(result.shape) == ([1, height, width] if preprocess else [1, 5, height, width])
    names = ("pixels", "classes") if preprocess else ("images", "logits")
    assert (source.names, result.names) == tuple({name} for name in names)

    # Another batch or size used to give one answer, or logits of the wrong size.
    compiled = pytest.importorskip("openvino").Core().compile_model(model, "CPU")
    for dimension in (0, 2):
        other = list(expected)
        other[dimension] *= 2
        x = np.zeros(other, dtype=np.uint8 if preprocess else np.float32)
        with pytest.raises(RuntimeError, match="shape"):
            compiled({names[0]: x})


@pytest.mark.parametrize("opset", [13, 17])
def test_older_opsets_give_the_same_logits_and_have_layernorm_from_17_on(
    opset: int, network: SegFormer, tmp_path: Path
) -> None:
    _, difference = export(network, tmp_path / "it.onnx", size=SIZE, opset=opset)
    assert difference.relative is not None
    assert difference.relative < 1e-5
    model = onnx.load(tmp_path / "it.onnx")
    assert [(o.domain, o.version) for o in model.opset_import if o.domain == ""] == [
        ("", opset)
    ]
    kinds = {node.op_type for node in model.graph.node}
    assert ("LayerNormalization" in kinds) == (opset >= 17)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 12}, "`opset` is 12, where 13 to 18 is allowed"),
        (
            {"opset": 13, "dynamic": True},
            "`opset` 13 is for the format onnx and one fixed size",
        ),
        (
            {"precision": "fp16", "format": "torchscript", "dynamic": True},
            "fp16 in the format torchscript is for one fixed size; leave out `dynamic`",
        ),
        (
            {"opset": 13, "format": "pt2"},
            "`opset` 13 is for the format onnx and one fixed size",
        ),
    ],
)
def test_an_opset_that_cannot_be_written_is_refused(
    options: dict[str, Any], message: str, network: SegFormer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export(network, tmp_path / "it.onnx", size=SIZE, **options)
