"""VOC folders, against pictures and lists written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segprune.data import open_source, voc_palette
from tests.data.drawn import noise, write_image, write_mask, write_voc


@pytest.mark.parametrize("inside", ["", "VOC2012", "VOCdevkit/VOC2007", "VOCmine"])
def test_the_root_is_found_from_the_folder_itself_and_from_those_around_it(
    tmp_path: Path, inside: str
) -> None:
    write_voc(tmp_path / inside)
    for folder in (tmp_path, str(tmp_path)):
        source = open_source(folder)
        assert (source.layout, source.root) == ("voc", str(tmp_path / inside))


def test_a_folder_around_takes_no_voc_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "VOC2006").mkdir()
    write_voc(tmp_path / "VOC2007")
    assert open_source(tmp_path).root == str(tmp_path / "VOC2007")


def test_several_data_sets_are_refused_by_name(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOCdevkit/VOC2007")
    write_voc(tmp_path / "VOCdevkit/VOC2012")
    with pytest.raises(
        ValueError,
        match=r"VOCdevkit holds several data sets \(VOC2007, VOC2012\); give the path",
    ):
        open_source(tmp_path)


def test_a_split_is_read_in_the_order_of_its_list(tmp_path: Path) -> None:
    root = write_voc(tmp_path, ("a", "b", "c"))
    (root / "ImageSets/Segmentation/mine.txt").write_text("c\n\n  a \r\n")
    samples = open_source(root).split("mine")
    assert [sample.name for sample in samples] == ["c", "a"]
    assert [str(sample) for sample in samples] == [
        str(root / "JPEGImages/c.png"),
        str(root / "JPEGImages/a.png"),
    ]
    image, labels = samples[0].load()
    np.testing.assert_array_equal(image, write_image(tmp_path / "c.png"))
    np.testing.assert_array_equal(labels, write_mask(tmp_path / "c.png"))


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "ImageSets/Segmentation/val.txt").write_bytes(b"\xef\xbb\xbfb\n")
    assert open_source(root).split("val")[0].name == "b"


def test_names_that_are_not_ascii_are_read(tmp_path: Path) -> None:
    names = ("größe", "画像 1", "снимок")
    root = write_voc(tmp_path / "данные", names)
    samples = open_source(root).split("train")
    assert [sample.name for sample in samples] == list(names)
    for sample in samples:
        np.testing.assert_array_equal(
            sample.load()[0], write_image(tmp_path / f"{sample.name}.png")
        )


def test_a_name_that_is_listed_twice_is_two_samples_of_different_names(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\na\n")
    assert [sample.name for sample in open_source(root).split("train")] == ["a", "b", "a (2)"]


def test_of_two_pictures_of_one_name_the_jpeg_is_read(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    write_image(root / "JPEGImages/a.JPG", noise(20, 30, 3))
    assert str(open_source(root).split("train")[0]) == str(root / "JPEGImages/a.JPG")


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    source = open_source(write_voc(tmp_path))
    with pytest.raises(
        FileNotFoundError,
        match=r"val\.txt is missing, the list .* write it with one image name per",
    ):
        source.split("val")


def test_a_list_that_names_nothing_is_refused(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "ImageSets/Segmentation/val.txt").write_text("\n  \n")
    with pytest.raises(
        ValueError, match=r"val\.txt lists no image; write one image name per line"
    ):
        open_source(root).split("val")


def test_lists_in_gbk_and_utf_16_are_read_and_other_encodings_named(tmp_path: Path) -> None:
    root = write_voc(tmp_path, ("街景", "a"))
    path = root / "ImageSets/Segmentation/val.txt"
    for encoding in ("gbk", "utf-16"):
        path.write_bytes("街景\n".encode(encoding))
        assert [sample.name for sample in open_source(root).split("val")] == ["街景"]
    path.write_bytes("größe\n".encode("latin-1"))
    with pytest.raises(
        FileNotFoundError,
        match=r"is missing \(1 of 1 images of val\.txt are; .*val\.txt is not UTF-8",
    ):
        open_source(root).split("val")
    path.write_bytes(b"\xff\n")
    with pytest.raises(
        ValueError, match=r"val\.txt is neither UTF-8 nor GBK text, .*; save it as UTF-8"
    ):
        open_source(root).split("val")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (
            "JPEGImages",
            r"Image .*b\.jpg is missing \(1 of 2 images of train\.txt are\); add it or take its name off",
        ),
        (
            "SegmentationClass",
            r"Mask .*b\.png is missing \(1 of 2 masks of train\.txt are\); add it or take its name",
        ),
    ],
)
def test_a_missing_picture_is_named_and_counted(
    tmp_path: Path, folder: str, message: str
) -> None:
    root = write_voc(tmp_path)
    (root / folder / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=message):
        open_source(root).split("train")


def test_a_folder_without_masks_counts_every_mask_as_missing(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "SegmentationClass").rename(root / "other")
    with pytest.raises(FileNotFoundError, match=r"a\.png is missing \(2 of 2 masks"):
        open_source(root).split("train")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("sky\nsea\n", ("sky", "sea")),
        ("sky\n\nsea \n\n\n", ("sky", "", "sea")),
        ("\ufeff背景\r\n", ("背景",)),
        ("", ()),
        (None, ()),
    ],
)
def test_class_k_is_named_by_line_k_of_classes_txt(
    tmp_path: Path, text: str | None, names: tuple[str, ...]
) -> None:
    root = write_voc(tmp_path)
    if text is not None:
        (root / "classes.txt").write_text(text, encoding="utf-8", newline="")
    assert open_source(root).class_names == names


def test_the_palette_is_the_masks_own_or_pascal_voc_s(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    assert open_source(root).palette == voc_palette()
    write_mask(root / "SegmentationClass/a.png", palette=(1, 2, 3, 40, 50, 60))
    assert open_source(root).palette == (1, 2, 3, 40, 50, 60, *voc_palette()[6:])
    write_mask(
        root / "SegmentationClass/a.png",
        palette=tuple(value for grey in range(256) for value in [grey] * 3),
    )
    assert open_source(root).palette == voc_palette()
    (root / "SegmentationClass/a.png").write_bytes(b"no picture")
    assert open_source(root).palette == voc_palette()
