"""`segprune shapes`: a folder that the other commands take, and the command it suggests."""

import re
import shlex
from pathlib import Path

import pytest

from segprune.data import check_labels, open_source
from tests.commands import HERE, done, refused


def test_the_suggested_command_trains_on_what_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "my shapes"
    out = done("shapes", folder, "--num_train", 4, "--num_val", 2, "--size", 32, 32)
    assert out.startswith(f"6 images, 8 classes, in {folder}")
    suggested = re.search(r"Train on them: segprune (train .+)", out)
    assert suggested
    assert check_labels(open_source(folder), 8).num_images == {"train": 4, "val": 2}
    out = done(
        *shlex.split(suggested[1]), "--epochs", 1, *HERE, "--save_dir", tmp_path / "logs"
    )
    assert f"Saved: {tmp_path}/logs/best_epoch_weights.pth" in out


def test_with_context_there_are_fourteen_classes(tmp_path: Path) -> None:
    out = done(
        "shapes", tmp_path, "--num_train", 4, "--num_val", 2, "--size", 32, 32, "--with_context"
    )
    assert "6 images, 14 classes, in " in out
    assert "--num_classes 14 " in out


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        done(
            "shapes",
            tmp_path / name,
            "--num_train",
            1,
            "--num_val",
            1,
            "--size",
            32,
            48,
            "--seed",
            seed,
        )
        paths = sorted(
            path for path in (tmp_path / name).rglob("*") if path.suffix in (".jpg", ".png")
        )
        files.append([path.read_bytes() for path in paths])
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(
    "flags", [("--num_train", 0), ("--num_val", 0), ("--size", 0, 32), ("--seed", -1)]
)
def test_a_number_that_is_too_small_is_refused(
    flags: tuple[object, ...], tmp_path: Path
) -> None:
    said = refused("shapes", tmp_path / "new", *flags)
    assert said.endswith(
        "came, where at least 1, 1, (32, 32) and 0 are allowed; give larger ones."
    )
    assert not (tmp_path / "new").exists()


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    said = refused("shapes", tmp_path, "--num_train", 1, "--num_val", 1)
    assert said == (
        f"{tmp_path} exists and is no generated data set, where a new or empty folder is allowed; choose another name."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_file_where_the_folder_should_be_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said = refused("shapes", tmp_path / "file" / "new", "--num_train", 1, "--num_val", 1)
    assert said.startswith(f"{tmp_path}/file/new")
    assert said.endswith(
        "Not a directory; give another place, or check that it exists, is yours and has free space."
    )
