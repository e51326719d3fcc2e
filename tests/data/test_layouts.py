"""Which layout a folder is taken for, and what is said where none fits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from segprune.data import LAYOUTS, Source, open_source
from tests.data.drawn import write_image, write_mask, write_voc


def test_the_layouts_are_those_of_the_manual() -> None:
    text = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    assert sorted(LAYOUTS) == ["ade20k", "camvid", "cityscapes", "folders", "hf", "list", "voc"]
    assert all(f"`{layout}`" in text for layout in LAYOUTS)


def test_an_unknown_layout_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    message = r"The layout 'coco' is unknown; choose one of voc, cityscapes, camvid, ade20k, list, folders, hf\."
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, "coco")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    message = r"nowhere does not exist; give a folder in one of the layouts voc, .*, or .* with `segprune shapes DIR`\."
    with pytest.raises(FileNotFoundError, match=message):
        open_source(tmp_path / "nowhere")


def test_a_folder_without_a_data_set_is_refused_with_all_that_was_looked_for(
    tmp_path: Path,
) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError) as raised:
        open_source(tmp_path)
    said = str(raised.value)
    assert said.startswith(
        f"{tmp_path} holds no data set in a known layout (looked for voc: JPEGImages/*.jpg, "
    )
    assert all(f"{layout}: " in said for layout in LAYOUTS)
    assert said.endswith(
        "); give such a folder, or write a generated one with `segprune shapes DIR`."
    )


@pytest.mark.parametrize("layout", ["voc", "cityscapes", "camvid", "ade20k", "list", "folders"])
def test_a_folder_that_is_not_in_the_layout_named_is_refused(
    tmp_path: Path, layout: str
) -> None:
    message = rf"holds no data set in the layout {layout} \(looked for {layout}: [^:]*\); give such a folder"
    with pytest.raises(FileNotFoundError, match=message):
        open_source(tmp_path, layout)


@pytest.mark.parametrize(
    ("name", "layout"), [("a.pth", None), ("a.pth", "list"), ("a.txt", "voc")]
)
def test_a_file_that_is_no_list_is_refused(
    tmp_path: Path, name: str, layout: str | None
) -> None:
    (tmp_path / name).write_text("")
    message = rf"{name} is a file, where a folder, or a list .* ends in \.txt, \.csv, \.tsv, \.lst, is allowed; give one"
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / name, layout)


def test_a_layout_that_is_named_is_taken_although_another_would_be_recognised(
    tmp_path: Path,
) -> None:
    write_voc(tmp_path)
    write_image(tmp_path / "images/train/x.png")
    write_mask(tmp_path / "masks/train/x.png")
    assert open_source(tmp_path).layout == "voc"
    assert [sample.name for sample in open_source(tmp_path, "folders").split("train")] == ["x"]


def test_two_openings_are_equal_and_a_source_says_what_it_is(tmp_path: Path) -> None:
    one, other = (
        open_source(write_voc(tmp_path) if first else tmp_path) for first in (True, False)
    )
    assert one == other
    assert isinstance(one, Source)
    assert repr(one).startswith(f"Source(layout='voc', root='{tmp_path}', class_names=()")


def test_files_are_listed_without_opening_one(tmp_path: Path) -> None:
    """10,000 empty files in at most five seconds of processor time; on an idle machine it takes a twentieth of one."""
    number = 5000
    for folder, extension in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (tmp_path / folder).mkdir()
        for k in range(number):
            (tmp_path / folder / f"{k:06d}.{extension}").touch()
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text(
        "".join(f"{k:06d}\n" for k in range(number))
    )
    start = time.process_time()
    assert len(open_source(tmp_path).split("train")) == number
    assert time.process_time() - start < 5
