"""`segprune export` and what becomes of its files: kept only if they agree, scored like any checkpoint."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from segprune.checkpoint import save
from segprune.data import draw_shapes, write_shapes
from segprune.export import FORMATS, open_exported
from segprune.export.job import Job
from segprune.export.runtimes import OPENERS
from tests.commands import HERE, SIZE, done, refused
from tests.exporting import tiny_network

PIXELS = ("--input_shape", 64, 64)
PALETTE = [number % 251 for number in range(768)]
SCRIPT = ("--format", "torchscript", *PIXELS)  # the fastest to write


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    save(tiny_network(8), path, extra={"class_names": list("abcdefgh"), "palette": PALETTE})
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, num_train=4, num_val=3, size=(64, 64), seed=5)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(5):
        Image.fromarray(draw_shapes(2, "train", index, (50, 70))[0]).save(
            folder / f"{index}.png"
        )
    return folder


@pytest.fixture(scope="module")
def script(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An exported file and what was printed."""
    path = tmp_path_factory.mktemp("script") / "new" / "tiny.torchscript"
    return path, done("export", tiny, *SCRIPT, "--batch_size", 2, "--output", path)


def numbers_of(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8"))["confusion"]


def test_the_difference_is_printed_and_saved_beside_the_file(script: tuple[Path, str]) -> None:
    path, out = script
    record = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    relative, agreement = record["difference"]["relative"], record["difference"]["agreement"]
    assert 0 < relative < 1e-5
    assert (
        f"Run again on 2 images and compared with PyTorch: largest difference of logits {relative:.1e} relative, "
        f"equal class on {100 * agreement:.3f} % of pixels."
    ) in out
    assert f"Saved: {path} {path}.json" in out
    assert record["manifest"] == json.loads(open_exported(path, trust=True).manifest.text)
    assert record["manifest"]["class_names"] == list("abcdefgh")
    assert open_exported(path, trust=True).manifest.palette == tuple(PALETTE)
    assert record["bytes"] == path.stat().st_size
    assert record["settings"]["batch_size"] == 2
    assert sorted(os.listdir(path.parent)) == [path.name, f"{path.name}.json"]


def test_eval_scores_an_exported_file_as_it_does_the_checkpoint(
    script: tuple[Path, str], tiny: Path, shapes: Path, tmp_path: Path
) -> None:
    path, _ = script
    # The size is the file's own.
    trusted = ("eval", path, "--trust", "--data", shapes, *HERE)
    out = done(*trusted, "--json", tmp_path / "file.json")
    done("eval", tiny, "--data", shapes, *HERE, *PIXELS, "--json", tmp_path / "checkpoint.json")
    assert numbers_of(tmp_path / "file.json") == numbers_of(tmp_path / "checkpoint.json")
    assert "input_shape 64 64" in out
    assert "runtime TorchScript" in out
    assert "precision fp32" in out


def test_eval_of_an_exported_file_refuses_what_has_no_effect_and_sizes_it_cannot_take(
    script: tuple[Path, str], shapes: Path
) -> None:
    path, _ = script
    said = refused("eval", path, "--data", shapes, "--dialect", "nvlabs")
    assert (
        said
        == "--dialect has no effect on an exported file, which runs on the CPU; leave it out."
    )
    said = refused("eval", path, "--trust", "--data", shapes, "--mode", "whole")
    assert said == (
        "The file takes images of 64×64 alone, where --mode whole gives every image's own size; choose another "
        "--mode, or export it again with --dynamic."
    )
    said = refused("eval", path, "--trust", "--data", shapes, *HERE, "--input_shape", 32, 96)
    assert said == (
        "The file takes images of 64×64 alone, got 32×96; give --input_shape 64 64, or export it again with --dynamic."
    )


def test_an_int8_onnx_file_is_calibrated_on_a_data_set_baked_and_scored(
    tiny: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = (
        "--precision",
        "int8",
        "--data",
        shapes,
        "--bake",
        "preprocess,argmax",
        "--agreement",
        0.4,
    )
    out = done("export", tiny, *PIXELS, *flags)
    assert "Labels checked (voc): 4 in train" in out
    assert "Note: To see what int8 costs, score the file on data with segprune eval." in out
    assert "Saved: exported/tiny_int8.onnx exported/tiny_int8.onnx.json" in out
    manifest = open_exported("exported/tiny_int8.onnx").manifest
    assert (manifest.precision, manifest.preprocess, manifest.argmax) == ("int8", True, True)
    assert "mIoU" in done("eval", "exported/tiny_int8.onnx", "--data", shapes, *HERE)


def test_int8_that_loses_too_much_names_what_it_costs_layer_by_layer(
    tiny: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The network's score, then a file's that loses too much, then files' that hold; none is really in int8.
    scores = iter([0.5, 0.485, *[0.495] * 20])
    monkeypatch.setattr(
        "segprune.cli.export.evaluate", lambda *_: SimpleNamespace(miou=next(scores))
    )
    written = []

    def write(job: Job, path: Path) -> None:
        written.append(job.manifest.float32)
        FORMATS["torchscript"].write(job, path)

    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=write))
    monkeypatch.setitem(OPENERS, ".onnx", OPENERS[".torchscript"])
    path = tmp_path / "x.onnx"
    flags = ("--precision", "int8", "--data", shapes, "--max_drop", 1, "--output", path)
    out = done("export", tiny, *PIXELS, *flags)

    record = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    names = [layer["name"] for layer in record["layers"]]
    assert written[0] == ()
    assert len(written[1]) == len(names) - 1
    assert record["manifest"]["float32"] == names[:1]
    assert f"Left in float32, of {len(names)} layers, " in out
    assert names[0] in out


def test_a_folder_of_images_does_for_comparison_too(
    tiny: Path, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.torchscript"
    for number, taken in ((3, 3), (9, 5)):
        out = done(
            "export",
            tiny,
            *SCRIPT,
            "--calibration",
            photos,
            "--num_calibration",
            number,
            "--output",
            path,
        )
        assert f"Run again on {taken} images" in out


def test_the_name_is_the_checkpoints_if_none_is_given(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Saved: exported/tiny_fp16.torchscript" in done(
        "export", tiny, *SCRIPT, "--precision", "fp16"
    )


def test_the_tensorrt_command_is_printed_for_those_who_have_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is printed does not depend on what is in the file
    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["torchscript"], suffix=".onnx"))
    monkeypatch.setitem(OPENERS, ".onnx", OPENERS[".torchscript"])
    out = done("export", tiny, *PIXELS, "--output", tmp_path / "x.onnx", "--tensorrt")
    assert f"TensorRT: trtexec --onnx={tmp_path}/x.onnx --saveEngine={tmp_path}/x.engine" in out


def test_a_file_that_drifts_is_not_kept_and_an_older_one_stays(
    tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.torchscript"
    path.write_text("old")
    said = refused("export", tiny, *SCRIPT, "--output", path, "--tolerance", 0)
    assert said.startswith(
        "The exported file is too far from the network (largest difference of logits "
    )
    assert said.endswith(
        "at most 0 and at least 99.9 % were allowed) and was not kept; give a larger --tolerance if that is enough "
        "for you."
    )
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_that_computes_something_else_is_not_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FORMATS["torchscript"]

    def wrong(job: Job, path: Path) -> None:
        job.network.network.encoder.stages[2].patch_embed.proj.weight.mul_(1.01)
        right.write(job, path)

    monkeypatch.setitem(FORMATS, "torchscript", replace(right, write=wrong))
    said = refused("export", tiny, *SCRIPT, "--output", tmp_path / "x.torchscript")
    assert "at most 0.0001 and at least 99.9 % were allowed) and was not kept" in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--format", "coreml"),
            "The format 'coreml' is unknown; choose one of onnx, openvino, pt2, aotinductor, torchscript, ncnn.",
        ),
        (
            ("--precision", "int4"),
            "The format onnx does not come in 'int4'; choose one of fp32, fp16, int8.",
        ),
        (
            ("--format", "pt2", "--precision", "int8"),
            "The format pt2 does not come in 'int8'; choose one of fp32, fp16.",
        ),
        (
            ("--precision", "int8"),
            "--precision int8 needs images to calibrate on, like those the network will see; give a data set as "
            "--data, or a folder of images as --calibration.",
        ),
        (
            ("--bake", "preprocess,softmax"),
            "--bake softmax is unknown; choose of preprocess, argmax, argmax_quarter.",
        ),
        (
            ("--bake", "argmax,argmax_quarter"),
            "argmax and argmax_quarter in --bake are two ways to the same classes; give one of them.",
        ),
        (
            ("--input_shape", 16, 64),
            "The input is 16×64 pixels; both sides must be at least 32, since the last stage",
        ),
        (("--output", "x.engine"), "--output x.engine must end in .onnx, as files of onnx do."),
        (
            ("--data", "a", "--calibration", "b"),
            "--data and --calibration are two sources of the same images;",
        ),
        (
            ("--precision", "int8", "--calibration", "a", "--max_drop", 1),
            "--max_drop needs --data: files are scored on its val.",
        ),
        (
            ("--data", "a", "--max_drop", 1),
            "--max_drop has no effect with --precision fp32; leave it out.",
        ),
        (("--calibration", "nowhere"), "nowhere holds no image; give a folder with"),
        (
            ("--dynamic", "--batch_size", 2),
            "--batch_size has no effect with --dynamic, which takes any batch;",
        ),
        (
            ("--num_calibration", 2),
            "--num_calibration has no effect without --data or --calibration; leave it out.",
        ),
        (("--split", "val"), "--split has no effect without --data; leave it out."),
        (
            ("--bake", "argmax", "--tolerance", 1),
            "--tolerance has no effect with --bake argmax, which leaves no",
        ),
        (
            ("--format", "pt2", "--tensorrt"),
            "--tensorrt has no effect with --format pt2, since TensorRT reads onnx; leave it out.",
        ),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    flags: tuple[object, ...],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused("export", tiny, *flags).startswith(message)
    assert not list(tmp_path.glob("**/*.*"))


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_exported(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    said = refused("export", tiny, *SCRIPT, "--output", tmp_path / "file" / "x.torchscript")
    assert said.startswith(f"{tmp_path}/file/.writable could not be written")


def test_a_target_that_is_a_folder_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "x.torchscript").mkdir()
    said = refused("export", tiny, *SCRIPT, "--output", tmp_path / "x.torchscript")
    assert said.startswith(
        f"{tmp_path}/x.torchscript could not be written (Is a directory); give another place, or"
    )
    assert os.listdir(tmp_path) == ["x.torchscript"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad.pth").write_text("hello")
    assert "a checkpoint ends in .pth, .pt, .bin or .safetensors" in refused(
        "export", tmp_path / "notes.txt"
    )
    assert "bad.pth is not a PyTorch checkpoint, or only a part of one" in refused(
        "export", tmp_path / "bad.pth"
    )
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    assert refused("export", tmp_path / "other.pth").startswith(f"{tmp_path}/other.pth: ")


@pytest.mark.parametrize(
    ("format", "package", "purpose"),
    [
        ("onnx", "onnxscript", "Exporting to ONNX"),
        ("onnx", "onnx", "Exporting to ONNX"),
        ("openvino", "openvino", "Exporting to OpenVINO"),
        ("ncnn", "pnnx", "Exporting to ncnn"),
    ],
)
def test_a_missing_package_is_named_with_the_extra(
    format: str,
    package: str,
    purpose: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    said = refused("export", tiny, "--format", format, *PIXELS)
    assert (
        said
        == f'{purpose} needs {package}, which is not installed; run in the clone: pip install ".[export]".'
    )


def test_a_runtime_that_is_missing_is_named_before_scoring(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.onnx").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = refused("eval", tmp_path / "x.onnx", "--data", shapes, *SIZE)
    assert said == (
        'Running an .onnx file needs onnxruntime, which is not installed; run in the clone: pip install ".[export]".'
    )


def test_classes_at_a_quarter_are_exported_and_what_they_cost_is_printed(
    tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.torchscript"
    quarter = ("--bake", "argmax_quarter", "--agreement", 0, "--output", path)
    out = done("export", tiny, *SCRIPT, *quarter)
    record = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    agreement = record["difference"]["agreement"]
    assert f"{100 * (1 - agreement):.2f} % of pixels have another" in out
    manifest = open_exported(path, trust=True).manifest
    assert (manifest.argmax, manifest.argmax_quarter) == (True, True)
    exact = (*quarter[:2], "--agreement", 1, "--output", path)
    assert "equal class on" in refused("export", tiny, *SCRIPT, *exact)
