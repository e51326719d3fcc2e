"""What stands between an exported file and whoever calls it, with a function in the file's place."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from segprune.data import MEAN, STD
from segprune.export.manifest import Manifest, parse_manifest
from segprune.export.runtimes import Runtime, is_exported, require


def manifest(
    shape: tuple[int, int, int] | None = (2, 4, 6),
    preprocess: bool = False,
    argmax: bool = False,
) -> Manifest:
    return Manifest("b0", 3, "onnx", "fp32", shape, preprocess, argmax, ("a", "b", "c"))


def test_a_manifest_comes_back_from_its_text() -> None:
    for one in (manifest(), manifest(None, preprocess=True, argmax=True)):
        assert parse_manifest(one.text) == one
        coloured = replace(one, palette=tuple(range(256)) * 3)
        assert parse_manifest(coloured.text) == coloured


def test_a_file_written_before_colours_stood_in_it_still_opens() -> None:
    data = json.loads(manifest().text)
    del data["palette"]
    assert parse_manifest(json.dumps(data)) == manifest()


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "null", '{"variant": "b0"}', manifest().text[:-1]]
)
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="it holds no description by segprune"):
        parse_manifest(text)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": "x"},
        {"shape": [1, 64]},
        {"shape": [0, 0, 0]},
        {"shape": [1, 64, 10**9]},
        {"num_classes": "8"},
        {"num_classes": True},
        {"class_names": 5},
        {"class_names": ["a"] * 99},
        {"float32": 5},
        {"float32": ["a", 1]},
        {"palette": 5},
        {"palette": [1, 2]},
        {"variant": "../b0"},
        {"format": 5},
        {"precision": "fp8"},
        {"argmax": 1},
        {"preprocess": None},
        {"spec": 5},
        {"spec": "ab"},
    ],
    ids=str,
)
def test_a_manifest_of_wrong_types_or_ranges_is_refused(change: dict[str, Any]) -> None:
    data = json.loads(manifest().text)
    with pytest.raises(ValueError, match="it holds no description by segprune"):
        parse_manifest(json.dumps(data | change))


@pytest.mark.parametrize(
    ("argmax", "out"),
    [
        (False, torch.zeros(2, 3, 4, 5)),
        (False, torch.zeros(2, 4, 4, 6)),
        (True, torch.zeros(2, 4, 5)),
        (True, torch.full((2, 4, 6), 3)),
    ],
)
def test_a_file_that_returns_something_else_than_it_says_is_refused(
    argmax: bool, out: Tensor
) -> None:
    runtime = Runtime("it", manifest(None, argmax=argmax), lambda _: out)
    with pytest.raises(ValueError, match=r"The file (returned|takes)"):
        runtime(torch.zeros(2, 3, 4, 6))


def test_a_runtime_that_fails_is_told_in_one_sentence() -> None:
    def run(_: Tensor) -> Tensor:
        raise RuntimeError("bad node\nand a page of details")

    with pytest.raises(
        ValueError, match=r"^The file did not run \(bad node\); export it again"
    ):
        Runtime("it", manifest(), run)(torch.zeros(2, 3, 4, 6))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_fixed_batch_is_filled_up_and_cut_again(number: int) -> None:
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x * 2

    x = torch.randn(number, 3, 4, 6)
    assert torch.equal(Runtime("it", manifest(), run)(x), x * 2)
    assert seen == [2] * ((number + 1) // 2)


def test_baked_preprocessing_gets_back_the_pixels_there_were() -> None:
    pixels = (
        torch.arange(256)
        .repeat_interleave(3)[: 2 * 4 * 6 * 3]
        .reshape(2, 4, 6, 3)
        .to(torch.uint8)
    )
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append(x)
        return x.permute(0, 3, 1, 2).float()

    normalised = ((pixels.float() - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    Runtime("it", manifest(preprocess=True), run)(normalised)
    assert torch.equal(seen[0], pixels)


def test_classes_become_logits_whose_highest_they_are() -> None:
    classes = torch.randint(3, (2, 4, 6)).to(torch.uint8)
    logits = Runtime("it", manifest(argmax=True), lambda x: classes)(torch.randn(2, 3, 4, 6))
    assert logits.shape == (2, 3, 4, 6)
    assert torch.equal(logits.argmax(1), classes.long())


def test_the_names_of_exported_files_are_known() -> None:
    assert all(
        is_exported(f"a/b{suffix}")
        for suffix in (".onnx", ".xml", ".pt2", ".torchscript", ".ncnn.param")
    )
    assert not any(
        is_exported(name)
        for name in ("a.pth", "a.pt", "nvidia/segformer", "a.safetensors", "onnx")
    )


@pytest.mark.parametrize(
    ("package", "missing"),
    [("onnxruntime", "onnxruntime"), ("onnxruntime.quantization", "onnxruntime")],
)
def test_a_missing_package_is_named_with_the_extra(
    package: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "onnxruntime.quantization", raising=False)
    with pytest.raises(ImportError) as caught:
        require(package, "Running an .onnx file")
    assert str(caught.value) == (
        'Running an .onnx file needs onnxruntime, which is not installed; run in the clone: pip install ".[export]".'
    )
