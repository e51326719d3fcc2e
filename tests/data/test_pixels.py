"""Encoded pictures become the arrays that Pillow, the numbers themselves, or a written oracle say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from segprune.data import Pair, SampleError, load_image, load_mask, voc_palette
from segprune.data.pixels import read_header
from tests.data.drawn import noise, write_image, write_mask

# the colours that the development kit's documentation lists for background and the 20 classes
VOC_COLOURS = """
0 0 0    128 0 0    0 128 0    128 128 0    0 0 128    128 0 128    0 128 128    128 128 128    64 0 0    192 0 0
64 128 0    192 128 0    64 0 128    192 0 128    64 128 128    192 128 128    0 64 0    128 64 0    0 192 0
128 192 0    0 64 128
"""


def pair_of(folder: Path, image: np.ndarray, mask: np.ndarray, orientation: int = 1) -> Pair:
    write_image(folder / "image.png", image, orientation)
    write_mask(folder / "mask.png", mask)
    return Pair("x", folder / "image.png", folder / "mask.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P"])
def test_an_image_of_any_eight_bit_mode_becomes_the_rgb_that_pillow_says(
    tmp_path: Path, mode: str
) -> None:
    image = Image.fromarray(noise(20, 30, 3)).convert(mode)
    image.save(tmp_path / "x.png")
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), expected)


def test_a_cmyk_jpeg_and_tiff_become_rgb(tmp_path: Path) -> None:
    plain = np.full((16, 16, 3), (200, 40, 90), dtype=np.uint8)
    cmyk = Image.fromarray(plain).convert("CMYK")
    cmyk.save(tmp_path / "x.tif")
    cmyk.save(tmp_path / "x.jpg", quality=100)
    np.testing.assert_array_equal(load_image(tmp_path / "x.tif"), plain)
    np.testing.assert_allclose(load_image(tmp_path / "x.jpg"), plain, atol=3)


def test_transparency_does_not_change_the_colours(tmp_path: Path) -> None:
    pixels = noise(20, 30, 4)
    write_image(tmp_path / "x.png", pixels)
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), pixels[..., :3])


def test_a_palette_with_transparency_is_read_by_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(noise(20, 30, high=4))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    image.save(tmp_path / "x.png", transparency=b"\x00\x80\xff\xff")
    np.testing.assert_array_equal(
        load_image(tmp_path / "x.png"), 30 * noise(20, 30, 1, high=4) + [10, 20, 30]
    )


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bits_are_scaled_by_their_full_range(tmp_path: Path, name: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    values[0, :4] = (0, 65535, 128, 129)
    Image.fromarray(values).save(tmp_path / name)
    grey = load_image(tmp_path / name)
    assert grey.dtype == np.uint8
    assert grey[0, :4].tolist() == [[0] * 3, [255] * 3, [0] * 3, [1] * 3]
    np.testing.assert_array_equal(
        grey, np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, 2)
    )


def test_a_grey_picture_of_eight_bits_saved_with_sixteen_is_read_alike(tmp_path: Path) -> None:
    write_image(tmp_path / "8.png", noise(20, 30))
    Image.fromarray(noise(20, 30).astype(np.uint16) * 257).save(tmp_path / "16.png")
    np.testing.assert_array_equal(
        load_image(tmp_path / "16.png"), load_image(tmp_path / "8.png")
    )


def test_sixteen_bits_in_a_file_of_thirty_two_are_read_alike(tmp_path: Path) -> None:
    values = noise(20, 30).astype(np.uint16) * 257
    values[0, :2] = (0, 65535)
    Image.fromarray(values).save(tmp_path / "16.tif")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "32.tif")
    np.testing.assert_array_equal(
        load_image(tmp_path / "32.tif"), load_image(tmp_path / "16.tif")
    )


@pytest.mark.parametrize(("value", "said"), [(-1, "from -1 to 0"), (65536, "from 0 to 65536")])
def test_an_image_of_more_than_sixteen_bits_is_refused(
    value: int, said: str, tmp_path: Path
) -> None:
    values = np.zeros((20, 30), dtype=np.int32)
    values[3, 4] = value
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(
        SampleError,
        match=rf"x\.tif holds values {said}, where 0\.\.65535 is allowed; save it as 8-bit",
    ):
        load_image(tmp_path / "x.tif")


def test_an_image_of_floating_point_numbers_is_refused(tmp_path: Path) -> None:
    Image.fromarray(noise(20, 30)).convert("F").save(tmp_path / "x.tif")
    with pytest.raises(
        SampleError,
        match=r"Image .*x\.tif has mode F, where 8 or 16 bits .*; save it as 8-bit RGB\.",
    ):
        load_image(tmp_path / "x.tif")


def test_a_mask_is_its_grey_value_or_palette_index(tmp_path: Path) -> None:
    labels = noise(20, 30)
    write_mask(tmp_path / "grey.png", labels)
    write_mask(tmp_path / "indexed.png", labels, palette=voc_palette())
    Image.fromarray(labels > 9).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "grey.png"), labels)
    np.testing.assert_array_equal(load_mask(tmp_path / "indexed.png"), labels)
    np.testing.assert_array_equal(load_mask(tmp_path / "bits.png"), labels > 9)


@pytest.mark.parametrize(
    ("name", "kind"), [("x.png", np.uint16), ("x.tif", np.uint16), ("x.tif", np.int32)]
)
def test_a_mask_with_more_bits_is_read_if_its_values_fit(
    tmp_path: Path, name: str, kind: type
) -> None:
    labels = noise(20, 30)
    Image.fromarray(labels.astype(kind)).save(tmp_path / name)
    read = load_mask(tmp_path / name)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, labels)
    Image.fromarray(labels.astype(kind) + kind(26001)).save(tmp_path / name)
    with pytest.raises(
        SampleError,
        match=r"holds the value 26256, where 0\.\.255 is allowed; number the classes from",
    ):
        load_mask(tmp_path / name)


def test_a_mask_with_values_below_zero_is_refused(tmp_path: Path) -> None:
    Image.fromarray(noise(20, 30).astype(np.int32) - 1).save(tmp_path / "x.tif")
    with pytest.raises(
        SampleError,
        match=r"x\.tif holds the value -1, where 0\.\.255 is allowed; .* ignored 255\.",
    ):
        load_mask(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_coloured_mask_is_refused_with_its_colours_and_what_explains_them(
    tmp_path: Path, mode: str
) -> None:
    Image.new("RGB", (3, 2), (48, 112, 32)).convert(mode).save(tmp_path / "x.png")
    with pytest.raises(
        SampleError,
        match=rf"x\.png has mode {mode} and 1 colours \(\(48,112,32\)\), .* labelmap\.txt",
    ):
        load_mask(tmp_path / "x.png")


@pytest.mark.parametrize(
    "kind", ["equal", "equal with alpha", "grey with alpha", "red", "red with alpha", "gif"]
)
def test_a_mask_whose_classes_lie_in_one_channel_is_read(tmp_path: Path, kind: str) -> None:
    labels = noise(20, 30, high=9)
    zero, alpha = np.zeros_like(labels), np.full_like(labels, 255)
    channels = {
        "equal": [labels] * 3,
        "equal with alpha": [*[labels] * 3, alpha],
        "grey with alpha": [labels, alpha],
        "red": [labels, zero, zero],
        "red with alpha": [labels, zero, zero, alpha],
        "gif": [labels],
    }[kind]
    path = tmp_path / ("x.gif" if kind == "gif" else "x.png")
    Image.fromarray(np.dstack(channels).squeeze()).save(path)
    np.testing.assert_array_equal(load_mask(path), labels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_table_of_colours_says_the_classes_of_a_coloured_mask(
    tmp_path: Path, mode: str
) -> None:
    colours = ((0, 0, 0), (48, 112, 32), (176, 112, 32))
    labels = noise(20, 30, high=3)
    painted = Image.fromarray(np.array(colours, dtype=np.uint8)[labels])
    (painted.quantize(8) if mode == "P" else painted.convert(mode)).save(tmp_path / "x.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "x.png", colours), labels)
    num_wrong = int((labels == 2).sum())
    with pytest.raises(
        SampleError,
        match=rf"holds the colour 176,112,32 \({num_wrong} pixels .* the 2 colours of",
    ):
        load_mask(tmp_path / "x.png", colours[:2])


def test_a_grey_mask_holds_classes_beside_a_table_of_colours_too(tmp_path: Path) -> None:
    labels = write_mask(tmp_path / "x.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "x.png", ((9, 9, 9),)), labels)


@pytest.mark.parametrize("name", ["x.tif", "x.gif", "x.png", "x.webp"])
def test_a_file_of_several_pages_is_named(tmp_path: Path, name: str) -> None:
    pages = [Image.fromarray(noise(20, 30, 3, seed=seed)) for seed in range(3)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    for load in (load_image, load_mask, read_header):
        with pytest.raises(
            SampleError, match=rf"{name} holds 3 pages or frames, .* each as a file of its own"
        ):
            load(tmp_path / name)


def test_smaller_copies_inside_of_a_tiff_are_no_pages(tmp_path: Path) -> None:
    """As geographic information systems store them."""
    pixels = noise(20, 30, 3)
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "x.tif", True) as writer:
        Image.fromarray(pixels).save(writer, format="TIFF")
        writer.newFrame()
        Image.fromarray(pixels[::2, ::2]).save(writer, format="TIFF", tiffinfo={254: 1})
    with Image.open(tmp_path / "x.tif") as image:
        assert getattr(image, "n_frames", 1) == 2
    np.testing.assert_array_equal(load_image(tmp_path / "x.tif"), pixels)


def test_the_preview_in_a_camera_s_file_is_no_page(tmp_path: Path) -> None:
    pixels = np.full((16, 16, 3), (200, 40, 90), dtype=np.uint8)
    preview = Image.fromarray(pixels[::2, ::2])
    Image.fromarray(pixels).save(
        tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[preview], quality=100
    )
    np.testing.assert_allclose(load_image(tmp_path / "x.jpg"), pixels, atol=3)


def test_a_file_that_is_missing_cut_short_or_no_picture_is_named_with_the_way_on(
    tmp_path: Path,
) -> None:
    whole, cut, text = (tmp_path / name for name in ("whole.png", "cut.png", "text.png"))
    write_image(whole, noise(20, 30, 3))
    cut.write_bytes(whole.read_bytes()[:300])
    text.write_text("no picture")
    for path in (cut, text):
        with pytest.raises(
            SampleError,
            match=rf"{path.name} cannot be read as an image \(.+\); replace it, or leave ",
        ):
            load_image(path)
    with pytest.raises(
        SampleError,
        match=r"gone\.png is missing; put it back, or leave it out with `skip_bad`\.",
    ):
        load_image(tmp_path / "gone.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged metadata
def test_whatever_bytes_a_picture_holds_it_is_read_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for extension in ("jpg", "png", "bmp", "webp"):
        write_image(tmp_path / f"whole.{extension}", noise(20, 30, 3))
        whole = (tmp_path / f"whole.{extension}").read_bytes()
        broken = tmp_path / f"broken.{extension}"
        for _ in range(30):
            data = bytearray(whole)
            for place in rng.integers(0, min(300, len(data)), 4):
                data[place] = rng.integers(256)
            broken.write_bytes(data)
            try:
                assert load_image(broken).shape[2] == 3
            except SampleError as error:
                known = (f"{broken} cannot be", f"Image {broken} has mode")
                assert str(error).startswith(known)  # noqa: PT017


def test_an_image_of_too_many_pixels_is_refused_with_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "x.png", noise(20, 30, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    with pytest.raises(
        SampleError,
        match=r"x\.png has more than the 0 million pixels .*600 pixels.*cut it into tiles",
    ):
        load_image(tmp_path / "x.png")


def test_an_image_that_is_only_large_is_read_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = write_image(tmp_path / "x.png", noise(20, 30, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), pixels)


def test_a_pair_of_different_sizes_is_refused_with_both_sizes(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, noise(20, 30, 3), noise(21, 30))
    with pytest.raises(
        SampleError,
        match=r"image\.png is 20x30 but mask .*mask\.png is 21x30 \(HxW\), .* export the",
    ):
        pair.load()


@pytest.mark.parametrize(("orientation", "quarter_turns"), [(6, -1), (8, 1)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_an_orientation_is_applied_where_only_the_turned_picture_fits(
    tmp_path: Path, orientation: int, quarter_turns: int, kind: type
) -> None:
    stored = noise(20, 30)
    pair = pair_of(
        tmp_path,
        stored.astype(kind) * kind(np.iinfo(kind).max // 255),
        noise(30, 20),
        orientation,
    )
    np.testing.assert_array_equal(pair.load()[0][..., 0], np.rot90(stored, quarter_turns))


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_orientation_is_left_alone_where_the_stored_picture_fits(
    tmp_path: Path, orientation: int
) -> None:
    stored = noise(20, 30, 3)
    pair = pair_of(tmp_path, stored, noise(20, 30), orientation)
    np.testing.assert_array_equal(pair.load()[0], stored)


def test_a_turned_picture_that_fits_neither_way_is_refused(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, noise(20, 30, 3), noise(30, 21), 6)
    with pytest.raises(SampleError, match=r"is 20x30 but mask .* is 30x21"):
        pair.load()


def test_a_header_is_size_and_orientation_even_where_the_pixels_are_cut_off(
    tmp_path: Path,
) -> None:
    write_image(tmp_path / "x.png", noise(20, 30, 3), orientation=6)
    assert read_header(tmp_path / "x.png") == ((20, 30), 6)
    write_image(tmp_path / "y.jpg", noise(20, 30, 3))
    (tmp_path / "y.jpg").write_bytes((tmp_path / "y.jpg").read_bytes()[:-300])
    assert read_header(tmp_path / "y.jpg") == ((20, 30), 1)


def test_an_error_keeps_its_sentence_when_torch_wraps_it_in_a_traceback() -> None:
    wrapped = (
        "Caught SampleError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
        "OSError: truncated\n\nThe above exception was the direct cause\n\n"
        "segprune.data.pixels.SampleError: a.png: bad.\n"
    )
    assert str(SampleError(wrapped)) == str(SampleError("a.png: bad.")) == "a.png: bad."


def test_the_palette_is_pascal_voc_s() -> None:
    palette = voc_palette()
    assert palette[: 3 * 21] == tuple(int(value) for value in VOC_COLOURS.split())
    assert palette[-3:] == (224, 224, 192)  # the border, drawn with 255
    assert len({palette[i : i + 3] for i in range(0, 768, 3)}) == 256
