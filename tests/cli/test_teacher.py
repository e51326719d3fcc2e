"""Fine-tuning with a teacher: what it changes, that a stopped run keeps it, and which teachers are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from segprune.checkpoint import load, read, save
from segprune.data.shapes import CLASS_NAMES
from segprune.model import SegFormer
from segprune.training.distill import Distillation
from tests.commands import (
    HERE,
    LAST,
    SIZE,
    done,
    interrupted,
    refused,
    results_in,
    same,
    told,
    training,
)
from tests.dialects import reference, state_in


def test_a_teacher_is_learnt_from_and_kept_when_a_run_goes_on(
    data: Path, small: Path, teacher: Path, tmp_path: Path
) -> None:
    flags = ("--model_path", small, "--epochs", 2)
    alone, taught, stopped = (tmp_path / name for name in ("alone", "taught", "stopped"))
    done(*training(data, alone, *flags))
    done(*training(data, taught, *flags, "--teacher", teacher))
    interrupted(3, *training(data, stopped, *flags, "--teacher", teacher))
    said = refused("train", "--resume", "--save_dir", stopped, "--teacher", small)
    assert said == (
        "The run to resume had another teacher (its weights differ); give the same network as --teacher, or start anew "
        "without --resume."
    )
    said = refused("train", "--resume", "--save_dir", stopped, "--distill_pixel", 0.5)
    assert said.startswith(
        "The run to resume had --distill_pixel not given, now it is 0.5; resume with the same settings"
    )
    moved = teacher.rename(tmp_path / "moved.pth")
    assert refused("train", "--resume", "--save_dir", stopped) == (
        f"The run to resume learns from --teacher {teacher}, which is not there; put it back, or give its new place as "
        "--teacher."
    )
    done("train", "--resume", "--save_dir", stopped, "--teacher", moved)
    last = [read(folder / LAST).state_dict for folder in (alone, taught, stopped)]
    assert not same(last[0], last[1])
    assert same(last[1], last[2])
    assert [results_in(folder)["settings"]["teacher"] for folder in (alone, stopped)] == [
        "",
        str(moved),
    ]


def test_a_run_without_a_teacher_goes_on_without_its_weights(
    data: Path, small: Path, tmp_path: Path
) -> None:
    interrupted(1, *training(data, tmp_path / "out", "--model_path", small, "--epochs", 2))
    said = refused("train", "--resume", "--save_dir", tmp_path / "out", "--distill_pixel", 0.5)
    assert (
        said
        == "--distill_pixel has no effect without --teacher; give the dense network to learn from."
    )
    said = refused("train", "--resume", "--save_dir", tmp_path / "out", "--teacher", small)
    assert (
        said == f"The run to resume had --teacher none, now it is {small}; leave the flag out."
    )


def test_weights_and_teacher_reach_the_loop(
    data: Path, small: Path, teacher: Path, tmp_path: Path
) -> None:
    call = training(data, tmp_path / "out", "--model_path", small)
    weights = ("--distill_pixel", 0.5, "--distill_channel", 0, "--distill_feature", 2)
    seen = told(*call, "--teacher", teacher, *weights)
    assert seen.config.distillation() == Distillation(pixel=0.5, channel=0.0, feature=2.0)
    folded, whole = seen.options["teacher"], load(teacher)
    assert folded.spec.folded  # which is faster, and the same function
    with torch.inference_mode():
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(folded(x), whole(x), rtol=1e-3, atol=1e-3)
    assert told(*call, "--teacher", teacher).config.distillation() == Distillation()
    assert told(*call).options["teacher"] is None


def unread(*_: object, **__: object) -> None:
    raise AssertionError("the pictures were read before the teacher was refused")


def refused_teacher(path: Path, data: Path, small: Path, tmp_path: Path, *flags: object) -> str:
    """What is said, before the label check or anything else that takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segprune.cli.console.check_labels", unread)
        patch.setattr("segprune.cli.console.readable", unread)
        here = ("--teacher", path, "--epochs", 1, "--skip_bad", *flags)
        said = refused(*training(data, tmp_path / "out", "--model_path", small, *here))
    assert not any((tmp_path / "out").rglob("*"))
    return said


def test_a_teacher_of_another_number_of_classes_is_refused(
    data: Path, small: Path, tmp_path: Path
) -> None:
    path = tmp_path / "five.pth"
    save(SegFormer(replace(read(small).spec, num_classes=5)), path)
    assert refused_teacher(path, data, small, tmp_path) == (
        f"--teacher {path} has 5 classes and the network to train 8; give a teacher that was trained for the same "
        "classes (another number often means another rule of which label is ignored)."
    )


def test_a_teacher_of_other_classes_is_refused(data: Path, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    save(load(small), path, extra={"class_names": ["background", "disc", "cat", *"abcde"]})
    assert refused_teacher(path, data, small, tmp_path) == (
        f"--teacher {path} calls class 2 'cat' and the data 'square'; give a teacher that was trained for the same "
        "classes."
    )


def test_pruning_refuses_a_teacher_of_other_classes_as_early_and_does_without(
    data: Path, dense: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    save(load(dense), path, extra={"class_names": ["background", "disc", "cat", *"abcde"]})
    here = (
        "prune",
        "--model_path",
        path,
        *SIZE,
        *HERE,
        "--data",
        data,
        "--save_dir",
        tmp_path / "out",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segprune.cli.console.check_labels", unread)
        assert refused(*here, "--epochs", 1) == (
            f"--model_path {path} calls class 2 'cat' and the data 'square'; give data of the same classes, or leave "
            "the teacher out with --no_distill."
        )
    assert not (tmp_path / "out").exists()
    assert told(*here, "--epochs", 1, "--no_distill").options["teacher"] is None


def test_another_tools_teacher_may_have_other_words_but_not_swap_them(
    data: Path, small: Path, trained_like: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    state = reference("nvlabs", trained_like, num_classes=8).state_dict()
    torch.save(
        {"meta": {"CLASSES": list("abcdefgh")}, "state_dict": state}, tmp_path / "words.pth"
    )
    call = training(data, tmp_path / "out", "--model_path", small, "--distill_feature", 0)
    assert told(*call, "--teacher", tmp_path / "words.pth").options["teacher"] is not None
    swapped = ["background", CLASS_NAMES[2], CLASS_NAMES[1], *CLASS_NAMES[3:]]
    path = tmp_path / "swapped.pth"
    torch.save({"meta": {"CLASSES": swapped}, "state_dict": state}, path)
    assert refused_teacher(path, data, small, tmp_path / "refused") == (
        f"--teacher {path} calls class 1 'square' and the data 'disc'; give a teacher that was trained for the same "
        "classes."
    )


def test_names_are_compared_as_far_as_both_go(data: Path, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.pth"
    save(load(small), path, extra={"class_names": ["background", "disc"]})
    assert (
        told(
            *training(data, tmp_path / "out", "--model_path", small, "--teacher", path)
        ).options["teacher"]
        is not None
    )


def test_a_bare_backbone_is_no_teacher(
    data: Path, small: Path, trained_like: Callable[[nn.Module], nn.Module], tmp_path: Path
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
    said = refused_teacher(path, data, small, tmp_path)
    assert said.startswith(f"{path}: This is a backbone without decode head")
    assert said.endswith("or a whole network.")


def test_a_teacher_that_is_not_there_or_not_of_its_dialect_or_gets_no_weight_is_refused(
    data: Path, small: Path, teacher: Path, tmp_path: Path
) -> None:
    path = tmp_path / "gone.pth"
    said = refused_teacher(path, data, small, tmp_path)
    assert said == f"{path} does not exist; give the path of a checkpoint."
    said = refused_teacher(teacher, data, small, tmp_path, "--teacher_dialect", "hf")
    assert (
        said
        == f"{teacher}: The file is segprune's own, but --dialect hf was given; leave --dialect out."
    )
    off = [
        word for name in ("pixel", "channel", "feature") for word in (f"--distill_{name}", 0)
    ]
    said = refused_teacher(teacher, data, small, tmp_path, *off)
    assert said.startswith(
        "All weights of distillation are 0; raise one of pixel, channel, feature or drop"
    )
    said = refused_teacher(teacher, data, small, tmp_path, "--distill_pixel", -1)
    assert said == "The pixel weight is -1.0; it must be 0, to switch off, or above."
