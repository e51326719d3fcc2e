"""Which files `--images` stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from segprune.cli.calibration import places_in
from tests.data.drawn import write_image


def test_images_are_those_below_the_folder_without_what_tools_leave_there(tmp_path: Path) -> None:
    for name in ("b/1.png", "a.png", ".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png", "b/._1.png"):
        write_image(tmp_path / name)
    (tmp_path / "b/again").symlink_to(tmp_path)
    assert [str(path) for path in places_in(str(tmp_path))] == [f"{tmp_path}/a.png", f"{tmp_path}/b/1.png"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "@eaDir/a.png")
    with pytest.raises(FileNotFoundError, match=r"--images .* holds no picture"):
        places_in(str(tmp_path))
