"""What can be predicted on: kinds told apart, images found and read whatever they are called and however stored."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segprune.inference.inputs import find_images, read_image, recognise_input
from segprune.inference.label_maps import EvalMode

WHOLE = EvalMode("whole")
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def put(path: Path, array: np.ndarray = RGB, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def test_folders_videos_images_and_cameras_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.MP4", "b.jpg", "c"):
        Path(name).touch()
    assert [recognise_input(x) for x in (".", "a.MP4", "b.jpg", "c", "0", "12")] == [
        "folder",
        "video",
        "image",
        "image",
        "camera",
        "camera",
    ]
    Path("0").touch()
    assert recognise_input("0") == "image"  # a file goes before a number


@pytest.mark.parametrize("source", ["nothing.jpg", "-1", "1.5", "²"])
def test_what_is_not_there_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="does not exist; give an image, a folder of images"
    ):
        recognise_input(source)


def test_images_are_found_below_the_folder_in_order_and_others_counted(tmp_path: Path) -> None:
    root = tmp_path / "Bilder"
    for name in ("b.JPG", "猫/ü.png", "猫/z/deep.bmp", "a.webp"):
        put(root / name)
    for name in ("notes.txt", "猫/film.mp4", ".DS_Store", "._b.jpg", ".hidden/c.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    images, others = find_images(str(root), str(tmp_path / "out"))
    assert [image.name for image in images] == ["a.webp", "b.JPG", "猫/ü.png", "猫/z/deep.bmp"]
    assert [Path(image.target) for image in images] == list(
        map(Path, ["a.png", "b.png", "猫/ü.png", "猫/z/deep.png"])
    )
    assert others == 2


def test_images_that_differ_in_their_ending_alone_keep_it(tmp_path: Path) -> None:
    for name in ("a.jpg", "A.png", "b.jpg", "sub/a.jpg"):
        put(tmp_path / "in" / name)
    images, _ = find_images(str(tmp_path / "in"), str(tmp_path / "out"))
    targets = {image.name: image.target for image in images}
    assert targets == {
        "a.jpg": "a.jpg.png",
        "A.png": "A.png.png",
        "b.jpg": "b.png",
        "sub/a.jpg": "sub/a.png",
    }


def test_what_an_earlier_run_wrote_is_not_read_again(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg")
    put(tmp_path / "out/overlay/a.png")
    images, others = find_images(str(tmp_path), str(tmp_path / "out"))
    assert ([image.name for image in images], others) == (["a.jpg"], 0)


@pytest.mark.skipif(os.name != "posix", reason="names there are text")
def test_a_name_that_is_no_text_can_be_printed(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        Path(os.fsdecode(path)).write_bytes(put(tmp_path / "x.bmp").read_bytes())
    except OSError:
        pytest.skip("this disk takes no such name")
    images, _ = find_images(str(tmp_path), str(tmp_path / "out"))
    assert [image.name for image in images] == ["x.bmp", "?.png"]
    assert read_image(images[1].path, WHOLE).image.shape == RGB.shape


def stored(kind: str, path: Path) -> tuple[Path, np.ndarray]:
    """A image stored that way, and the RGB it means."""
    three = np.stack([GREY] * 3, axis=2)
    match kind:
        case "RGB":
            return put(path.with_suffix(".png")), RGB
        case "grey":
            return put(path.with_suffix(".png"), GREY), three
        case "RGBA":
            alpha = np.full((40, 60, 1), 7, dtype=np.uint8)
            return put(path.with_suffix(".png"), np.concatenate([RGB, alpha], axis=2)), RGB
        case "16-bit PNG":
            return put(
                path.with_suffix(".png"), (GREY * 256.99).astype(np.uint16)
            ), three  # to be rounded up
        case "16-bit TIFF":
            return put(path.with_suffix(".tif"), GREY.astype(np.uint16) * 257), three
        case "32-bit TIFF":
            return put(path.with_suffix(".tif"), GREY.astype(np.int32) * 257), three
        case "black and white":
            return put(path.with_suffix(".png"), GREY > 127), np.where(
                three > 127, 255, 0
            ).astype(np.uint8)
        case "turned":
            exif = Image.Exif()
            exif[0x0112] = 6  # to be turned by a quarter, clockwise
            return put(path.with_suffix(".png"), RGB, exif=exif), np.rot90(RGB, -1)
        case _:
            exif = Image.Exif()
            exif[0x0112] = 6
            deep = GREY.astype(np.uint16) * 257
            return put(path.with_suffix(".png"), deep, exif=exif), np.rot90(three, -1)


@pytest.mark.parametrize(
    "kind",
    [
        "RGB", "grey", "RGBA", "16-bit PNG", "16-bit TIFF", "32-bit TIFF", "black and white", "turned", "turned 16-bit",
    ],
)  # fmt: skip
def test_a_image_is_read_upright_in_8_bits_however_it_is_stored(
    kind: str, tmp_path: Path
) -> None:
    path, meant = stored(kind, tmp_path / "x")
    assert np.array_equal(read_image(path, WHOLE).image, meant)


def test_values_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "x.tif", np.full((4, 4), 70000, dtype=np.int32))
    with pytest.raises(
        ValueError,
        match=r"x\.tif holds values from 70000 to 70000, where 0\.\.65535 is allowed; save it",
    ):
        read_image(path, WHOLE)


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "x.tif", np.zeros((4, 4), dtype=np.float32))
    with pytest.raises(
        ValueError,
        match=r"x\.tif has mode F, where 8 or 16 bits per channel are allowed; save it",
    ):
        read_image(path, WHOLE)


@pytest.mark.parametrize("damage", ["empty", "a text", "half"])
def test_a_damaged_image_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    path = put(tmp_path / "x.jpg")
    content = {
        "empty": b"",
        "a text": b"no image",
        "half": path.read_bytes()[: path.stat().st_size // 2],
    }
    path.write_bytes(content[damage])
    with pytest.raises(
        ValueError, match=r"x\.jpg cannot be read as an image \(.+\); replace it\.$"
    ):
        read_image(path, WHOLE)


def test_whatever_a_decoder_stumbles_over_names_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(*args: object, **kwargs: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("segprune.inference.inputs.load_image", stumble)
    with pytest.raises(
        ValueError,
        match=r"x\.png cannot be read as an image \(list index out of range\); replace",
    ):
        read_image(put(tmp_path / "x.png"), WHOLE)


def test_what_tools_leave_in_folders_is_no_image(tmp_path: Path) -> None:
    for name in ("a.png", ".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png", "b/._c.png"):
        put(tmp_path / name)
    images, num_others = find_images(str(tmp_path), str(tmp_path / "out"))
    assert [image.name for image in images] == ["a.png"]
    assert num_others == 0
