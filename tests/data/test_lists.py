"""Two-column lists, in a folder or given themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segprune.data import open_source, voc_palette
from tests.data.drawn import write_image, write_mask

TRAIN = "pics/b.png labels/b.png\npics/a.png labels/a.png\n"
VAL = "pics/c.png labels/c.png\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in "abc":
        write_image(tmp_path / f"pics/{name}.png")
        write_mask(tmp_path / f"labels/{name}.png")
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "val.txt").write_text(VAL)
    return tmp_path


def test_a_folder_with_two_lists_and_each_list_alone_are_the_same_data_set(root: Path) -> None:
    for place in (root, root / "train.txt", root / "val.txt"):
        source = open_source(place)
        assert source.layout == "list"
        assert [sample.name for sample in source.split("train")] == ["b", "a"]
        assert [sample.name for sample in source.split("val")] == ["c"]
        image, labels = source.split("val")[0].load()
        np.testing.assert_array_equal(image, write_image(root / "pics/c.png"))
        np.testing.assert_array_equal(labels, write_mask(root / "labels/c.png"))


@pytest.mark.parametrize("separator", [" ", "\t", ",", ", ", "   "])
@pytest.mark.parametrize("heading", ["", "image{}mask\n"])
def test_columns_are_separated_by_blanks_tabs_or_commas(
    root: Path, separator: str, heading: str
) -> None:
    (root / "train.txt").write_text(heading.format(separator) + TRAIN.replace(" ", separator))
    assert [sample.name for sample in open_source(root).split("train")] == ["b", "a"]


def test_a_tab_or_comma_lets_names_hold_blanks(root: Path) -> None:
    write_image(root / "my pics/größe 1.png")
    (root / "train.txt").write_text('"my pics/größe 1.png","labels/a.png"\n', encoding="utf-8")
    assert [sample.name for sample in open_source(root).split("train")] == ["größe 1"]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("my_train.csv", "my_val.csv"),
        ("first.lst", "validation.lst"),
        ("training.tsv", "val.tsv"),
    ],
)
def test_lists_of_other_names_find_each_other(root: Path, train: str, val: str) -> None:
    (root / "train.txt").rename(root / train)
    (root / "val.txt").rename(root / val)
    source = open_source(root / train)
    assert [len(source.split(split)) for split in ("train", "val")] == [2, 1]


def test_absolute_paths_are_taken_as_they_are(root: Path, tmp_path: Path) -> None:
    lists = tmp_path / "elsewhere"
    lists.mkdir()
    (lists / "train.txt").write_text(f"{root}/pics/a.png {root}/labels/a.png\n")
    assert str(open_source(lists).split("train")[0]) == f"{root}/pics/a.png"


def test_equal_file_names_are_told_apart_by_their_folders_and_stay_inside(root: Path) -> None:
    for name in ("pics/a", "more/a", "more/b"):
        write_image(root / f"{name}.png")
    (root / "lists").mkdir()
    (root / "lists/train.txt").write_text(
        f"../pics/a.png ../labels/a.png\n{root}/more/a.png ../labels/a.png\n../pics/a.png ../labels/a.png\n"
    )
    inside = str(root).lstrip("/")
    assert [sample.name for sample in open_source(root / "lists").split("train")] == [
        "pics/a",
        f"{inside}/more/a",
        "pics/a (2)",
    ]


def test_names_come_from_classes_txt_and_the_palette_from_the_first_mask(root: Path) -> None:
    (root / "classes.txt").write_text("ground\nhouse\n")
    assert open_source(root / "train.txt").class_names == ("ground", "house")
    assert open_source(root).palette == voc_palette()
    write_mask(root / "labels/b.png", palette=(9, 8, 7))
    assert open_source(root).palette == (9, 8, 7, *voc_palette()[3:])


def test_without_a_list_to_score_on_it_is_said_what_to_do(root: Path) -> None:
    (root / "val.txt").unlink()
    with pytest.raises(FileNotFoundError) as raised:
        open_source(root).split("val")
    said = str(raised.value)
    assert said.startswith(f"{root}/val.txt is missing, the list of the val split; ")
    assert "take them off the other list" in said
    assert "`val_share` 0.1" in said
    with pytest.raises(
        FileNotFoundError,
        match=r"test\.txt is missing, .* with an image and its mask on each line\.$",
    ):
        open_source(root).split("test")


def test_an_empty_list_is_refused(root: Path) -> None:
    (root / "val.txt").write_text("\n\n")
    with pytest.raises(
        ValueError, match=r"val\.txt lists no image; write an image and its mask on each line\."
    ):
        open_source(root).split("val")


@pytest.mark.parametrize(
    ("line", "found"), [("pics/a.png", "1 column"), ("a b c", "3 columns")]
)
def test_a_line_that_has_not_two_columns_is_named_by_its_number(
    root: Path, line: str, found: str
) -> None:
    (root / "train.txt").write_text(f"{TRAIN}\n{line}\n")
    message = rf"Line 4 of .*train\.txt has {found}, where an image and its mask are allowed; separate them by a blank"
    with pytest.raises(ValueError, match=message):
        open_source(root).split("train")


def test_a_missing_file_is_named_and_counted(root: Path) -> None:
    (root / "labels/a.png").unlink()
    message = r"labels/a\.png is missing \(1 of 4 files in .*train\.txt are\); paths are relative to the list's folder"
    with pytest.raises(FileNotFoundError, match=message):
        open_source(root).split("train")


def test_a_list_of_names_with_a_blank_is_no_two_column_list(tmp_path: Path) -> None:
    write_image(tmp_path / "images/my photo.png")
    write_mask(tmp_path / "masks/my photo.png")
    (tmp_path / "train.txt").write_text("my photo\n")
    source = open_source(tmp_path)
    assert (source.layout, [sample.name for sample in source.split("train")]) == (
        "folders",
        ["my photo"],
    )
