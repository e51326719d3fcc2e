"""A checkpoint of mmsegmentation through every command: its decode head is of another kind than all others'."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.trained_like import fill
from segprune.checkpoint import load, read
from segprune.export import open_exported
from tests.commands import BEST, HERE, SIZE, done, invoke, refused, results_in, training
from tests.dialects import reference


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("mmseg") / "iter_160000.pth"
    state = reference("mmseg", fill, num_classes=8).state_dict()
    torch.save(
        {"meta": {"iter": 160000}, "state_dict": state, "optimizer": {"state": {}}}, path
    )
    return path


def record_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "l1/b0/pruning_results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pruned(
    theirs: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder and the output of a run that repairs, scores and fine-tunes with the dense network as the teacher."""
    folder = tmp_path_factory.mktemp("pruned")
    here = (*SIZE, *HERE, "--data", data, "--save_dir", folder, "--num_images", 8)
    return folder, done(
        "prune", "--model_path", theirs, *here, "--epochs", 1, "--batch_size", 4
    )


def test_it_is_pruned_repaired_and_fine_tuned_with_itself_as_the_teacher(
    pruned: tuple[Path, str],
) -> None:
    record = record_in(pruned[0])
    network = load(record["model_save_path"])
    assert record["model_config"]["dialect"] == "mmseg"
    assert record["reduction"]["parameters_reduction_percent"] == pytest.approx(50, abs=1)
    assert record["reduction"]["parameters_by_folding_percent"] == 0
    assert "decode head folded" not in pruned[1]
    assert record["pruned_model"]["parameters"] == sum(p.numel() for p in network.parameters())
    assert network.spec.head == "conv"
    assert read(pruned[0] / "l1/b0/b0_pruned_0.5_finetuned" / BEST).spec == network.spec


def test_it_is_scored_trained_on_and_predicted_with(
    theirs: Path, pruned: tuple[Path, str], data: Path, tmp_path: Path
) -> None:
    done("eval", theirs, "--data", data, *SIZE, *HERE, "--save_dir", tmp_path / "scores")
    small = record_in(pruned[0])["model_save_path"]
    done(
        *training(
            data, tmp_path / "out", "--model_path", small, "--teacher", theirs, "--epochs", 1
        )
    )
    assert results_in(tmp_path / "out")["epochs"]
    assert load(tmp_path / "out" / BEST).spec == load(small).spec
    done(
        "predict",
        theirs,
        "--input",
        next(data.rglob("*.jpg")),
        *SIZE,
        "--save_dir",
        tmp_path / "masks",
    )
    assert any((tmp_path / "masks").iterdir())


def test_it_is_exported_and_timed_with_its_batch_norms_in_the_products(
    pruned: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segprune.timing.CPU_SIDE", 64)  # a small product does for the peak
    small, path = record_in(pruned[0])["model_save_path"], tmp_path / "small.torchscript"
    flags = ("--format", "torchscript", "--input_shape", 64, 64)  # the fastest to write
    out = done("export", small, *flags, "--output", path)
    assert "largest difference" in out
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = load(small)(x)
    found = open_exported(path, trust=True)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    quick = ("--sizes", "32x32", "--rounds", 3, "--seconds", 0, "--threads", 1, "--no_memory")
    done("benchmark", small, *quick, "--save_dir", tmp_path / "times")


def test_flags_for_other_heads_are_refused(theirs: Path) -> None:
    for flag in ("uniform", "keep_decoder"):
        status, out, errors = invoke("prune", "--model_path", theirs, f"--{flag}")
        assert (status, out) == (1, "")  # before the settings
        assert errors == (
            f"Error: --{flag} is for decode heads as published, and this network's has a BatchNorm and a ReLU in each "
            "branch; leave it out.\n"
        )


def test_it_is_converted_back_and_to_a_folder_with_its_code(
    theirs: Path, tmp_path: Path
) -> None:
    out = done("convert", theirs, tmp_path / "back.pth", "--to", "mmseg")
    assert "Written for mmseg, b0," in out
    assert "Note:" not in out
    back, whole = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (tmp_path / "back.pth", theirs)
    )
    assert back.keys() == whole.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in whole.items())
    out = done("convert", theirs, tmp_path / "hf", "--to", "hf")
    assert (
        "since its decode head has a BatchNorm and a ReLU in each branch, not linear branches; the folder"
        in out
    )
    assert read(tmp_path / "hf").spec == read(theirs).spec
    assert refused("convert", theirs, tmp_path / "a.pth", "--to", "nvlabs").endswith(
        "; write mmseg or hf instead."
    )
