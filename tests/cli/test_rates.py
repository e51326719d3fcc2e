"""Where `segprune train` takes its learning rates from, and that it says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from segprune.checkpoint import load, save
from segprune.training.rates import advise_rate
from segprune.training.schedule import Schedule
from tests.commands import HERE, SIZE, interrupted, invoke, refused, told, training
from tests.dialects import state_in


def test_from_scratch_the_rate_is_that_of_our_own_trials(data: Path, tmp_path: Path) -> None:
    seen = told(*training(data, tmp_path, "--phi", "b0"))
    assert (seen.config.lr, seen.config.head_lr) == (1e-3, 1.0)
    assert "Note: Learning rate 0.001: from scratch, no --lr was given." in seen.out


def test_of_a_file_of_ours_it_is_a_tenth(data: Path, small: Path, tmp_path: Path) -> None:
    seen = told(*training(data, tmp_path, "--model_path", small))
    assert (seen.config.lr, seen.config.head_lr) == (pytest.approx(1e-3), 1.0)
    assert (
        "Note: Learning rate 0.001: a tenth of what the network was trained with." in seen.out
    )


def test_of_another_file_it_is_the_papers(data: Path, teacher: Path, tmp_path: Path) -> None:
    seen = told(*training(data, tmp_path, "--model_path", teacher))
    assert seen.config.lr == 6e-5
    expected = "Note: Learning rate 6e-05: the paper's, since the file does not say what it was trained with."
    assert expected in seen.out


def test_a_rate_that_is_given_is_taken(data: Path, small: Path, tmp_path: Path) -> None:
    seen = told(*training(data, tmp_path, "--model_path", small, "--lr", 5e-4))
    assert seen.config.lr == 5e-4
    assert "Note: Learning rate 0.0005: as given." in seen.out


def test_a_resumed_run_says_that_the_rate_is_its_own(
    data: Path, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(1, *training(data, out, "--model_path", small, "--epochs", 2))
    seen = told("train", "--resume", "--save_dir", out)
    assert seen.config.lr == pytest.approx(1e-3)
    assert "Note: Learning rate 0.001, as the run was started with." in seen.out


@pytest.mark.parametrize(
    ("flags", "lr", "reason"),
    [
        (("--batch_size", 8), 5e-5, "5e-05: 0.0001 for 16 images a step, times 8 / 16"),
        (
            ("--batch_size", 4),
            3e-5,
            "3e-05: 0.0001 for 16 images a step, times 4 / 16",
        ),  # the lowest allowed
        (
            ("--optimizer", "sgd", "--lr", 0.02),
            5e-3,
            "0.005: 0.02 for 16 images a step, times 4 / 16",
        ),
    ],
)
def test_the_rule_of_the_voc_scripts_sets_rate_and_course(
    flags: tuple[object, ...], lr: float, reason: str, data: Path, small: Path, tmp_path: Path
) -> None:
    seen = told(
        *training(
            data, tmp_path, "--model_path", small, "--lr_rule", "voc", "--epochs", 100, *flags
        )
    )
    assert seen.config.lr == pytest.approx(lr)
    optimizer = "sgd" if "sgd" in flags else "adamw"
    assert (
        f"Note: Learning rate {reason}, within the limits of the VOC scripts for {optimizer}."
        in seen.out
    )
    assert seen.config.schedule() == Schedule("cosine", 0.03, min_factor=0.01, hold=0.05)


def test_a_new_head_on_a_bare_backbone_learns_ten_times_as_fast(
    data: Path, trained_like: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "mit_b0.pth"
    torch.save(
        {
            k: v
            for k, v in state_in("nvlabs", trained_like).items()
            if k.startswith("backbone.")
        },
        path,
    )
    flags = training(data, tmp_path / "out", "--model_path", path, "--num_classes", 8)
    seen = told(*flags)
    assert seen.config.head_lr == 10
    assert (
        "Only a backbone was found: the decode head for 8 classes is new and untrained."
        in seen.out
    )
    assert told(*flags, "--head_lr", 3).config.head_lr == 3


def test_the_voc_rule_starts_sgd_where_the_scripts_do_and_knows_no_third_optimizer(
    data: Path, small: Path, tmp_path: Path
) -> None:
    flags = training(
        data, tmp_path, "--model_path", small, "--lr_rule", "voc", "--batch_size", 8
    )
    seen = told(*flags, "--optimizer", "sgd")
    assert seen.config.lr == pytest.approx(5e-3)
    assert "Learning rate 0.005: 0.01 for 16 images a step, times 8 / 16" in seen.out
    assert (
        refused(*flags, "--optimizer", "lion")
        == "--optimizer is 'lion'; choose one of adamw, sgd."
    )


def test_another_rate_is_refused_before_a_resumed_run_says_which_it_has(
    data: Path, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(1, *training(data, out, "--model_path", small, "--epochs", 2))
    status, said, errors = invoke("train", "--resume", "--save_dir", out, "--lr", 1e-4)
    assert (status, said) == (1, "")
    assert (
        errors
        == "Error: The run to resume had --lr 0.001, now it is 0.0001; leave the flag out.\n"
    )


@pytest.mark.parametrize(
    ("extra", "advised"), [({"lr": 1e-3}, True), ({}, False), ({"finetuned_lr": 1e-3}, False)]
)
def test_only_where_a_tenth_was_taken_the_whole_rate_is_advised(
    extra: dict[str, float], advised: bool, data: Path, dense: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.pth"
    save(load(dense), path, extra=extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segprune.training.rates.MUCH_LOST", 1e9)
        seen = told(
            "prune",
            "--model_path",
            path,
            *SIZE,
            *HERE,
            "--data",
            data,
            "--epochs",
            1,
            "--save_dir",
            tmp_path,
        )
    assert ("; --lr 0.001 is worth a try." in seen.out) is advised


def test_where_much_was_lost_a_higher_rate_is_advised() -> None:
    assert advise_rate(0.8, 0.73, 1e-4) == ()
    (note,) = advise_rate(0.8, 0.4, 1e-4)
    assert note.startswith("The cut network keeps 50% of the dense mIoU. ")
    assert note.endswith("; `lr` 0.001 is worth a try.")
