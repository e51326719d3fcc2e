"""A few images without labels: found in a folder or a data set, spread evenly, letterboxed and normalised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segprune.data import letterbox, normalise, open_source, write_shapes
from segprune.data.unlabelled import batch_images, list_images, load_images
from tests.data.drawn import write_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images whose grey value is their number, one of them in a folder below, and a text."""
    for number in range(12):
        path = tmp_path / ("sub/11.PNG" if number == 11 else f"{number:02d}.png")
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 30, 3), number, dtype=np.uint8)).save(path)
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_the_images_of_a_folder_come_in_order_without_other_files(folder: Path) -> None:
    names = [Path(str(place)).relative_to(folder).as_posix() for place in list_images(folder)]
    assert names == [*(f"{number:02d}.png" for number in range(11)), "sub/11.PNG"]


def test_the_images_of_a_split_are_those_of_its_samples(tmp_path: Path) -> None:
    source = open_source(write_shapes(tmp_path, num_train=3, num_val=2, size=(32, 32)))
    assert list_images(source, "val") == [pair.image for pair in source.split("val")]
    assert len(list_images(source)) == 3


def test_what_tools_leave_in_a_folder_is_no_image(tmp_path: Path) -> None:
    for name in (
        "b/1.png",
        "a.png",
        ".ipynb_checkpoints/a-checkpoint.png",
        "@eaDir/a.png",
        "b/._1.png",
    ):
        write_image(tmp_path / name)
    (tmp_path / "b/again").symlink_to(tmp_path)
    assert [str(path) for path in list_images(tmp_path)] == [
        f"{tmp_path}/a.png",
        f"{tmp_path}/b/1.png",
    ]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "@eaDir/a.png")
    with pytest.raises(FileNotFoundError, match=r"holds no image; give a folder with \.jpg"):
        list_images(tmp_path)


@pytest.mark.parametrize(
    ("number", "chosen"),
    [(3, [0, 4, 8]), (5, [0, 2, 4, 7, 9]), (12, range(12)), (99, range(12))],
)
def test_some_of_many_are_spread_evenly(number: int, chosen: list[int], folder: Path) -> None:
    images = load_images(list_images(folder), number, (20, 30))
    assert [int(image[0, 0, 0]) for image in images] == [*chosen]


def test_images_are_letterboxed_and_normalised_in_batches_of_eight(folder: Path) -> None:
    places = list_images(folder)
    images = load_images(places, 12, (32, 64))
    expected = letterbox(np.asarray(Image.open(str(places[3]))), None, (32, 64))[0]
    assert np.array_equal(images[3], expected)
    batches = batch_images(images)
    assert [tuple(batch.shape) for batch in batches] == [(8, 3, 32, 64), (4, 3, 32, 64)]
    assert torch.equal(torch.cat(batches)[9], normalise(images[9]))
