"""Which files are seen in a folder: the one rule for data sets, inputs and calibration images."""

from __future__ import annotations

from pathlib import Path

import pytest

from segprune.data import open_source
from segprune.data.listing import find_first_file, is_hidden, list_by_stem, walk_folder
from tests.data.drawn import write_image, write_mask

HIDDEN = (
    ".ipynb_checkpoints",
    "@eaDir",
    "__MACOSX",
    ".git",
    "$RECYCLE.BIN",
    "System Volume Information",
)


def names_below(folder: Path, **options: object) -> list[str]:
    paths = []
    for parent, names in walk_folder(folder, **options):  # type: ignore[arg-type]
        paths += [str((Path(parent) / name).relative_to(folder)) for name in names]
    return paths


@pytest.mark.parametrize("name", [*HIDDEN, "._a.jpg", "Thumbs.db", "desktop.ini", ".DS_Store"])
def test_what_tools_and_systems_leave_behind_is_hidden(name: str) -> None:
    assert is_hidden(name)
    assert not is_hidden(f"my {name}")


def test_files_are_walked_in_order_without_those_that_are_hidden(tmp_path: Path) -> None:
    for name in ("b/2", "b/1", "a/x", "c", "._c", *(f"{folder}/c" for folder in HIDDEN)):
        write_image(tmp_path / f"{name}.png")
    assert names_below(tmp_path) == ["c.png", "a/x.png", "b/1.png", "b/2.png"]
    assert names_below(tmp_path, deep=False) == ["c.png"]
    assert names_below(tmp_path, skip=tmp_path / "b") == ["c.png", "a/x.png"]
    assert names_below(tmp_path / "nowhere") == []


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    write_image(tmp_path / "set/a/x.png")
    write_image(tmp_path / "elsewhere/y.png")
    (tmp_path / "set/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/own").symlink_to("own")
    assert names_below(tmp_path / "set") == ["own", "a/x.png", "again/y.png"]
    assert list(list_by_stem(tmp_path / "set", (".png",), deep=True)) == ["a/x", "again/y"]
    assert find_first_file(tmp_path / "set", (".png",)) == str(tmp_path / "set/a/x.png")


@pytest.mark.parametrize("name", HIDDEN)
def test_a_data_set_has_no_samples_in_hidden_folders(tmp_path: Path, name: str) -> None:
    for folder in ("train", f"train/{name}"):
        write_image(tmp_path / f"images/{folder}/a.png")
        write_mask(tmp_path / f"masks/{folder}/a.png")
    assert [sample.name for sample in open_source(tmp_path).split("train")] == ["a"]
