"""The generated data set: reproducible, in VOC layout, with every class, and careful about other people's folders."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segprune.data import (
    CLASS_NAMES,
    CONTEXT_CLASS_NAMES,
    check_labels,
    draw_shapes,
    open_source,
    voc_palette,
    write_shapes,
)
from segprune.data.shapes import JPEG_QUALITY, inside_shape

SMALL = {"num_train": 3, "num_val": 2, "size": (32, 48)}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Stop(Exception):
    pass


def stop_at_three(done: int, total: int) -> None:
    if done == 3:
        raise Stop


def test_a_seed_gives_the_same_files_to_the_byte_and_another_seed_others(
    tmp_path: Path,
) -> None:
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        write_shapes(tmp_path / name, seed=seed, **SMALL)
    one, again, other = (contents(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again
    assert one.keys() == other.keys()
    pictures = [name for name in one if name.endswith((".jpg", ".png"))]
    assert len(pictures) == 10
    assert all(one[name] != other[name] for name in pictures)


def test_a_picture_does_not_depend_on_how_many_are_drawn(tmp_path: Path) -> None:
    few = contents(write_shapes(tmp_path / "few", seed=3, **SMALL))
    more = contents(
        write_shapes(tmp_path / "more", num_train=5, num_val=4, size=(32, 48), seed=3)
    )
    pictures = [name for name in few if name.endswith((".jpg", ".png"))]
    assert all(few[name] == more[name] for name in pictures)


def test_training_and_validation_pictures_differ(tmp_path: Path) -> None:
    files = contents(write_shapes(tmp_path, **SMALL))
    masks = [data for name, data in files.items() if name.startswith("SegmentationClass")]
    assert len(set(masks)) == len(masks) == 5


def test_the_set_is_in_voc_layout_with_jpegs_and_palette_masks(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "deep" / "set", **SMALL)
    source = open_source(tmp_path / "deep" / "set")
    assert root == tmp_path / "deep" / "set" / "VOCdevkit" / "VOC2007" == Path(source.root)
    assert (source.layout, source.class_names, source.palette) == (
        "voc",
        CLASS_NAMES,
        voc_palette(),
    )
    assert (root / "classes.txt").read_text().split() == list(CLASS_NAMES)
    names = {
        split: [sample.name for sample in source.split(split)] for split in ("train", "val")
    }
    assert names == {
        "train": ["train_00000", "train_00001", "train_00002"],
        "val": ["val_00000", "val_00001"],
    }
    for sample in source.split("train"):
        with Image.open(sample.image) as image, Image.open(sample.mask) as mask:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 32))
            assert (mask.format, mask.mode, mask.size) == ("PNG", "P", (48, 32))
            palette = mask.getpalette()
        assert palette is not None
        assert tuple(palette[:24]) == voc_palette()[:24]


def test_what_is_read_back_is_what_was_drawn(tmp_path: Path) -> None:
    root = write_shapes(tmp_path, seed=3, **SMALL)
    image, mask = open_source(root).split("val")[1].load()
    drawn, drawn_mask = draw_shapes(3, "val", 1, (32, 48))
    lossy = io.BytesIO()
    Image.fromarray(drawn).save(lossy, "jpeg", quality=JPEG_QUALITY)
    np.testing.assert_array_equal(mask, drawn_mask)
    np.testing.assert_array_equal(image, np.asarray(Image.open(lossy)))


def test_all_eight_classes_occur_and_the_check_has_nothing_to_say(tmp_path: Path) -> None:
    write_shapes(tmp_path, num_train=14, num_val=7, size=(64, 64))
    report = check_labels(open_source(tmp_path), len(CLASS_NAMES))
    assert len(CLASS_NAMES) == 8
    assert min(report.pixels) > 0
    assert report.ignored == 0
    assert report.notes == ()


def test_with_context_all_fourteen_classes_occur_and_a_ring_decides_which_the_others_are(
    tmp_path: Path,
) -> None:
    write_shapes(tmp_path, num_train=56, num_val=7, size=(64, 64), context=True)
    source = open_source(tmp_path)
    assert source.class_names == CONTEXT_CLASS_NAMES
    assert len(set(CONTEXT_CLASS_NAMES)) == 14
    report = check_labels(source, 14)
    assert min(report.pixels) > 0
    ring, seen = CLASS_NAMES.index("ring"), set()
    for index in range(56):
        _, mask = draw_shapes(11, "train", index, (64, 64), context=True)
        labels = set(np.unique(mask)) - {0}
        plain, beside_a_ring = (
            {k for k in labels if k < 8 and k != ring},
            {k for k in labels if k >= 8},
        )
        assert not (plain and (beside_a_ring or ring in labels))
        seen |= {(bool(plain), bool(beside_a_ring), ring in labels)}
    assert {(True, False, False), (False, True, True)} <= seen


def test_the_class_whose_turn_it_is_can_be_seen() -> None:
    for index in range(21):
        _, mask = draw_shapes(11, "train", index, (128, 128))
        assert (mask == index % 7 + 1).mean() > 0.01


@pytest.mark.parametrize("name", CLASS_NAMES[1:])
def test_every_shape_has_the_unit_disc_s_area_and_reaches_no_further_than_it_is_drawn(
    name: str,
) -> None:
    axis = np.linspace(-2, 2, 801, dtype=np.float32)
    v, u = np.meshgrid(axis, axis, indexing="ij")
    inside = inside_shape(name, u, v)
    assert inside.mean() * 16 == pytest.approx(np.pi, rel=0.02)
    assert np.hypot(u, v)[inside].max() <= 1.6


def test_the_shapes_are_seven_different_ones() -> None:
    axis = np.linspace(-2, 2, 201, dtype=np.float32)
    v, u = np.meshgrid(axis, axis, indexing="ij")
    inside = [inside_shape(name, u, v) for name in CLASS_NAMES[1:]]
    for i, one in enumerate(inside):
        for other in inside[:i]:
            assert (one & other).sum() / (one | other).sum() < 0.9


def test_a_picture_below_32_pixels_and_numbers_below_their_least_are_refused(
    tmp_path: Path,
) -> None:
    for wrong in (
        {"num_train": 0},
        {"num_val": 0},
        {"size": (31, 64)},
        {"size": (64, 31)},
        {"seed": -1},
    ):
        with pytest.raises(
            ValueError,
            match=r"came, where at least 1, 1, \(32, 32\) and 0 are allowed; give larger",
        ):
            write_shapes(tmp_path / "set", **{**SMALL, **wrong})
    assert not (tmp_path / "set").exists()


def test_a_foreign_folder_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(
        ValueError,
        match=r"exists and is no generated data set, where a new or empty folder is allowed",
    ):
        write_shapes(tmp_path, **SMALL)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_a_foreign_data_set_and_a_file_are_left_as_they_are(tmp_path: Path) -> None:
    foreign = tmp_path / "set" / "VOCdevkit" / "VOC2007"
    foreign.mkdir(parents=True)
    (foreign / "classes.txt").write_text("background\nthesis\n")
    (tmp_path / "file").write_text("mine")
    for name in ("set", "file"):
        before = contents(tmp_path)
        with pytest.raises(
            ValueError,
            match=rf"{name} exists and is no generated data set.*; choose another name",
        ):
            write_shapes(tmp_path / name, **SMALL)
        assert contents(tmp_path) == before


def test_an_empty_folder_and_an_earlier_set_are_written_over(tmp_path: Path) -> None:
    write_shapes(tmp_path, num_train=4, num_val=2, size=(48, 32), seed=1)
    root = write_shapes(tmp_path, seed=2, **SMALL)
    assert len(open_source(root).split("train")) == 3
    np.testing.assert_array_equal(
        open_source(root).split("val")[0].load()[1], draw_shapes(2, "val", 0, (32, 48))[1]
    )


def test_an_interrupted_run_leaves_no_lists_and_can_be_run_again(tmp_path: Path) -> None:
    lists = write_shapes(tmp_path, seed=1, **SMALL) / "ImageSets" / "Segmentation"
    with pytest.raises(Stop):
        write_shapes(tmp_path, seed=2, progress=stop_at_three, **SMALL)
    assert list(lists.iterdir()) == []
    write_shapes(tmp_path, seed=2, **SMALL)
    write_shapes(tmp_path.with_name("fresh"), seed=2, **SMALL)
    assert contents(tmp_path) == contents(tmp_path.with_name("fresh"))


def test_progress_counts_every_picture(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_shapes(tmp_path, progress=lambda done, total: seen.append((done, total)), **SMALL)
    assert seen == [(done, 5) for done in range(1, 6)]
