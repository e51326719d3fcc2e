"""Reading of VOC folders, against pictures and lists written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segprune.data import EvalTransform, Sample, TrainTransform, VocDataset, find_root, normalise
from segprune.data.voc import load_image, load_mask, load_pair, opened, read_split, voc_palette

ORIENTATION = 0x0112

# the colours that the development kit's documentation lists for background and the 20 classes
VOC_COLOURS = """
0 0 0    128 0 0    0 128 0    128 128 0    0 0 128    128 0 128    0 128 128    128 128 128    64 0 0    192 0 0
64 128 0    192 128 0    64 0 128    192 0 128    64 128 128    192 128 128    0 64 0    128 64 0    0 192 0
128 192 0    0 64 128
"""


def noise(*shape: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape, dtype=np.uint8)


def write_voc(root: Path, names: tuple[str, ...] = ("a", "b"), size: tuple[int, int] = (20, 30)) -> Path:
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for number, name in enumerate(names):
        Image.fromarray(noise(*size, 3) ^ np.uint8(number)).save(root / "JPEGImages" / f"{name}.png")
        Image.fromarray(noise(*size, high=8)).save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def sample_of(folder: Path, image: np.ndarray, mask: np.ndarray, orientation: int = 1) -> Sample:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    sample = Sample("x", folder / "image.png", folder / "mask.png")
    Image.fromarray(image).save(sample.image, exif=exif)
    Image.fromarray(mask).save(sample.mask)
    return sample


@pytest.mark.parametrize("inside", ["", "VOC2012", "VOCdevkit/VOC2007", "VOCmine"])
def test_the_root_is_found_from_the_folder_itself_and_from_those_around_it(tmp_path: Path, inside: str) -> None:
    write_voc(tmp_path / inside)
    assert find_root(tmp_path) == tmp_path / inside
    assert find_root(str(tmp_path)) == tmp_path / inside


def test_a_folder_around_takes_no_voc_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "VOC2006").mkdir()
    write_voc(tmp_path / "VOC2007")
    assert find_root(tmp_path) == tmp_path / "VOC2007"


def test_several_data_sets_are_refused_by_name(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOCdevkit/VOC2007")
    write_voc(tmp_path / "VOCdevkit/VOC2012")
    with pytest.raises(ValueError, match=r"VOCdevkit holds several data sets \(VOC2007, VOC2012\); give the path"):
        find_root(tmp_path)


def test_a_folder_without_a_data_set_and_no_folder_at_all_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no data set in VOC layout; give a folder that holds JPEGImages"):
        find_root(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder; .*`segprune shapes DIR`"):
        find_root(tmp_path / "nowhere")


def test_a_split_is_read_in_the_order_of_its_list(tmp_path: Path) -> None:
    root = write_voc(tmp_path, ("a", "b", "c"))
    (root / "ImageSets/Segmentation/val.txt").write_text("c\n\n  a \r\n")
    samples = read_split(root, "val")
    assert [sample.name for sample in samples] == ["c", "a"]
    assert samples[0] == Sample("c", root / "JPEGImages/c.png", root / "SegmentationClass/c.png")


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "ImageSets/Segmentation/val.txt").write_bytes(b"\xef\xbb\xbfb\n")
    assert read_split(root, "val")[0].name == "b"


def test_of_two_pictures_of_one_name_the_jpeg_is_read(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    Image.fromarray(noise(20, 30, 3)).save(root / "JPEGImages/a.JPG", format="jpeg")
    assert read_split(root, "train")[0].image == root / "JPEGImages/a.JPG"


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"val\.txt is missing, the list .* write it with one image name per"):
        read_split(root, "val")


def test_a_list_that_names_nothing_is_refused(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "ImageSets/Segmentation/val.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match=r"val\.txt lists no image; write one image name per line"):
        read_split(root, "val")


def test_a_list_in_another_encoding_is_refused(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "ImageSets/Segmentation/val.txt").write_bytes("größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"val\.txt is not UTF-8 text, the only encoding read; save it as UTF-8"):
        read_split(root, "val")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("JPEGImages", r"Image .*b\.jpg is missing \(1 of 2 images of train\.txt are\); add it or take its name off"),
        ("SegmentationClass", r"Mask .*b\.png is missing \(1 of 2 masks of train\.txt are\); add it or take its name"),
    ],
)
def test_a_missing_picture_is_named_and_counted(tmp_path: Path, folder: str, message: str) -> None:
    root = write_voc(tmp_path)
    (root / folder / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=message):
        read_split(root, "train")


def test_a_folder_without_masks_counts_every_mask_as_missing(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "SegmentationClass").rename(root / "masks")
    with pytest.raises(FileNotFoundError, match=r"a\.png is missing \(2 of 2 masks"):
        read_split(root, "train")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_an_image_of_any_eight_bit_mode_becomes_the_rgb_that_pillow_says(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(noise(20, 30, 3)).convert(mode)
    image.save(tmp_path / "x.png")
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), expected)


def test_a_palette_with_transparency_is_read_by_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(noise(20, 30, high=4))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    image.save(tmp_path / "x.png", transparency=b"\x00\x80\xff\xff")
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), 30 * noise(20, 30, 1, high=4) + [10, 20, 30])


def test_an_image_of_sixteen_bits_is_refused(tmp_path: Path) -> None:
    Image.fromarray(noise(20, 30).astype(np.uint16) * 257).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"Image .*x\.png has mode I;16, where 8 bits per channel are allowed; save"):
        load_image(tmp_path / "x.png")


def test_a_mask_is_its_grey_value_or_palette_index(tmp_path: Path) -> None:
    labels = noise(20, 30)
    grey, indexed = Image.fromarray(labels), Image.fromarray(labels)
    indexed.putpalette(voc_palette())
    grey.save(tmp_path / "grey.png")
    indexed.save(tmp_path / "indexed.png")
    Image.fromarray(labels > 9).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "grey.png"), labels)
    np.testing.assert_array_equal(load_mask(tmp_path / "indexed.png"), labels)
    np.testing.assert_array_equal(load_mask(tmp_path / "bits.png"), labels > 9)


@pytest.mark.parametrize("mode", ["RGB", "LA", "RGBA"])
def test_a_coloured_mask_is_refused(tmp_path: Path, mode: str) -> None:
    Image.fromarray(noise(20, 30, 3)).convert(mode).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=rf"x\.png has mode {mode}, where an 8-bit grey .* convert its colours to"):
        load_mask(tmp_path / "x.png")


def test_a_file_that_is_missing_cut_short_or_no_picture_is_named(tmp_path: Path) -> None:
    whole, cut, text = (tmp_path / name for name in ("whole.png", "cut.png", "text.png"))
    Image.fromarray(noise(20, 30, 3)).save(whole)
    cut.write_bytes(whole.read_bytes()[:300])
    text.write_text("no picture")
    for path in (cut, text):
        with pytest.raises(ValueError, match=rf"{path.name} cannot be read as an image \(.+\); replace or remove"):
            load_image(path)
    with pytest.raises(FileNotFoundError, match=r"gone\.png is missing; give the path of an image"):
        load_image(tmp_path / "gone.png")


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with (
        pytest.raises(ValueError, match=r"cannot be read as an image .*decompression bomb"),
        opened(tmp_path / "x.png"),
    ):
        pass


def test_a_pair_of_different_sizes_is_refused_with_both_sizes(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, noise(20, 30, 3), noise(21, 30))
    with pytest.raises(ValueError, match=r"image\.png is 20x30 but mask .*mask\.png is 21x30 \(HxW\), .* export the"):
        load_pair(sample)


@pytest.mark.parametrize(("orientation", "quarter_turns"), [(6, -1), (8, 1)])
def test_an_orientation_is_applied_where_only_the_turned_picture_fits(
    tmp_path: Path, orientation: int, quarter_turns: int
) -> None:
    stored = noise(20, 30, 3)
    sample = sample_of(tmp_path, stored, noise(30, 20), orientation)
    np.testing.assert_array_equal(load_pair(sample)[0], np.rot90(stored, quarter_turns))


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_orientation_is_left_alone_where_the_stored_picture_fits(tmp_path: Path, orientation: int) -> None:
    stored = noise(20, 30, 3)
    sample = sample_of(tmp_path, stored, noise(20, 30), orientation)
    np.testing.assert_array_equal(load_pair(sample)[0], stored)


def test_a_turned_picture_that_fits_neither_way_is_refused(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, noise(20, 30, 3), noise(30, 21), 6)
    with pytest.raises(ValueError, match=r"is 20x30 but mask .* is 30x21"):
        load_pair(sample)


def test_the_data_set_serves_normalised_pixels_and_labels_below_num_classes(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    data = VocDataset(tmp_path, "train", 5, EvalTransform((20, 30)))
    pixels, labels = data[1]
    mask = load_mask(root / "SegmentationClass/b.png").astype(np.int64)
    assert len(data) == 2
    assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(pixels, normalise(load_image(root / "JPEGImages/b.png")))
    assert mask.max() == 7
    assert torch.equal(labels, torch.from_numpy(np.where(mask >= 5, 255, mask)))


def test_what_the_data_set_draws_follows_from_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    write_voc(tmp_path)
    one, again, other = (VocDataset(tmp_path, "train", 8, TrainTransform((32, 32)), seed=s) for s in (1, 1, 2))
    first = one[0]
    later = one[1]
    torch.rand(3)
    assert torch.equal(again[1][0], later[0])
    assert torch.equal(again[0][0], first[0])
    assert torch.equal(again[0][1], first[1])
    assert not torch.equal(other[0][0], first[0])
    again.set_epoch(1)
    assert not torch.equal(again[0][0], first[0])
    again.set_epoch(0)
    assert torch.equal(again[0][0], first[0])


def test_two_pictures_of_one_epoch_are_changed_differently(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "ImageSets/Segmentation/train.txt").write_text("a\na\n")
    data = VocDataset(tmp_path, "train", 8, TrainTransform((32, 32)))
    assert not torch.equal(data[0][0], data[1][0])


def test_the_palette_is_pascal_voc_s() -> None:
    palette = voc_palette()
    assert palette[: 3 * 21] == [int(value) for value in VOC_COLOURS.split()]
    assert palette[-3:] == [224, 224, 192]  # the border, drawn with 255
    assert len({tuple(palette[i : i + 3]) for i in range(0, 768, 3)}) == 256
