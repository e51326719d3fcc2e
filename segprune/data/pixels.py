"""Encoded pictures become arrays: images uint8 [H, W, 3] RGB, masks uint8 [H, W] that hold classes.

A picture lies in a file or in a cell of a table. Grey, 16-bit, palette, alpha and CMYK are converted: 16 bits by their
full range, alpha is dropped. Images are read as they are stored. An EXIF orientation is applied only where the
picture as stored does not have the mask's size and the turned one does: masks drawn on the upright picture
fit then, and all others keep the pixels that other readers see.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from segprune.data.transforms import Bytes

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright, 5..8 swap height and width
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_MASK_MODES = ("1", "L", "P", "I", *_SIXTEEN_BITS)
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class SampleError(ValueError):
    """A picture that cannot be used, in one sentence.

    torch raises what came from a worker process again with the whole traceback as its text; the sentence stands last
    in it and is taken out here, so that a message reads the same with and without workers.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


class Cell(Protocol):
    """An encoded picture in a table; `str` is what an error names."""

    def read(self) -> bytes: ...


Place = str | os.PathLike[str] | Cell


@contextmanager
def opened(place: Place) -> Iterator[Image.Image]:
    """The picture open, pixels not yet decoded; failures in the block become SampleError, which names the place."""
    if isinstance(place, str | os.PathLike) and not os.path.isfile(place):
        raise SampleError(f"{place} is missing; put it back, or leave it out with --skip_bad.")
    try:
        with Image.open(place if isinstance(place, str | os.PathLike) else io.BytesIO(place.read())) as image:
            yield image
    except SampleError:
        raise
    except _BROKEN as error:
        raise SampleError(
            f"{place} cannot be read as an image ({error}); replace it, or leave it out with --skip_bad."
        ) from error


def load_image(place: Place, upright: bool = False) -> Bytes:
    """[H, W, 3] uint8 RGB. `upright` applies the EXIF orientation.

    Raises SampleError for what is missing, cannot be decoded, or has more than 16 bits per channel.
    """
    with opened(place) as image:
        image.load()
        turned = ImageOps.exif_transpose(image) if upright else image
        if turned.mode in (*_SIXTEEN_BITS, "I"):  # Pillow reads many a 16-bit file as I, which has 32
            return _eight_bits(np.asarray(turned), place)
        if turned.mode not in _EIGHT_BITS:
            raise SampleError(
                f"Image {place} has mode {turned.mode}, where 8 or 16 bits per channel are allowed; "
                "save it as 8-bit RGB."
            )
        if turned.mode in ("P", "PA"):
            turned = turned.convert("RGBA")  # a transparent palette colour keeps its colour and warns of nothing
        return np.asarray(turned if turned.mode == "RGB" else turned.convert("RGB"))


def _eight_bits(grey: npt.NDArray[Any], place: Place) -> Bytes:
    """[H, W] of 0..65535 as [H, W, 3] of 0..255."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise SampleError(
            f"Image {place} holds values from {low} to {high}, where 0..65535 is allowed; save it as 8-bit RGB."
        )
    return np.repeat(np.rint(grey * (255 / 65535)).astype(np.uint8)[..., None], 3, axis=2)


def load_mask(place: Place) -> Bytes:
    """[H, W] uint8: the grey value or the palette's index, as it stands in the file.

    Raises SampleError for what is missing, cannot be decoded, is neither grey nor palette, or has values above 255.
    """
    with opened(place) as mask:
        mask.load()
        if mask.mode not in _MASK_MODES:
            raise SampleError(
                f"Mask {place} has mode {mask.mode}, where an 8-bit grey or palette PNG is allowed whose pixel "
                "value is the class; convert its colours to class indices."
            )
        values = np.asarray(mask)
    if values.dtype.itemsize > 1 and values.size and not 0 <= values.min() <= values.max() <= 255:
        wrong = values.max() if values.max() > 255 else values.min()
        raise SampleError(
            f"Mask {place} holds the value {wrong}, where 0..255 is allowed; number the classes from 0 and paint what "
            "is to be ignored 255."
        )
    return values.astype(np.uint8)


def header(place: Place) -> tuple[tuple[int, int], int]:
    """Size (H, W) as stored and EXIF orientation, 1 where there is none; nothing is decoded."""
    with opened(place) as image:
        return (image.height, image.width), image.getexif().get(_ORIENTATION, 1)


def size_message(image: Place, mask: Place, image_size: tuple[int, ...], mask_size: tuple[int, ...]) -> str:
    """What is said of a pair whose sizes (H, W) differ."""
    return (
        f"Image {image} is {image_size[0]}x{image_size[1]} but mask {mask} is {mask_size[0]}x{mask_size[1]} (HxW), "
        "where both must be the same size; export the mask again at the image's size."
    )


def voc_palette() -> tuple[int, ...]:
    """The 256 colours of Pascal VOC's masks, flat: an index's bits dealt in turn to R, G, B, highest first."""
    return tuple(
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
        for index in range(256)
        for channel in range(3)
    )


def palette_of(mask: Place | None) -> tuple[int, ...]:
    """768 numbers: the palette that a mask carries, filled up with VOC's; all VOC's where it has none or a grey one."""
    if mask is None:
        return voc_palette()
    try:
        with opened(mask) as image:
            own = tuple(image.getpalette() or ()) if image.mode == "P" else ()
    except SampleError:  # a bad mask is told of where it is read
        own = ()
    grey = all(own[i] == own[i + 1] == own[i + 2] for i in range(0, len(own), 3))
    return voc_palette() if grey else own + voc_palette()[len(own) :]
