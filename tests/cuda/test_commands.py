"""The commands with --cuda, as users run them, on a small b0 and generated images."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from segprune import load
from segprune.data import draw_shapes, load_mask, normalise, open_source
from segprune.export import export
from segprune.model import SegFormer
from tests.commands import HERE, done, interrupted, rows_in

pytestmark = pytest.mark.cuda

SIZE = ("--input_shape", 64, 64)


def pruning(dense: Path, data: Path, out: Path, *flags: object) -> tuple[object, ...]:
    here = ("--data", data, *SIZE, *HERE, "--batch_size", 4, "--save_dir", out)
    return ("prune", "--model_path", dense, "--pruning_rate", 0.5, *here, *flags)


def record_in(out: Path) -> dict[str, Any]:
    (path,) = out.rglob("pruning_results.json")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def logits_of(model: SegFormer) -> Tensor:
    x = torch.stack(
        [normalise(draw_shapes(7, "val", index, (64, 64))[0]) for index in range(4)]
    )
    with torch.no_grad():
        return model.eval()(x)


PRUNINGS: list[tuple[object, ...]] = [
    (),
    ("--keep_decoder",),
    ("--uniform",),
    ("--heads",),
]


@pytest.mark.parametrize("flags", PRUNINGS, ids=str)
def test_pruning_gives_the_cpus_network(
    dense: Path, data: Path, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    done(*pruning(dense, data, tmp_path / "gpu", "--cuda", *flags))
    done(*pruning(dense, data, tmp_path / "cpu", *flags))
    on_gpu, on_cpu = record_in(tmp_path / "gpu"), record_in(tmp_path / "cpu")

    assert on_gpu["pruned_model"]["parameters"] == on_cpu["pruned_model"]["parameters"]
    assert on_gpu["pruned_model"]["miou"] == pytest.approx(
        on_cpu["pruned_model"]["miou"], abs=0.02
    )
    assert on_gpu["original_model"]["latency"]["device"] == torch.cuda.get_device_name()
    assert on_gpu["pruned_model"]["latency_ms"] > 0

    ours, expected = (logits_of(load(record["model_save_path"])) for record in (on_gpu, on_cpu))
    assert float((ours - expected).norm() / expected.norm()) < 1e-2


def test_pruning_by_gradients_and_fine_tuning_with_the_teacher_run(
    dense: Path, data: Path, tmp_path: Path
) -> None:
    done(*pruning(dense, data, tmp_path, "--cuda", "--pruning_method", "taylor", "--epochs", 1))
    record = record_in(tmp_path)
    assert 0.0 <= record["finetuned_model"]["miou"] <= 1.0
    assert logits_of(load(record["finetuned_save_path"])).isfinite().all()


def training(dense: Path, data: Path, out: Path, *flags: object) -> tuple[object, ...]:
    here = (*SIZE, *HERE, "--data", data, "--batch_size", 4, "--save_dir", out)
    return ("train", "--model_path", dense, "--epochs", 2, "--cuda", *here, *flags)


@pytest.mark.parametrize("amp", ["fp16", "bf16"])
def test_training_in_half_precision_is_stopped_and_goes_on(
    dense: Path, data: Path, tmp_path: Path, amp: str
) -> None:
    if amp == "bf16" and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bf16")
    done(*training(dense, data, tmp_path / "whole", "--amp", amp))
    status, errors = interrupted(3, *training(dense, data, tmp_path / "stopped", "--amp", amp))
    assert status == 130
    done(
        *shlex.split(errors.partition("-m segprune ")[2])
    )  # the command that the message names

    whole, resumed = rows_in(tmp_path / "whole"), rows_in(tmp_path / "stopped")
    assert [row["epoch"] for row in resumed] == [1, 2]
    for row, expected in zip(resumed, whole, strict=True):
        assert math.isfinite(row["loss"])
        assert row["loss"] == pytest.approx(expected["loss"], rel=0.05)


def test_every_part_of_training_runs_together(dense: Path, data: Path, tmp_path: Path) -> None:
    """Teacher, average, clipping, losses that sort, a frozen start, recomputed activations."""
    flags = (
        "--teacher",
        dense,
        "--ema",
        0.9,
        "--clip_norm",
        1,
        "--loss",
        "ce+dice+lovasz",
        "--freeze_epochs",
        1,
    )
    done(*training(dense, data, tmp_path, *flags, "--checkpointing"))
    assert all(math.isfinite(row["loss"]) for row in rows_in(tmp_path))


@pytest.mark.parametrize(
    "flags",
    [(), ("--mode", "slide", "--scales", "0.75,1", "--flip")],
    ids=["letterbox", "slide"],
)
def test_evaluation_scores_as_on_the_cpu(
    dense: Path, data: Path, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    scores = {}
    for name, device in (("gpu", ("--cuda",)), ("cpu", ())):
        path = tmp_path / f"{name}.json"
        done("eval", dense, "--data", data, *SIZE, *HERE, *flags, "--json", path, *device)
        scores[name] = json.loads(path.read_text(encoding="utf-8"))["miou"]
    assert scores["gpu"] == pytest.approx(scores["cpu"], abs=0.01)


def test_prediction_gives_the_cpus_classes(dense: Path, data: Path, tmp_path: Path) -> None:
    samples = open_source(data).split("val")
    images = Path(str(samples[0].image)).parent
    for name, device in (("gpu", ("--cuda",)), ("cpu", ())):
        done(
            "predict",
            dense,
            "--input",
            images,
            *SIZE,
            "--kind",
            "mask",
            "--save_dir",
            tmp_path / name,
            *device,
        )

    masks = {
        name: [load_mask(tmp_path / name / "mask" / f"{s.name}.png") for s in samples]
        for name in ("gpu", "cpu")
    }
    equal = np.mean(
        [ours == expected for ours, expected in zip(masks["gpu"], masks["cpu"], strict=True)]
    )
    assert equal > 0.99


def test_a_network_on_the_gpu_is_exported_and_checked(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = load(dense, device="cuda")
    _, difference = export(model, tmp_path / "b0.onnx", size=(64, 64))
    assert difference.agreement > 0.999
    assert next(model.parameters()).is_cuda  # left where it was


def test_a_file_is_benchmarked_with_its_memory(dense: Path, tmp_path: Path) -> None:
    quick = ("--sizes", "64x64", "--batch_sizes", 2, "--rounds", 3, "--seconds", 0)
    done(
        "benchmark",
        dense,
        *quick,
        "--dtypes",
        "fp16",
        "--cuda",
        "--fold",
        "--save_dir",
        tmp_path,
    )

    (row,) = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))["rows"]
    assert 0 < row["median_ms"] <= row["eager_ms"]
    assert row["peak_memory_mb"] > 0
