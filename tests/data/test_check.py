"""The label check, on folders with one mistake each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segprune.data import LabelReport, open_source, shift_labels
from segprune.data import check_labels as check_source

SIZE = (20, 30)


def check_labels(root: Path, num_classes: int, **options: Any) -> LabelReport:
    return check_source(open_source(root), num_classes, **options)


def write_pair(root: Path, name: str, labels: np.ndarray, orientation: int = 1) -> None:
    """A picture of SIZE as stored, and its mask."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", SIZE[::-1]).save(root / "JPEGImages" / f"{name}.png", exif=exif)
    Image.fromarray(labels.astype(np.uint8)).save(root / "SegmentationClass" / f"{name}.png")


def labels_of(*values: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A mask that holds the first value everywhere but in the first pixels, which hold one of the others each."""
    mask = np.full(size, values[0], dtype=np.uint8)
    mask[0, : len(values) - 1] = values[1:]
    return mask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pairs of training and one of validation; with four classes all is well."""
    root = tmp_path / "VOC2007"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for name, values in {"a": (0, 1, 2), "b": (0, 3, 255), "c": (1,), "d": (2, 0)}.items():
        write_pair(root, name, labels_of(*values))
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\nc\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("d\n")
    return root


def test_a_good_folder_is_counted_pixel_by_pixel(root: Path) -> None:
    expected = LabelReport(
        num_images={"train": 3, "val": 1},
        pixels=(598 + 598 + 1, 1 + 600, 1 + 599, 1),
        ignored=1,
        absent=(),
        notes=(),
    )
    assert check_labels(root.parent, 4) == expected


def test_progress_counts_every_mask(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    check_labels(root, 4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_split_can_be_checked_alone(root: Path) -> None:
    report = check_labels(root, 4, splits=("val",))
    assert report.num_images == {"val": 1}
    assert report.pixels == (1, 0, 599, 0)


@pytest.mark.parametrize("num_classes", [0, -3, 256])
def test_a_number_of_classes_that_a_mask_cannot_hold_is_refused(
    root: Path, num_classes: int
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"`num_classes` is {num_classes}, where 1\.\.255 is allowed; label 255 is ig",
    ):
        check_labels(root, num_classes)


def test_255_classes_fill_a_byte(root: Path) -> None:
    write_pair(root, "c", labels_of(254, 255))
    report = check_labels(root, 255)
    assert (report.pixels[254], report.ignored) == (599, 2)


def test_a_label_above_num_classes_is_refused_with_its_file_and_all_such_files_counted(
    root: Path,
) -> None:
    write_pair(root, "b", labels_of(0, 9))
    write_pair(root, "d", labels_of(7, 8))
    message = (
        f"Mask {root / 'SegmentationClass/b.png'} holds the label 9, where 0..3 and 255 (ignored) are allowed with 4 "
        "classes; raise `num_classes` or relabel the masks (2 of 4 files have such labels)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_labels(root, 4)


def test_of_many_wrong_labels_the_first_five_are_listed(root: Path) -> None:
    write_pair(root, "a", labels_of(0, 10, 11, 12, 13, 14))
    with pytest.raises(ValueError, match=r"holds the labels 10, 11, 12, 13, 14, where"):
        check_labels(root, 4)
    write_pair(root, "a", labels_of(0, 10, 11, 12, 13, 14, 15))
    with pytest.raises(ValueError, match=r"holds the labels 10, 11, 12, 13, 14, …, where"):
        check_labels(root, 4)


def test_the_label_num_classes_is_ignored_with_a_note(root: Path) -> None:
    report = check_labels(root, 3)
    assert report.pixels == (1197, 601, 600)
    assert report.ignored == 2
    assert report.notes == (
        "The label 3 = num_classes is ignored (1 masks, 0.0 % of all pixels); if it is a class, num_classes must be 4.",
    )


def test_of_a_network_that_is_there_no_other_number_of_classes_is_asked_for(root: Path) -> None:
    assert check_labels(root, 3, trained=True).notes == (
        "The label 3 = num_classes is ignored (1 masks, 0.0 % of all pixels); "
        "if it is a class, the network needs 4 of them.",
    )
    with pytest.raises(
        ValueError,
        match="; relabel the masks, or give a network that was trained for these classes ",
    ):
        check_labels(root, 2, trained=True)


def test_a_class_without_a_pixel_in_the_first_split_is_noted(root: Path) -> None:
    write_pair(root, "d", labels_of(4))
    report = check_labels(root, 6)
    assert report.absent == (4, 5)
    assert report.pixels[4] == 600
    assert report.notes == (
        "Without a pixel in the masks of train, so never learnt: class 4, 5.",
    )


def test_masks_painted_with_255_are_refused(root: Path) -> None:
    for name in "abc":
        write_pair(root, name, labels_of(0, 255) if name != "c" else labels_of(0))
    message = (
        f"Mask {root / 'SegmentationClass/a.png'} and all others hold only 0 and 255, where the pixel value must be "
        "the class and 255 is ignored; paint the object 1 instead of 255 (2 of 3 masks hold 255)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_labels(root, 4)


def test_one_class_beside_255_is_enough_to_be_no_painting_mistake(root: Path) -> None:
    for name in "ab":
        write_pair(root, name, labels_of(0, 255))
    assert check_labels(root, 4).ignored == 2


def test_with_one_class_nothing_but_0_and_255_is_as_it_should_be(root: Path) -> None:
    for name in "abcd":
        write_pair(root, name, labels_of(0, 255))
    assert check_labels(root, 1).pixels == (4 * 599,)


def test_masks_of_background_alone_are_no_painting_mistake(root: Path) -> None:
    for name in "abc":
        write_pair(root, name, labels_of(0))
    assert check_labels(root, 4).absent == (1, 2, 3)


def test_a_coloured_mask_is_refused_and_counted(root: Path) -> None:
    for name in "bd":
        Image.new("RGB", SIZE[::-1], (9, 8, 7)).save(root / "SegmentationClass" / f"{name}.png")
    with pytest.raises(
        ValueError,
        match=r"b\.png has mode RGB and .* \(2 of 4 files have a mask that cannot be used\)\.$",
    ):
        check_labels(root, 4)


def test_a_mask_of_another_size_is_refused(root: Path) -> None:
    write_pair(root, "c", labels_of(1, size=(30, 20)))
    with pytest.raises(
        ValueError,
        match=r"c\.png is 20x30 but mask .* is 30x20 .* \(1 of 4 files have a mask of another size\)\.$",
    ):
        check_labels(root, 4)


def test_an_image_that_cannot_be_read_is_refused(root: Path) -> None:
    (root / "JPEGImages/d.png").write_bytes(b"no picture")
    with pytest.raises(
        ValueError,
        match=r"d\.png cannot be read as .* \(1 of 4 files have an image that cannot be",
    ):
        check_labels(root, 4)


def test_of_several_kinds_of_mistakes_the_first_met_is_told(root: Path) -> None:
    write_pair(root, "b", labels_of(0, 9))
    Image.new("RGB", SIZE[::-1], (9, 8, 7)).save(root / "SegmentationClass/c.png")
    with pytest.raises(ValueError, match=r"label 9, .* \(1 of 4 files have such labels\)\.$"):
        check_labels(root, 4)


def test_a_missing_mask_is_refused(root: Path) -> None:
    (root / "SegmentationClass/b.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"Mask .*b\.png is missing \(1 of 3 masks of train\.txt are\)"
    ):
        check_labels(root, 4)


@pytest.mark.parametrize("size", [SIZE, SIZE[::-1]])
def test_an_image_with_an_orientation_is_noted_and_fits_stored_or_turned(
    root: Path, size: tuple[int, int]
) -> None:
    write_pair(root, "c", labels_of(1, size=size), orientation=6)
    (note,) = check_labels(root, 4).notes
    assert re.match(
        r"1 images carry an EXIF orientation \(.*c\.png first\) and are read as stored unless only",
        note,
    )


def test_a_half_turn_does_not_make_a_turned_mask_fit(root: Path) -> None:
    write_pair(root, "c", labels_of(1, size=SIZE[::-1]), orientation=3)
    with pytest.raises(ValueError, match="files have a mask of another size"):
        check_labels(root, 4)


def test_classes_numbered_from_1_are_refused_with_the_remedy_which_works(root: Path) -> None:
    for name, values in {"a": (1, 2, 3), "b": (1, 4, 255), "c": (2,), "d": (3, 1)}.items():
        write_pair(root, name, labels_of(*values))
    with pytest.raises(
        ValueError,
        match=r"labels up to 4 and no 0, where 4 classes .* to 3; give `label_offset` -1",
    ):
        check_labels(root, 4)
    report = check_source(shift_labels(open_source(root), -1), 4)
    assert report.pixels == (598 + 598 + 1, 1 + 600, 1 + 599, 1)
    assert (report.ignored, report.notes) == (1, ())


def test_a_split_without_a_pixel_to_score_is_refused_before_training(root: Path) -> None:
    write_pair(root, "d", labels_of(255, 4))
    with pytest.raises(
        ValueError, match=r"Every pixel in the 1 masks of val is ignored .* use another split"
    ):
        check_labels(root, 4)
