"""`segprune benchmark` as users run it: what it prints, saves and refuses."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from segprune import load
from segprune.data import open_source
from segprune.inference.evaluate import EvalMode, evaluate
from tests.commands import done, invoke, refused

QUICK = ("--sizes", "32x32", "--rounds", 3, "--seconds", 0, "--threads", 1)


@pytest.fixture(autouse=True)
def _small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segprune.timing.CPU_SIDE", 64)


def record_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))


def test_two_files_side_by_side_make_a_table_json_csv_and_a_plot(
    small: Path, teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    said = done(
        "benchmark",
        small,
        teacher,
        *QUICK,
        "--batch_sizes",
        "1,2",
        "--no_memory",
        "--save_dir",
        out,
    )
    assert ", dtype fp32, output logits, size 32×32, threads 1 " in said
    assert "Peak: GMAC/s of a product of large float32 matrices in the same rounds" in said
    assert (
        "Note: With fewer than 100 rounds p99 is near the longest pass; raise --rounds and --seconds."
        in said
    )
    assert f"Saved: benchmark.json, benchmark.csv and benchmark.png in {out}" in said
    rows = record_in(out)["rows"]
    assert [(row["file"], row["batch"]) for row in rows] == [
        (str(p), b) for p in (small, teacher) for b in (1, 2)
    ]
    for row in rows:
        assert 0 < row["median_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["median_ms"] * 1e3)
        assert row["faster"] == pytest.approx(
            row["images_per_second"] / rows[0]["images_per_second"]
        )
        assert (row["peak_memory_mb"], row["miou"]) == (None, None)
    with (out / "benchmark.csv").open(encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    assert head == list(rows[0])
    assert [float(line[head.index("median_ms")]) for line in lines] == [
        row["median_ms"] for row in rows
    ]
    with Image.open(out / "benchmark.png") as image:
        assert min(image.size) > 200


def test_a_narrow_terminal_is_told_which_columns_are_missing(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    narrow = Console(file=out, width=60, force_terminal=True, color_system=None)
    monkeypatch.setattr("segprune.cli.console.console", narrow)
    done("benchmark", small, *QUICK, "--no_memory")
    note = re.search(
        r"Note: The terminal is too narrow for (p99.*?); --save_dir saves them all",
        " ".join(out.getvalue().split()),
    )
    assert note
    assert "median ms" in out.getvalue()
    assert "p99 " not in out.getvalue().partition("Note:")[0]


def test_with_data_every_file_is_scored_in_every_size_as_eval_does(
    dense: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        "segprune.plots.trade_off", lambda points, y, path: drawn.update(points=points, y=y)
    )
    flags = (
        "--sizes",
        "32x32,32x64",
        "--rounds",
        3,
        "--seconds",
        0,
        "--threads",
        1,
        "--num_workers",
        0,
    )
    done("benchmark", dense, *flags, "--no_memory", "--data", data, "--save_dir", tmp_path)
    rows = record_in(tmp_path)["rows"]
    samples = open_source(data).split("val")
    expected = [
        evaluate(load(dense), samples, 8, EvalMode(input_shape=(32, side))).miou
        for side in (32, 64)
    ]
    assert [row["miou"] for row in rows] == expected
    assert drawn["y"] == "mIoU"
    assert drawn["points"] == {str(dense): [(row["median_ms"], row["miou"]) for row in rows]}


def test_a_checkpoint_is_exported_on_the_fly_beside_an_exported_file(
    small: Path, tmp_path: Path
) -> None:
    """In TorchScript, which is the fastest to write."""
    script = tmp_path / "small.torchscript"
    flags = ("--format", "torchscript", "--input_shape", 32, 32)
    done("export", small, *flags, "--output", script)
    before = {path.name for path in tmp_path.iterdir()}
    runtimes = ("--runtimes", "torch,torchscript", "--trust")
    said = done("benchmark", small, script, *runtimes, *QUICK, "--no_memory")
    assert said.count("TorchScript") == 2
    assert "PyTorch" in said
    assert {path.name for path in tmp_path.iterdir()} == before
    assert refused("benchmark", script, *QUICK, "--trust", "--output", "classes").startswith(
        "--output has no effect on exported files"
    )
    assert refused("benchmark", script, *QUICK, "--trust", "--dtypes", "fp16").startswith(
        "--dtypes has no effect on exported files"
    )


def test_memory_is_measured_once_for_all_threads(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "segprune.cli.benchmark.peak_memory", lambda case: asked.append(case) or 5_000_000
    )
    said = done("benchmark", small, *QUICK[:-1], "1,2", "--save_dir", tmp_path)
    assert len(asked) == 1
    assert "memory MB" in said
    assert [row["peak_memory_mb"] for row in record_in(tmp_path)["rows"]] == [5.0, 5.0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--runtimes", "tvm"),
            "--runtimes has tvm, which is unknown; choose from torch, compile, onnxruntime, openvino",
        ),
        (
            ("--dtypes", "int4"),
            "--dtypes has int4, which is unknown; choose from fp32, tf32, bf16, fp16.",
        ),
        (
            ("--output", "masks"),
            "--output is masks, which is unknown; choose from logits, classes.",
        ),
        (("--dtypes", ","), "--dtypes is empty; give it as in fp32,bf16."),
        (("--sizes", "512"), "--sizes is '512'; give it as in 512x512,1024x512."),
        (("--sizes", "16x64"), "The input is 16×64 pixels; both sides must be at least 32"),
        (
            ("--batch_sizes", "0"),
            "--batch_sizes has 0, where 1 and more is allowed; give a larger number.",
        ),
        (
            ("--threads", "0"),
            "--threads has 0, where 1 and more is allowed; give a larger number.",
        ),
        (("--threads", "two"), "--threads is 'two'; give it as in 1,2."),
        (("--batch_sizes", ","), "--batch_sizes is empty; give it as in 1,8."),
        (("--split", "train"), "--split has no effect without --data; leave it out."),
        (("--cuda", "--threads", "2"), "--threads has no effect with --cuda"),
        (("--cuda",), "--cuda was given but PyTorch sees no GPU here"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    flags: tuple[object, ...], message: str, small: Path
) -> None:
    assert refused("benchmark", small, *flags).startswith(message)


def test_a_file_or_data_that_is_not_there_is_refused_before_anything_runs(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("measure", "export_cases", "peak_memory"):
        monkeypatch.setattr(
            f"segprune.cli.benchmark.{name}", lambda *a, **k: pytest.fail("it ran")
        )
    assert "nowhere.pth does not exist" in refused(
        "benchmark", small, tmp_path / "nowhere.pth", *QUICK
    )
    assert "nowhere.onnx does not exist" in refused(
        "benchmark", small, tmp_path / "nowhere.onnx", *QUICK
    )
    assert "nowhere" in refused("benchmark", small, *QUICK, "--data", tmp_path / "nowhere")
    status, _, errors = invoke("benchmark")
    assert status == 2
    assert "Missing argument 'FILE...'" in errors


def test_a_missing_package_is_named_with_the_extra_before_anything_runs(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("segprune.export.runtimes.import_module", missing)
    said = refused("benchmark", small, "--runtimes", "torch,onnxruntime", *QUICK)
    assert said == (
        'Running in onnxruntime needs onnxruntime, which is not installed; run in the clone: pip install ".[export]".'
    )
