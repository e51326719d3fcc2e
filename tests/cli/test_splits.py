"""Data sets without a val split, and with classes numbered from 1, in the commands that train and score."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import done, refused, results_in
from tests.data.drawn import noise, write_image, write_mask

SHAPE = ("--input_shape", 32, 32)


def write_split(root: Path, split: str, number: int, first_label: int = 0) -> None:
    for index in range(number):
        write_image(root / f"images/{split}/{split}{index}.png", noise(32, 32, 3, seed=index))
        write_mask(
            root / f"masks/{split}/{split}{index}.png",
            noise(32, 32, high=3, seed=index) + first_label,
        )


def training(root: Path, save_dir: Path, *flags: object) -> tuple[object, ...]:
    start = (
        "train",
        "--data",
        root,
        "--save_dir",
        save_dir,
        "--phi",
        "b0",
        "--num_classes",
        3,
        *SHAPE,
    )
    return (*start, "--epochs", 1, "--batch_size", 2, "--num_workers", 0, *flags)


def test_training_scores_on_another_split_or_on_a_share_set_aside(tmp_path: Path) -> None:
    write_split(tmp_path / "set", "train", 6)
    write_split(tmp_path / "set", "test", 2)
    said = refused(*training(tmp_path / "set", tmp_path / "out"))
    assert "has no val split" in said
    assert "--val_share 0.1" in said

    out = done(*training(tmp_path / "set", tmp_path / "test", "--val_split", "test"))
    assert "Labels checked (folders): 6 in train, 2 in val" in out
    assert results_in(tmp_path / "test")["settings"]["val_split"] == "test"

    out = done(*training(tmp_path / "set", tmp_path / "share", "--val_share", 0.34))
    assert "Labels checked (folders): 4 in train, 2 in val" in out
    assert "2 of 6 images" in out
    resuming = ("train", "--resume", "--save_dir", tmp_path / "share")
    assert "had --seed 11, now it is 3" in refused(*resuming, "--seed", 3)
    assert "had --val_share 0.34, now it is 0.5" in refused(*resuming, "--val_share", 0.5)

    said = refused(
        *training(tmp_path / "set", tmp_path / "out", "--val_share", 0.2, "--val_split", "test")
    )
    assert "--val_split and --val_share both say what is scored on" in said


def test_labels_from_1_are_refused_and_shifted(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_split(tmp_path / "set", split, 2, first_label=1)
    said = refused(*training(tmp_path / "set", tmp_path / "out"))
    assert "labels up to 3 and no 0" in said
    assert "give --label_offset -1" in said
    done(*training(tmp_path / "set", tmp_path / "out", "--label_offset", -1))
    path = tmp_path / "out/best_epoch_weights.pth"

    # The checkpoint keeps what it was trained with, and a flag overrules it.
    out = done("eval", path, "--data", tmp_path / "set", *SHAPE)
    assert "2 in val; 0 ignored pixels" in out
    assert (
        "-1 is added to every label, as the checkpoint says (--label_offset overrules)" in out
    )
    evaluated = ("eval", path, "--data", tmp_path / "set", *SHAPE)
    assert "--label_offset -1" in refused(*evaluated, "--label_offset", 0)
    assert "0 ignored pixels" in done(*evaluated, "--label_offset", -1)


def test_a_set_without_splits_is_scored_whole(tmp_path: Path) -> None:
    for name in "abc":
        write_image(tmp_path / f"set/images/{name}.png", noise(32, 32, 3))
        write_mask(tmp_path / f"set/masks/{name}.png", noise(32, 32, high=3))
    done(*training(tmp_path / "set", tmp_path / "out", "--val_share", 0.3))
    out = done(
        "eval", tmp_path / "out/best_epoch_weights.pth", "--data", tmp_path / "set", *SHAPE
    )
    assert "has no splits, so all of its 3 images are scored" in " ".join(out.split())


@pytest.mark.parametrize(
    "flags", [("--val_share", 0.1), ("--val_split", "test"), ("--label_offset", -1)]
)
def test_flags_of_data_have_no_effect_on_prune_without_data(flags: tuple[object, ...]) -> None:
    assert (
        refused("prune", "--phi", "b0", *flags)
        == f"{flags[0]} has no effect without --data; leave it out."
    )
