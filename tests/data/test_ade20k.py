"""ADE20K as downloaded: its folders, its labels, its names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segprune.data import check_labels, open_source, voc_palette
from tests.data.drawn import noise, write_image, write_mask

INFO = "Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t11664\t1172\twall\n2\t0.1\t6046\t612\tbuilding, edifice\n"


def write_ade(root: Path) -> Path:
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        write_image(root / f"images/{split}/{name}.jpg")
        write_mask(root / f"annotations/{split}/{name}.png", noise(20, 30, high=151))
    (root / "objectInfo150.txt").write_text(INFO)
    return root


@pytest.mark.parametrize("inside", ["", "ADEChallengeData2016"])
def test_it_is_recognised_by_its_list_of_objects_and_named_by_it(
    tmp_path: Path, inside: str
) -> None:
    write_ade(tmp_path / inside)
    source = open_source(tmp_path)
    assert (source.layout, source.root) == ("ade20k", str(tmp_path / inside))
    assert source.class_names == ("wall", "building")
    assert source.palette == voc_palette()
    names = {
        split: [sample.name for sample in source.split(split)] for split in ("train", "val")
    }
    assert names == {"train": ["ADE_train_00000001"], "val": ["ADE_val_00000001"]}


def test_the_label_0_is_ignored_and_n_becomes_n_minus_1(tmp_path: Path) -> None:
    root = write_ade(tmp_path)
    values = write_mask(
        root / "annotations/training/ADE_train_00000001.png",
        (np.arange(600) % 256).astype(np.uint8).reshape(20, 30),
    )
    labels = open_source(root).split("train")[0].load_labels()
    values = values.astype(int)
    np.testing.assert_array_equal(
        labels, np.where((values == 0) | (values == 255), 255, values - 1)
    )


def test_a_download_without_its_list_is_recognised_by_its_folder_s_name_and_has_no_names(
    tmp_path: Path,
) -> None:
    root = write_ade(tmp_path / "ADEChallengeData2016")
    (root / "objectInfo150.txt").unlink()
    for folder in (root, tmp_path):
        assert (open_source(folder).layout, open_source(folder).class_names) == ("ade20k", ())


def test_such_folders_without_name_and_list_could_be_anything_and_the_user_is_asked(
    tmp_path: Path,
) -> None:
    root = write_ade(tmp_path / "mine")
    (root / "objectInfo150.txt").unlink()
    message = r"has the folders of ADE20K but no objectInfo150\.txt, .* give the layout ade20k .* or folders \(n is class"
    with pytest.raises(ValueError, match=message):
        open_source(root)
    raw = open_source(root, "folders").split("train")[0].load_labels()
    reduced = open_source(root, "ade20k").split("train")[0].load_labels()
    np.testing.assert_array_equal(
        reduced.astype(int), np.where(raw == 0, 255, raw.astype(int) - 1)
    )


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    message = (
        r"has no test split in both images and annotations; download .* or give another split\."
    )
    with pytest.raises(FileNotFoundError, match=message):
        open_source(write_ade(tmp_path)).split("test")


def test_the_label_check_counts_labels_as_they_are_trained_and_says_so(tmp_path: Path) -> None:
    root = write_ade(tmp_path)
    mask = root / "annotations/training/ADE_train_00000001.png"
    write_mask(
        mask, np.repeat(np.array([[0, 1, 2, 255]], dtype=np.uint8), 150, 0).reshape(20, 30)
    )
    source = open_source(root)
    report = check_labels(source, 150, ("train",))
    assert (report.pixels[:3], report.ignored) == ((150, 150, 0), 300)
    write_mask(mask, np.full((20, 30), 160, dtype=np.uint8))
    message = r"holds the label 159 \(as the layout ade20k numbers them\), where 0\.\.149 and 255 \(ignored\) are allowed"
    with pytest.raises(ValueError, match=message):
        check_labels(source, 150, ("train",))


def test_one_class_alone_beside_what_is_ignored_is_no_painting_mistake(tmp_path: Path) -> None:
    root = write_ade(tmp_path)
    write_mask(root / "annotations/training/ADE_train_00000001.png", noise(20, 30, high=2))
    assert check_labels(open_source(root), 150, ("train",)).pixels[0] > 0
