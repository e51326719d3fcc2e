"""CamVid, against images, masks and lists written by hand under the names of its videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segprune.data import check_labels, open_source
from tests.data.drawn import noise, write_image, write_mask

NAMES = {
    "train": ("0001TP_006690", "0006R0_f00930"),
    "val": ("0016E5_07959",),
    "test": ("Seq05VD_f00000",),
}


def write_camvid(root: Path, lists: bool = True, ending: str = ".png") -> Path:
    for split, names in NAMES.items():
        for name in names:
            write_image(root / f"{split}/{name}{ending}")
            write_mask(root / f"{split}annot/{name}.png", noise(20, 30, high=12))
        if lists:
            start = "/SegNet/CamVid"
            lines = [
                f"{start}/{split}/{name}{ending} {start}/{split}annot/{name}.png\n"
                for name in names
            ]
            (root / f"{split}.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("ending", [".png", ".jpg"])
@pytest.mark.parametrize("inside", ["", "CamVid"])
def test_it_is_read_as_segnet_s_authors_prepared_it(
    tmp_path: Path, lists: bool, ending: str, inside: str
) -> None:
    root = write_camvid(tmp_path / inside, lists, ending)
    source = open_source(tmp_path)
    assert (source.layout, source.root, len(source.class_names)) == ("camvid", str(root), 11)
    assert (source.class_names[0], source.palette[:3]) == ("sky", (128, 128, 128))
    assert (source.class_names[10], source.palette[30:33]) == ("bicyclist", (0, 128, 192))
    for split, names in NAMES.items():
        samples = source.split(split)
        assert [sample.name for sample in samples] == list(names)
        assert str(samples[0]) == str(root / f"{split}/{names[0]}{ending}")


def test_void_is_ignored_and_other_labels_are_what_they_are(tmp_path: Path) -> None:
    root = write_camvid(tmp_path)
    labels = open_source(root).split("train")[0].load_labels()
    values = noise(20, 30, high=12)
    np.testing.assert_array_equal(labels, np.where(values == 11, 255, values))
    report = check_labels(open_source(root), 11, ("train", "val", "test"))
    assert report.num_images == {"train": 2, "val": 1, "test": 1}
    assert report.ignored == 4 * int((values == 11).sum())
    assert report.notes == ()


def test_a_list_chooses_and_orders(tmp_path: Path) -> None:
    root = write_camvid(tmp_path)
    lines = (root / "train.txt").read_text().splitlines()
    (root / "train.txt").write_text(f"{lines[1]}\n")
    assert [sample.name for sample in open_source(root).split("train")] == ["0006R0_f00930"]


def test_other_sets_of_that_shape_are_not_taken_for_it_unless_it_is_named(
    tmp_path: Path,
) -> None:
    write_image(tmp_path / "train/a.png")
    write_mask(tmp_path / "trainannot/a.png")
    assert open_source(tmp_path).layout == "folders"
    assert open_source(tmp_path, "camvid").layout == "camvid"
    with pytest.raises(
        FileNotFoundError, match=r"has no val split; give one of train, val and test"
    ):
        open_source(tmp_path, "camvid").split("val")
