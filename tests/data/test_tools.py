"""Data sets as the tools that people draw and train with write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segprune.data import Source, open_source
from tests.data.drawn import noise, write_image, write_mask

COLOURS = ((0, 0, 0), (48, 112, 32), (176, 112, 32))


def write_pair(root: Path, image: str, mask: str) -> None:
    write_image(root / image)
    write_mask(root / mask)


def check(source: Source, layout: str, **names: list[str]) -> None:
    assert source.layout == layout
    for split, expected in names.items():
        assert [sample.name for sample in source.split(split)] == expected
        for sample in source.split(split):
            assert sample.load()[1].shape == (20, 30)


def test_roboflow_has_masks_beside_images_and_a_table_of_names_in_each_folder(
    tmp_path: Path,
) -> None:
    for folder, name in (("train", "a_jpg.rf.01"), ("valid", "b_jpg.rf.02")):
        write_pair(tmp_path / folder, f"{name}.jpg", f"{name}_mask.png")
        (tmp_path / folder / "_classes.csv").write_text(
            "Pixel Value, Class\n0, background\n2, house\n"
        )
    source = open_source(tmp_path)
    check(source, "folders", train=["a_jpg.rf.01"], val=["b_jpg.rf.02"])
    assert source.class_names == ("background", "", "house")
    write_image(tmp_path / "train/c.jpg")
    with pytest.raises(
        FileNotFoundError, match=r"Mask .*c_mask\.png is missing \(1 of 2 masks are\)"
    ):
        source.split("train")


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("img_dir/{}", "ann_dir/{}"),
        ("{}", "{}annot"),
        ("{}", "{}_labels"),
        ("{}_images", "{}_masks"),
        ("{}/img", "{}/gt"),
    ],
)
def test_folders_of_many_names_are_paired(tmp_path: Path, images: str, masks: str) -> None:
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        write_pair(
            tmp_path, f"{images.format(split)}/{name}.png", f"{masks.format(split)}/{name}.png"
        )
    check(open_source(tmp_path), "folders", train=["a"], val=["b"], test=["c"])


@pytest.mark.parametrize("masks", ["SegmentationClass", "SegmentationClassPNG"])
def test_labelme_s_voc_has_no_lists(tmp_path: Path, masks: str) -> None:
    for name in "ab":
        write_pair(tmp_path, f"JPEGImages/{name}.jpg", f"{masks}/{name}.png")
    (tmp_path / "class_names.txt").write_text("__ignore__\n_background_\nhouse\n")
    source = open_source(tmp_path)
    check(source, "voc", all=["a", "b"])
    assert source.class_names == ("_background_", "house")
    with pytest.raises(FileNotFoundError, match=r"val\.txt is missing, .*`val_share`"):
        source.split("val")


def test_cvat_s_voc_has_colours_and_one_list(tmp_path: Path) -> None:
    labels = {name: noise(20, 30, high=3, seed=seed) for seed, name in enumerate("ab")}
    for name, values in labels.items():
        write_image(tmp_path / f"JPEGImages/{name}.jpg")
        write_image(
            tmp_path / f"SegmentationClass/{name}.png",
            np.array(COLOURS, dtype=np.uint8)[values],
        )
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/default.txt").write_text("b\n")
    rows = [
        f"{name}:{','.join(map(str, colour))}::"
        for name, colour in zip("xyz", COLOURS, strict=True)
    ]
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\n" + "\n".join(rows) + "\n"
    )
    source = open_source(tmp_path)
    check(source, "voc", all=["b"])
    assert (source.class_names, source.palette[:9]) == (("x", "y", "z"), sum(COLOURS, ()))
    np.testing.assert_array_equal(source.split("all")[0].load_labels(), labels["b"])


@pytest.mark.parametrize("row", ["x:0,0", "x:0,0,300::", "x:a,b,c::", "x:0,0,0::\ny:0,0,0::"])
def test_a_table_of_colours_that_says_no_class_is_refused(tmp_path: Path, row: str) -> None:
    write_pair(tmp_path, "images/a.png", "masks/a.png")
    (tmp_path / "labelmap.txt").write_text(f"{row}\n")
    with pytest.raises(
        ValueError,
        match=r"labelmap\.txt gives the class '[xy]' the colour .*; correct the line or",
    ):
        open_source(tmp_path)


def test_a_class_dict_gives_colours_to_folders_and_lists(tmp_path: Path) -> None:
    labels = noise(20, 30, high=3)
    for split in ("train", "val"):
        write_image(tmp_path / f"{split}/0001TP_1.png")
        write_image(
            tmp_path / f"{split}_labels/0001TP_1_L.png",
            np.array(COLOURS, dtype=np.uint8)[labels],
        )
    rows = [
        f"{name},{','.join(map(str, colour))}"
        for name, colour in zip("xyz", COLOURS, strict=True)
    ]
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\n" + "\n".join(rows) + "\n")
    check(open_source(tmp_path), "folders", train=["0001TP_1"], val=["0001TP_1"])
    (tmp_path / "train.txt").write_text("train/0001TP_1.png train_labels/0001TP_1_L.png\n")
    check(open_source(tmp_path), "list", train=["0001TP_1"])
    np.testing.assert_array_equal(open_source(tmp_path).split("train")[0].load_labels(), labels)


def test_paddleseg_has_lists_beside_jpegimages(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("val", "b")):
        write_pair(tmp_path, f"JPEGImages/{name}.jpg", f"Annotations/{name}.png")
        (tmp_path / f"{split}_list.txt").write_text(
            f"JPEGImages/{name}.jpg Annotations/{name}.png\n"
        )
    (tmp_path / "labels.txt").write_text("ground\nhouse\n")
    check(open_source(tmp_path), "list", train=["a"], val=["b"])
    assert open_source(tmp_path).class_names == ("ground", "house")


def test_the_augmented_voc_has_lists_of_images_and_masks(tmp_path: Path) -> None:
    for name in "ab":
        write_pair(tmp_path, f"JPEGImages/{name}.jpg", f"SegmentationClassAug/{name}.png")
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    lines = {
        name: f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in "ab"
    }
    (lists / "train.txt").write_text(lines["b"] + lines["a"])
    (lists / "val.txt").write_text("a\n")
    check(open_source(tmp_path), "voc", train=["b", "a"], val=["a"])
    (tmp_path / "list").mkdir()
    (tmp_path / "list/train_aug.txt").write_text(lines["a"])
    (tmp_path / "list/val_aug.txt").write_text(lines["b"])
    source = open_source(tmp_path / "list/train_aug.txt")
    check(source, "list", train=["a"], val=["b"])
    assert str(tmp_path / "SegmentationClassAug/a.png") in source.notes[0]


@pytest.mark.parametrize(
    "lines",
    [
        "images\\a.png,masks\\a.png\r\nimages\\b.png,masks\\b.png\r\n",
        "C:\\data\\set\\images\\a.png\tC:\\data\\set\\masks\\a.png\nC:\\data\\set\\images\\b.png\tC:\\data\\set\\masks\\b.png\n",
        ",image,mask\n0,images/a.png,masks/a.png\n1,images/b.png,masks/b.png\n",
        "0,images/a.png,masks/a.png\n1,images/b.png,masks/b.png\n",
        "/home/me/set/images/a.png /home/me/set/masks/a.png\n/home/me/set/images/b.png /home/me/set/masks/b.png\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gbk"])
def test_lists_from_windows_pandas_and_other_machines_are_read(
    tmp_path: Path, lines: str, encoding: str
) -> None:
    for name in "ab":
        write_pair(tmp_path, f"images/{name}.png", f"masks/{name}.png")
    (tmp_path / "train.csv").write_bytes(lines.encode(encoding))
    source = open_source(tmp_path)
    check(source, "list", train=["a", "b"])
    assert bool(source.notes) == (":" in lines or "/home" in lines)


@pytest.mark.parametrize(
    "line", ["a", "a.jpg", "images/a.jpg", "D:\\set\\images\\a.jpg", "/data/images/train/a.jpg"]
)
def test_lists_of_names_may_say_paths(tmp_path: Path, line: str) -> None:
    write_pair(tmp_path, "images/a.jpg", "masks/a.png")
    write_pair(tmp_path, "images/b.jpg", "masks/b.png")
    (tmp_path / "train.txt").write_text(f"{line}\n")
    check(open_source(tmp_path), "folders", train=["a"])
    (tmp_path / "train.txt").write_text(f",image\n0,{line}\n")
    check(open_source(tmp_path), "folders", train=["a"])


@pytest.mark.parametrize("ending", ["_segmentation.png", "_L.png", ".gif", "-mask.png"])
def test_masks_have_the_endings_of_challenges(tmp_path: Path, ending: str) -> None:
    write_image(tmp_path / "images/train/a.jpg")
    mask = tmp_path / f"masks/train/a{ending}"
    mask.parent.mkdir(parents=True)
    Image.fromarray(noise(20, 30, high=5)).save(mask)
    check(open_source(tmp_path), "folders", train=["a"])
