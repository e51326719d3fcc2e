"""What a run takes from the machine where no flag was given; the machines are pretended."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from segprune import machine
from segprune.inference.evaluate import Tally
from segprune.machine import (
    choose_amp,
    choose_precision,
    choose_workers,
    exact_products,
    fit_to_machine,
)
from segprune.runs.folder import Journal
from segprune.tensor_files import load_record, save_record
from segprune.timing import tf32_products
from segprune.training.options import TrainOptions
from tests.commands import SIZE, done, interrupted, results_in, told, training

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pretend(
    patch: pytest.MonkeyPatch,
    *,
    bf16: bool = True,
    tf32: bool = True,
    cores: int = 16,
    processes: int = 1,
) -> None:
    """The machine has these; a CPU without bf16 or a GPU with it can both be meant."""
    patch.setattr(machine, "has_bf16", lambda device: bf16)
    patch.setattr(machine, "has_tf32", lambda device: tf32 and device.type == "cuda")
    patch.setattr(machine, "num_cores", lambda: cores)
    patch.setattr(machine, "name_of", lambda device: f"a {device.type}")
    patch.setenv("LOCAL_WORLD_SIZE", str(processes))


@pytest.mark.parametrize(
    ("amp", "device", "tf32", "precision"),
    [
        ("no", CPU, False, "fp32"),
        ("bf16", CPU, False, "fp32"),
        ("no", CUDA, True, "tf32"),
        ("no", CUDA, False, "fp32"),
        ("bf16", CUDA, True, "bf16"),
        ("fp16", CUDA, True, "fp16"),
    ],
)
def test_networks_are_timed_in_the_precision_of_the_training_steps(
    monkeypatch: pytest.MonkeyPatch, amp: str, device: torch.device, tf32: bool, precision: str
) -> None:
    pretend(monkeypatch, tf32=tf32)
    assert choose_precision(amp, device) == precision


@pytest.mark.parametrize(
    ("device", "bf16", "amp"),
    [(CUDA, True, "bf16"), (CUDA, False, "fp16"), (CPU, True, "no"), (CPU, False, "no")],
)
def test_mixed_precision_is_what_the_gpu_has_and_none_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, bf16: bool, amp: str
) -> None:
    pretend(monkeypatch, bf16=bf16)
    assert choose_amp(device) == amp


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 2), (16, 1, 8), (16, 4, 4), (4, 8, 1)]
)
def test_processes_share_the_cores_among_their_workers(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    pretend(monkeypatch, cores=cores, processes=processes)
    assert choose_workers() == workers


def test_what_was_not_given_is_chosen_and_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch)
    config, notes = fit_to_machine(TrainOptions(), CUDA)
    assert (config.amp, config.tf32, config.num_workers) == ("bf16", True, 8)
    assert len(notes) == 1
    for fact in ("a cuda", "16 cores", "`amp` bf16", "`tf32`", "`num_workers` 8"):
        assert fact in notes[0]

    pretend(monkeypatch, bf16=False, tf32=False)
    config, notes = fit_to_machine(TrainOptions(num_workers=3), CUDA)
    assert (config.amp, config.tf32, config.num_workers) == ("fp16", False, 3)
    assert "`amp` fp16" in notes[0]
    assert "tf32" not in notes[0]
    assert "num_workers" not in notes[0]


def test_what_was_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    given = TrainOptions(amp="no", tf32=False, num_workers=0)
    assert fit_to_machine(given, CUDA) == (given, ())


@pytest.mark.parametrize(
    ("device", "bf16", "warned"), [(CPU, False, True), (CPU, True, False), (CUDA, True, False)]
)
def test_bf16_on_a_cpu_without_it_is_warned_about_with_what_it_costs(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, bf16: bool, warned: bool
) -> None:
    pretend(monkeypatch, bf16=bf16)
    _, notes = fit_to_machine(TrainOptions(amp="bf16", tf32=False, num_workers=0), device)
    assert len(notes) == warned
    assert all("`amp` bf16" in note and "20 times slower" in note for note in notes)


def test_bf16_of_this_cpu_is_what_onednn_says() -> None:
    """Where it says no, a convolution in bf16 takes a reference implementation."""
    assert machine.has_bf16(CPU) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert not machine.has_tf32(CPU)


def test_a_run_that_is_given_nothing_says_and_saves_what_was_chosen(
    monkeypatch: pytest.MonkeyPatch, data: Path, small: Path, tmp_path: Path
) -> None:
    pretend(monkeypatch, cores=1)
    flags = ("--data", data, *SIZE, "--batch_size", 4)
    out = done(
        "train", *flags, "--model_path", small, "--epochs", 1, "--save_dir", tmp_path / "out"
    )
    assert "Chosen for a cpu and 1 cores: --amp no, --num_workers 1." in out
    settings = results_in(tmp_path / "out")["settings"]
    assert (settings["amp"], settings["tf32"], settings["num_workers"]) == ("no", False, 1)

    out = done("eval", small, *flags, "--json", tmp_path / "score.json")
    assert "Chosen for a cpu and 1 cores: --num_workers 1." in out
    assert (
        json.loads((tmp_path / "score.json").read_text(encoding="utf-8"))["settings"][
            "num_workers"
        ]
        == 1
    )
    assert "Chosen" not in done("eval", small, *flags, "--num_workers", 0)


def test_fine_tuning_after_pruning_takes_what_pruning_has_chosen(
    monkeypatch: pytest.MonkeyPatch, data: Path, dense: Path, tmp_path: Path
) -> None:
    pretend(monkeypatch, cores=1)
    flags = (
        "--model_path",
        dense,
        "--data",
        data,
        *SIZE,
        "--no_repair",
        "--epochs",
        1,
        "--save_dir",
        tmp_path,
    )
    seen = told("prune", *flags)
    assert "--amp no, --num_workers 1" in seen.out
    assert (seen.config.amp, seen.config.tf32, seen.config.num_workers) == ("no", False, 1)
    settings = json.loads(
        (tmp_path / "l1/b0/pruning_results.json").read_text(encoding="utf-8")
    )["settings"]
    assert (settings["amp"], settings["num_workers"]) == ("no", 1)


def test_a_resumed_run_keeps_what_it_was_started_with(
    monkeypatch: pytest.MonkeyPatch, data: Path, small: Path, tmp_path: Path
) -> None:
    pretend(monkeypatch, cores=1)
    flags = ("--model_path", small, "--epochs", 1, "--save_dir", tmp_path)
    interrupted(1, "train", "--data", data, *SIZE, "--batch_size", 4, *flags)
    pretend(monkeypatch, cores=7)
    seen = told("train", "--resume", "--save_dir", tmp_path)
    assert "Chosen" not in seen.out
    assert (seen.config.amp, seen.config.tf32, seen.config.num_workers) == ("no", False, 1)


def test_a_run_of_an_earlier_version_goes_on_without_tf32(
    monkeypatch: pytest.MonkeyPatch, data: Path, small: Path, tmp_path: Path
) -> None:
    interrupted(1, *training(data, tmp_path, "--model_path", small, "--epochs", 1))
    record = load_record(tmp_path / "resume.pth")
    del record["settings"]["tf32"], record["state"]["config"]["tf32"]
    save_record(record, tmp_path / "resume.pth")

    monkeypatch.setattr(machine, "has_tf32", lambda device: True)
    done("train", "--resume", "--save_dir", tmp_path)
    assert results_in(tmp_path)["settings"]["tf32"] is False


def test_training_takes_tf32_in_its_steps_alone(
    monkeypatch: pytest.MonkeyPatch, data: Path, small: Path, tmp_path: Path
) -> None:
    seen: dict[str, set[str]] = {"steps": set(), "scores": set()}
    step_done, update = Journal.step_done, Tally.update

    def in_a_step(journal: Journal, *values: Any) -> None:
        seen["steps"].add(torch.get_float32_matmul_precision())
        step_done(journal, *values)

    def in_a_score(tally: Tally, *values: torch.Tensor) -> None:
        seen["scores"].add(torch.get_float32_matmul_precision())
        update(tally, *values)

    monkeypatch.setattr(machine, "has_tf32", lambda device: True)
    monkeypatch.setattr(Journal, "step_done", in_a_step)
    monkeypatch.setattr(Tally, "update", in_a_score)
    before = torch.get_float32_matmul_precision()
    done(*training(data, tmp_path, "--model_path", small, "--epochs", 1))
    assert seen == {"steps": {"high"}, "scores": {"highest"}}
    assert torch.get_float32_matmul_precision() == before


def test_a_command_scores_without_tf32_whatever_was_set_and_puts_that_back(
    monkeypatch: pytest.MonkeyPatch, data: Path, small: Path
) -> None:
    seen = []
    update = Tally.update

    def note(tally: Tally, *values: torch.Tensor) -> None:
        seen.append(torch.get_float32_matmul_precision())
        update(tally, *values)

    monkeypatch.setattr(Tally, "update", note)
    with tf32_products(True):
        done("eval", small, "--data", data, *SIZE, "--num_workers", 0)
        assert torch.get_float32_matmul_precision() == "high"
    assert set(seen) == {"highest"}


def test_the_compiler_does_not_advise_tf32() -> None:
    advice = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider …"
    with exact_products():
        warnings.warn(advice, UserWarning, stacklevel=1)
    with pytest.warns(UserWarning, match="TensorFloat32"):
        warnings.warn(advice, UserWarning, stacklevel=1)
