"""What data sets without a val split are scored on."""

from __future__ import annotations

from pathlib import Path

import pytest

from segprune.data import (
    DataChoices,
    Source,
    check_labels,
    open_source,
    score_on,
    score_whole_pool,
    set_val_aside,
)
from tests.data.drawn import write_image, write_mask, write_voc


def write_folders(root: Path, names: list[str], split: str = "train") -> Source:
    for name in names:
        write_image(root / f"images/{split}/{name}.png")
        write_mask(root / f"masks/{split}/{name}.png")
    return open_source(root)


def names_in(source: Source, split: str) -> list[str]:
    return [sample.name for sample in source.split(split)]


def test_images_set_aside_are_no_longer_trained_on_and_the_same_with_the_same_seed(
    tmp_path: Path,
) -> None:
    names = [f"{number:03}" for number in range(40)]
    source = write_folders(tmp_path, names)
    divided = set_val_aside(source, 0.1, seed=1)
    assert len(names_in(divided, "val")) == 4
    assert sorted(names_in(divided, "train") + names_in(divided, "val")) == names
    assert names_in(set_val_aside(source, 0.1, seed=1), "val") == names_in(divided, "val")
    assert names_in(set_val_aside(source, 0.1, seed=2), "val") != names_in(divided, "val")
    report = check_labels(divided, 5)
    assert report.num_images == {"train": 36, "val": 4}
    assert "4 of 40 images" in report.notes[0]
    assert "one by one" in report.notes[0]


def test_whole_videos_are_set_aside_where_names_show_them(tmp_path: Path) -> None:
    names = [f"drive{drive}_{frame:04}" for drive in "abcdefgh" for frame in range(5)]
    for seed in range(5):
        divided = set_val_aside(write_folders(tmp_path, names), 0.1, seed)
        val, train = (
            {name.partition("_")[0] for name in names_in(divided, split)}
            for split in ("val", "train")
        )
        assert not val & train
        assert len(names_in(divided, "val")) in (5, 10)
        assert f"all of those named {min(val)}" in divided.notes[0]


def test_a_video_that_is_too_long_is_not_set_aside_whole(tmp_path: Path) -> None:
    names = [f"drive{drive}_{frame:04}" for drive in "ab" for frame in range(10)]
    divided = set_val_aside(write_folders(tmp_path, names), 0.1, seed=0)
    assert len(names_in(divided, "val")) == 2


def test_versions_of_one_image_stay_together(tmp_path: Path) -> None:
    names = [
        f"{number}_jpg.rf.{version}" for number in range(10) for version in ("0a1b", "ff00")
    ]
    divided = set_val_aside(write_folders(tmp_path, names), 0.1, seed=0)
    val, train = (
        {name.partition(".")[0] for name in names_in(divided, split)}
        for split in ("val", "train")
    )
    assert not val & train
    assert len(val) == 1


def test_another_split_can_be_scored_on_in_training(tmp_path: Path) -> None:
    write_folders(tmp_path, ["a"])
    source = score_on(write_folders(tmp_path, ["b"], "test"), "test")
    assert (names_in(source, "train"), names_in(source, "val")) == (["a"], ["b"])
    assert "1 images of test" in source.notes[0]
    with pytest.raises(FileNotFoundError, match="has no dev split"):
        score_on(source, "dev")


@pytest.mark.parametrize("share", [0, 1, -0.5, 2])
def test_a_share_out_of_range_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(
        ValueError, match=r"`val_share` is .*, where a share above 0 and below 1"
    ):
        set_val_aside(write_folders(tmp_path, ["a", "b"]), share, 0)


def test_a_share_of_a_set_that_has_a_val_split_or_one_image_is_refused(tmp_path: Path) -> None:
    source = write_folders(tmp_path, ["a"])
    with pytest.raises(ValueError, match="has 1 image"):
        set_val_aside(source, 0.1, 0)
    with pytest.raises(ValueError, match="has a val split; leave `val_share` out"):
        set_val_aside(write_folders(tmp_path, ["b"], "val"), 0.1, 0)


def test_a_set_without_any_split_is_scored_and_divided_whole(tmp_path: Path) -> None:
    for name in "abc":
        write_image(tmp_path / f"images/{name}.png")
        write_mask(tmp_path / f"masks/{name}.png")
    source = open_source(tmp_path)
    scored = score_whole_pool(source)
    assert names_in(scored, "val") == ["a", "b", "c"]
    assert "no splits, so all of its 3 images" in scored.notes[0]
    assert names_in(source, "all") == ["a", "b", "c"]
    divided = set_val_aside(source, 0.3, 0)
    assert sorted(names_in(divided, "train") + names_in(divided, "val")) == ["a", "b", "c"]


def test_a_set_with_other_splits_is_not_scored_whole(tmp_path: Path) -> None:
    source = open_source(write_voc(tmp_path))
    assert score_whole_pool(source) is source
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\n")
    assert names_in(score_whole_pool(source), "val") == ["a"]


def test_what_is_scored_on_is_chosen_in_one_way_only(tmp_path: Path) -> None:
    write_folders(tmp_path, ["a", "b"], "test")
    source = write_folders(tmp_path, ["c", "d"])
    assert names_in(DataChoices(val_split="test").apply(source), "val") == ["a", "b"]
    assert len(names_in(DataChoices(val_share=0.5, seed=3).apply(source), "val")) == 1
    assert DataChoices().apply(source) is source
    with pytest.raises(ValueError, match="`val_split` and `val_share` both say"):
        DataChoices(val_split="test", val_share=0.1)
