"""Image and mask folders with matching names, in each of their shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segprune.data import open_source, voc_palette
from tests.data.drawn import noise, write_image, write_mask


def names_in(source: object) -> dict[str, list[str]]:
    return {
        split: [sample.name for sample in source.split(split)] for split in ("train", "val")
    }  # type: ignore[attr-defined]


def write_split_folders(root: Path, image: str, mask: str) -> None:
    """Two pairs to train on and one to score; the folders' names have a place for the split's."""
    for split, name in (("train", "b"), ("train", "a"), ("val", "c")):
        write_image(root / image.format(split) / f"{name}.jpg", noise(20, 30, 3))
        write_mask(root / mask.format(split) / f"{name}.png")


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{}", "masks/{}"),
        ("Images/{}", "Labels/{}"),
        ("img/{}", "annotations/{}"),
        ("{}/images", "{}/masks"),
        ("{}/image", "{}/label"),
    ],
)
def test_folders_per_split_are_recognised_either_way_round(
    tmp_path: Path, image: str, mask: str
) -> None:
    write_split_folders(tmp_path, image, mask)
    source = open_source(tmp_path)
    assert (source.layout, source.root, source.class_names) == ("folders", str(tmp_path), ())
    assert names_in(source) == {"train": ["a", "b"], "val": ["c"]}
    sample = source.split("val")[0]
    assert str(sample) == str(tmp_path / image.format("val") / "c.jpg")
    np.testing.assert_array_equal(sample.load()[1], write_mask(tmp_path / "c.png"))


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_a_split_s_folder_may_have_its_longer_names(tmp_path: Path, name: str) -> None:
    for split in ("train", name):
        write_image(tmp_path / "images" / split / "a.png")
        write_mask(tmp_path / "masks" / split / "a.png")
    assert names_in(open_source(tmp_path)) == {"train": ["a"], "val": ["a"]}


def test_lists_choose_and_order_the_pictures_of_one_folder(tmp_path: Path) -> None:
    for name in "abcd":
        write_image(tmp_path / f"images/{name}.png")
        write_mask(tmp_path / f"masks/{name}.png")
    (tmp_path / "train.txt").write_text("c\n\na.png\n")
    (tmp_path / "val.txt").write_text("d\n")
    assert names_in(open_source(tmp_path)) == {"train": ["c", "a"], "val": ["d"]}
    (tmp_path / "val.txt").write_text("e\n")
    with pytest.raises(
        FileNotFoundError,
        match=r"Image .*images/e\.jpg is missing \(1 of 1 images of val\.txt are\)",
    ):
        open_source(tmp_path).split("val")
    (tmp_path / "val.txt").write_text("\n")
    with pytest.raises(
        ValueError, match=r"val\.txt lists no image; write one image name per line"
    ):
        open_source(tmp_path).split("val")


@pytest.mark.parametrize("ending", ["_mask", "_label", "_labels", "_gt", "_seg"])
def test_a_mask_s_name_may_end_in_what_it_is(tmp_path: Path, ending: str) -> None:
    write_image(tmp_path / "images/train/a.jpg")
    write_mask(tmp_path / f"masks/train/a{ending}.png")
    assert str(open_source(tmp_path).split("train")[0].mask) == str(
        tmp_path / f"masks/train/a{ending}.png"
    )


def test_pictures_in_deeper_folders_match_by_their_whole_way(tmp_path: Path) -> None:
    for city in ("köln", "paris"):
        write_image(tmp_path / f"images/train/{city}/1.png")
        write_mask(tmp_path / f"masks/train/{city}/1.png")
    samples = open_source(tmp_path).split("train")
    assert [sample.name for sample in samples] == ["köln/1", "paris/1"]
    assert [str(sample.mask) for sample in samples] == [
        str(tmp_path / f"masks/train/{city}/1.png") for city in ("köln", "paris")
    ]


def test_hidden_files_and_other_files_are_no_pictures(tmp_path: Path) -> None:
    write_split_folders(tmp_path, "images/{}", "masks/{}")
    write_image(tmp_path / "images/train/._a.jpg", noise(20, 30, 3))
    (tmp_path / "images/train/Thumbs.db").write_text("")
    (tmp_path / "masks/train/notes.txt").write_text("")
    assert [sample.name for sample in open_source(tmp_path).split("train")] == ["a", "b"]


def test_names_and_palette_come_from_classes_txt_and_the_first_mask(tmp_path: Path) -> None:
    write_split_folders(tmp_path, "{}/images", "{}/masks")
    (tmp_path / "classes.txt").write_text("ground\nhouse\n")
    assert open_source(tmp_path).class_names == ("ground", "house")
    assert open_source(tmp_path).palette == voc_palette()
    write_mask(tmp_path / "train/masks/a.png", palette=(9, 8, 7))
    assert open_source(tmp_path).palette == (9, 8, 7, *voc_palette()[3:])


def test_without_a_validation_split_it_is_said_what_to_do(tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/a.png")
    write_mask(tmp_path / "masks/train/a.png")
    with pytest.raises(FileNotFoundError) as raised:
        open_source(tmp_path).split("val")
    said = str(raised.value)
    assert said.startswith(
        f"{tmp_path} has no val split (neither a folder val nor valid nor validation nor a list val.txt)"
    )
    assert "`val_share` 0.1" in said
    assert "images/val and masks/val" in said
    assert f"{tmp_path}/val.txt" in said


def test_folders_without_any_split_are_refused_with_the_way_to_one(tmp_path: Path) -> None:
    write_image(tmp_path / "images/a.png")
    write_mask(tmp_path / "masks/a.png")
    with pytest.raises(
        FileNotFoundError,
        match=r"has no train split .*`val_share` 0.1 .* move its images into images/train and masks/",
    ):
        open_source(tmp_path).split("train")


def test_an_image_without_a_mask_and_a_mask_without_an_image_are_named_and_counted(
    tmp_path: Path,
) -> None:
    write_split_folders(tmp_path, "images/{}", "masks/{}")
    (tmp_path / "masks/train/b.png").rename(tmp_path / "masks/train/z.png")
    message = r"Mask .*masks/train/b\.png is missing \(1 of 2 masks are\); add it or remove its partner\."
    with pytest.raises(FileNotFoundError, match=message):
        open_source(tmp_path).split("train")
    (tmp_path / "images/train/b.jpg").unlink()
    message = r"Mask .*z\.png has no image of its name in .*images/train \(1 of 2 masks have none\); add it, remove"
    with pytest.raises(FileNotFoundError, match=message):
        open_source(tmp_path).split("train")


def test_a_split_with_images_and_without_a_folder_of_masks_is_refused(tmp_path: Path) -> None:
    write_split_folders(tmp_path, "images/{}", "masks/{}")
    (tmp_path / "masks/val/c.png").unlink()
    (tmp_path / "masks/val").rmdir()
    with pytest.raises(
        FileNotFoundError, match=r"Mask .*masks/val/c\.png is missing \(1 of 1 masks are\)"
    ):
        open_source(tmp_path).split("val")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    write_split_folders(tmp_path, "images/{}", "masks/{}")
    (tmp_path / "images/val/c.jpg").unlink()
    with pytest.raises(
        ValueError,
        match=r"images/val holds no image \(\.jpg, .*\); put the split's images there\.",
    ):
        open_source(tmp_path).split("val")


def test_masks_in_jpeg_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/a.jpg")
    write_image(tmp_path / "masks/train/a.jpg")
    with pytest.raises(
        ValueError,
        match=r"holds JPEG masks, and JPEG changes the labels; save the masks as PNG\.",
    ):
        open_source(tmp_path).split("train")
