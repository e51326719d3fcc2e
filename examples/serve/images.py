"""Uploads become images, and masks become files. Whoever sends them is a stranger: nothing is decoded unchecked."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

Bytes = npt.NDArray[np.uint8]

MAX_SCANS = 64  # of a JPEG; a progressive one has about ten
# Pillow reads some forty kinds, one of them (EPS) by running Ghostscript
KINDS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class BadImage(ValueError):
    """An upload that is refused: the HTTP status, and one sentence for whoever sent it."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def read_image(data: bytes, max_pixels: int) -> Bytes:
    """Returns [H, W, 3] uint8 RGB, turned upright as its EXIF data say; alpha is dropped, 16 bits become 8.

    The size stands in a file's first bytes and is checked before a pixel is decoded. Raises BadImage for what is empty
    or damaged (400), too large (413), no image or one of a kind that is not read (415).
    """
    if not data:
        raise BadImage(400, "The upload is empty; send an image.")

    try:
        with Image.open(io.BytesIO(data), formats=KINDS) as image:
            if image.width * image.height > max_pixels:
                raise _refuse_size(max_pixels)
            _refuse_many_scans(data, image)
            image.load()
            return _convert_to_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:  # Pillow's own limit came first
        raise _refuse_size(max_pixels) from error
    except UnidentifiedImageError as error:
        raise BadImage(
            415, f"The upload is no image that is read here; send one of {', '.join(KINDS)}."
        ) from error
    except Exception as error:  # damaged files fail in every way there is
        raise BadImage(400, "The image is damaged or cut off; send the whole file.") from error


def _refuse_many_scans(data: bytes, image: Image.Image) -> None:
    """Refuses a JPEG that goes over its pixels again and again: each scan takes ten bytes and the time of an image."""
    if image.format == "TIFF" and image.info.get("compression") in ("jpeg", "tiff_jpeg"):
        raise BadImage(
            415, "The image is a TIFF with JPEGs inside, which is not read here; send a JPEG."
        )
    # In a JPEG these two bytes are the mark of a scan and never part of its data.
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise BadImage(
            413, f"The JPEG has more than {MAX_SCANS} scans; save it again and send that."
        )


def _refuse_size(max_pixels: int) -> BadImage:
    return BadImage(
        413, f"The image has more than the {max_pixels:,} pixels allowed; send a smaller one."
    )


def _convert_to_rgb(image: Image.Image) -> Bytes:
    if image.mode in SIXTEEN_BITS:  # Pillow reads many a 16-bit file as I, which has 32
        grey: npt.NDArray[Any] = np.asarray(image)
        if grey.min() >= 0 and grey.max() <= 65535:
            return np.repeat(
                np.rint(grey * (255 / 65535)).astype(np.uint8)[..., None], 3, axis=2
            )

    if image.mode not in EIGHT_BITS:
        raise BadImage(
            415, "The image has more than 16 bits per channel; send it as 8-bit RGB."
        )
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a transparent colour of a palette stays that colour
    return np.asarray(image.convert("RGB"))


def encode_mask(labels: Bytes, palette: tuple[int, ...]) -> bytes:
    """Returns a palette PNG: its pixels are the classes [H, W], and viewers show their colours."""
    mask = Image.fromarray(labels)
    mask.putpalette(palette)
    return _encode_png(mask)


def encode_overlay(image: Bytes, labels: Bytes, palette: tuple[int, ...]) -> bytes:
    """Returns a PNG of the image blended with the classes' colours; black ones leave it as it is."""
    painted = np.asarray(palette, dtype=np.uint8).reshape(256, 3)[labels]
    painted = np.where(painted.any(axis=2, keepdims=True), painted, image)
    return _encode_png(Image.blend(Image.fromarray(image), Image.fromarray(painted), 0.5))


def _encode_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=3)  # twice as fast as 6, a tenth larger
    return out.getvalue()
