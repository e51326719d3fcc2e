"""Which combinations are measured, and which are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from segprune import save
from segprune.benchmark import Case, export_cases, grid, open_case
from segprune.export import Manifest, Runtime, export
from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.spec import Spec
from segprune.stats import count


@pytest.fixture
def weights(small_model: SegFormer, tmp_path: Path) -> str:
    save(small_model.float(), tmp_path / "small.pth")
    return str(tmp_path / "small.pth")


@pytest.fixture(scope="module")
def script(small_spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("script") / "small.torchscript"
    export(SegFormer(small_spec), path, format="torchscript", size=(32, 64))
    return str(path)


def test_all_combinations_come_the_first_file_s_first() -> None:
    cases = grid(
        ["a.pth", "b.pth"],
        runtimes=("torch", "onnxruntime"),
        dtypes=("fp32", "fp16"),
        sizes=((64, 96), (32, 32)),
        batch_sizes=(1, 8),
        threads=(1, 2),
    )
    assert len(set(cases)) == len(cases) == 2**6
    assert cases[0] == Case("a.pth", "torch", "fp32", (64, 96), 1, 1, file="a.pth")
    assert [case.threads for case in cases[:2]] == [1, 2]
    assert all(case.path == "a.pth" for case in cases[:32])


def test_without_runtimes_checkpoints_run_in_torch_and_exported_files_in_their_own(
    script: str,
) -> None:
    cases = grid(["a.pth", script], sizes=((32, 64),), trust=True)
    assert [(case.runtime, case.dtype) for case in cases] == [
        ("torch", "fp32"),
        ("torchscript", "fp32"),
    ]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"runtimes": ("tvm",)},
            "`runtimes` has tvm, which is unknown; choose from torch, compile, onnxruntime, openvino, ",
        ),
        (
            {"dtypes": ("fp8",)},
            "`dtypes` has fp8, which is unknown; choose from fp32, tf32, bf16, fp16.",
        ),
        (
            {"dtypes": ("fp32", "tf32")},
            "`dtypes` has tf32, in which only GPUs compute; leave it out",
        ),
        ({"sizes": ((16, 64),)}, "The input is 16×64 pixels; both sides must be at least 32"),
        ({"batch_sizes": (1, 0)}, "`batch_sizes` has 0, where 1 and more is allowed"),
        (
            {"threads": (2, -1)},
            "`threads` has -1, where 1 and more is allowed; give a larger number.",
        ),
        (
            {"runtimes": ("torch", "onnxruntime"), "dtypes": ("fp32", "bf16")},
            "onnxruntime does not compute in bf16 here, only in fp32, fp16; leave out one of them, or run them apart.",
        ),
        (
            {"runtimes": ("openvino",), "device": "cuda"},
            "openvino runs on the CPU only; leave it out",
        ),
        (
            {"runtimes": ("openvino",), "fold": True},
            "`fold` has no effect here, since what is exported is folded",
        ),
    ],
)
def test_what_is_unknown_or_does_not_go_together_is_refused(
    how: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        grid(["a.pth"], **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"runtimes": ("torch",)},
            "runs in torchscript alone, which is not among `runtimes`; add it, or leave out",
        ),
        (
            {},
            "takes batches of 1 of 32×64 alone, got 1 of 512×512; give `sizes` 32x64 and `batch_sizes` 1, or export",
        ),
        (
            {"sizes": ((32, 64),), "batch_sizes": (2,)},
            "takes batches of 1 of 32×64 alone, got 2 of 32×64; give `sizes`",
        ),
        (
            {"sizes": ((32, 64),), "device": "cuda"},
            "torchscript runs on the CPU only; leave it out",
        ),
    ],
)
def test_what_an_exported_file_cannot_take_is_refused(
    how: dict[str, object], message: str, script: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        grid([script], trust=True, **how)  # type: ignore[arg-type]


def test_a_file_of_any_size_that_is_asked_for_too_small_a_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = Manifest("b0", 5, "onnx", "fp32", None, preprocess=False, argmax=False)
    monkeypatch.setattr(
        "segprune.benchmark.cases.open_exported",
        lambda path, trust: Runtime("", manifest, torch.relu),
    )
    with pytest.raises(
        ValueError,
        match="takes images of 64 pixels a side and more, got 32×64; give larger `sizes`",
    ):
        grid(["any.onnx"], sizes=((32, 64),))


def test_checkpoints_are_exported_once_for_all_threads_and_run_the_folded_head(
    weights: str, small_model: SegFormer, tmp_path: Path
) -> None:
    cases = grid(
        [weights], runtimes=("torch", "torchscript"), sizes=((32, 64),), threads=(1, 2)
    )
    ready = export_cases(cases, tmp_path / "exported")
    assert [case.file for case in ready[:2]] == [weights] * 2
    assert ready[2].file == ready[3].file != weights
    folded = count(fold_decoder(small_model).spec, (32, 64)).macs
    assert open_case(ready[2]).macs == folded < open_case(ready[0]).macs  # type: ignore[operator]
