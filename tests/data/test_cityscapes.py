"""Cityscapes as downloaded: its folders, its label ids, its names and colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segprune.data import open_source
from tests.data.drawn import noise, write_image, write_mask

# label ids that are scored, in the order of their train ids (table 1 and the released label definitions)
SCORED = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def write_cityscapes(
    root: Path, kinds: tuple[str, ...] = ("labelIds", "labelTrainIds", "color")
) -> Path:
    for split, key in (
        ("train", "ulm/ulm_000000_000019"),
        ("train", "aachen/aachen_000001_000019"),
        ("val", "bonn/b"),
    ):
        write_image(root / f"leftImg8bit/{split}/{key}_leftImg8bit.png", noise(20, 30, 3))
        for number, kind in enumerate(kinds):
            labels = noise(20, 30, high=34, seed=number)
            write_mask(root / f"gtFine/{split}/{key}_gtFine_{kind}.png", labels)
    return root


@pytest.mark.parametrize("inside", ["", "cityscapes"])
def test_it_is_recognised_and_every_city_is_read(tmp_path: Path, inside: str) -> None:
    write_cityscapes(tmp_path / inside)
    source = open_source(tmp_path)
    assert (source.layout, source.root) == ("cityscapes", str(tmp_path / inside))
    assert [sample.name for sample in source.split("train")] == [
        "aachen_000001_000019",
        "ulm_000000_000019",
    ]
    assert [sample.name for sample in source.split("val")] == ["b"]


def test_label_ids_become_train_ids_and_all_others_are_ignored(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path)
    values = (np.arange(600) % 256).astype(np.uint8).reshape(20, 30)
    write_mask(root / "gtFine/val/bonn/b_gtFine_labelIds.png", values)
    labels = open_source(root).split("val")[0].load()[1]
    expected = [SCORED.index(value) if value in SCORED else 255 for value in values.flat]
    np.testing.assert_array_equal(labels.ravel(), expected)


def test_train_ids_are_taken_as_they_are_where_only_those_are_there(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path, ("labelTrainIds",))
    np.testing.assert_array_equal(
        open_source(root).split("val")[0].load()[1], noise(20, 30, high=34)
    )


def test_the_nineteen_classes_have_their_names_and_colours(tmp_path: Path) -> None:
    source = open_source(write_cityscapes(tmp_path))
    colours = {
        name: source.palette[3 * k : 3 * k + 3] for k, name in enumerate(source.class_names)
    }
    assert len(colours) == 19
    assert len(source.palette) == 768
    assert colours["road"] == (128, 64, 128)
    assert colours["person"] == (220, 20, 60)
    assert colours["bicycle"] == (119, 11, 32)
    assert list(colours).index("car") == 13


def test_what_was_not_unpacked_is_named(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path)
    mask = root / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png"
    mask.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=rf"Mask {mask} is missing \(1 of 2 masks are\); add it or remove its",
    ):
        open_source(root).split("train")
    (root / "gtFine").rename(root / "elsewhere")
    message = r"gtFine/val holds no CITY/\*_gtFine_labelIds\.png; unpack gtFine_trainvaltest\.zip into"
    with pytest.raises(FileNotFoundError, match=message):
        open_source(root).split("val")
    message = r"leftImg8bit/other holds no CITY/\*_leftImg8bit\.png; unpack leftImg8bit_trainvaltest\.zip .*another split"
    with pytest.raises(FileNotFoundError, match=message):
        open_source(root).split("other")
