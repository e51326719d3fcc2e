"""Encoded images become arrays: images uint8 [H, W, 3] RGB, masks uint8 [H, W] that hold classes.

An image lies in a file or in a cell of a table. Grey, 16-bit, palette, alpha and CMYK are converted: 16 bits by their
full range, alpha is dropped. For a network of other channels images keep all their bands, also those of TIFF and .npy
files, and have to have as many; for one channel they become grey. Images are read as they are stored. An EXIF
orientation is applied only where the image as stored does not have the mask's size and the turned one does: masks drawn
on the upright image fit then, and all others keep the pixels that other readers see.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from segprune.data.transforms import Bytes
from segprune.spec import RGB

ARRAY = ".npy"  # numpy's own file, H W or H W C
# Of several files of one name the earliest extension's is read.
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp"),
    *(".gif", ".avif", ".jp2", ".pbm", ".pgm", ".ppm", ARRAY),
)

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright, 5..8 swap height and width
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_COLOURED = ("RGB", "RGBA", "RGBX")
_BANDS = ("L", "LA", *_COLOURED, "CMYK")  # modes whose channels stand for themselves
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes; the last two of BigTIFF
_NUM_SAMPLES = 277  # TIFF tag: bands of a page
_WITH_PAGES = (
    "TIFF",
    "GIF",
    "WEBP",
    "PNG",
)  # not MPO, in which cameras keep a preview beside the photograph
_SUBFILE_TYPE, _COPY_OR_MASK = (
    254,
    1 | 4,
)  # TIFF tag; bits of a smaller copy and of a transparency mask
_MASK_MODES = ("1", "L", "P", "I", *_SIXTEEN_BITS)
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class SampleError(ValueError):
    """An image that cannot be used, in one sentence.

    torch raises what came from a worker process again with the whole traceback as its text; the sentence stands last
    in it and is taken out here, so that a message reads the same with and without workers.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


class Cell(Protocol):
    """An encoded image in a table; `str` is what an error names."""

    def read(self) -> bytes: ...


Location = str | os.PathLike[str] | Cell
_Read = Callable[[], npt.NDArray[Any]]
Colour = tuple[int, int, int]  # R G B in 0..255


@contextmanager
def open_image(location: Location) -> Iterator[Image.Image]:
    """Opens an image whose pixels are not decoded yet. Failures in the block become a SampleError that names it."""
    _check_present(location)
    try:
        with _open(
            location if isinstance(location, str | os.PathLike) else io.BytesIO(location.read())
        ) as image:
            yield image
    # Raised in the block by our own checks, with its message complete.
    except SampleError:
        raise
    except Image.DecompressionBombError as error:
        raise SampleError(_describe_large(location, str(error))) from error
    except _BROKEN as error:
        raise SampleError(_describe_broken(location, error)) from error


def _check_present(location: Location) -> None:
    # Checked first, since Pillow's message for a missing file names no remedy.
    if isinstance(location, str | os.PathLike) and not os.path.isfile(location):
        raise SampleError(
            f"{location} is missing; put it back, or leave it out with `skip_bad`."
        )


def _describe_large(location: Location, why: str) -> str:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
    return (
        f"{location} has more than the {limit} million pixels that one image may have ({why}); cut it into "
        "tiles, or leave it out with `skip_bad`."
    )


def _describe_broken(location: Location, error: Exception) -> str:
    return f"{location} cannot be read as an image ({error}); replace it, or leave it out with `skip_bad`."


def _open(file: str | os.PathLike[str] | io.BytesIO) -> Image.Image:
    """Opens an image without Pillow's warning about large ones; the limit, twice as many pixels, stays an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file)


def _check_one_page(image: Image.Image, location: Location) -> None:
    """Raises SampleError for several pages or frames. Smaller copies and masks of a TIFF's page are no pages."""
    if image.format not in _WITH_PAGES:
        return

    # Reading the first page alone would drop the others without a word.
    pages = getattr(image, "n_frames", 1)
    # A TIFF may carry previews of its page, so each page is asked what it is.
    if pages > 1 and image.format == "TIFF":
        kinds = []
        for page in range(pages):
            image.seek(page)
            kinds.append(image.tag_v2.get(_SUBFILE_TYPE, 0))  # type: ignore[attr-defined]
        image.seek(0)
        pages = sum(not kind & _COPY_OR_MASK for kind in kinds)

    _check_page_count(pages, location)


def _check_page_count(pages: int, location: Location) -> None:
    if pages > 1:
        raise SampleError(
            f"{location} holds {pages} pages or frames, where a file of one is allowed; save each as a file of its "
            "own, or leave it out with `skip_bad`."
        )


def load_image(location: Location, upright: bool = False, channels: int = RGB) -> Bytes:
    """Returns [H, W, C] uint8 of so many channels. `upright` applies the EXIF orientation.

    Raises SampleError for what is missing, cannot be decoded, has more than 16 bits per channel or other channels.
    """
    if _holds_bands(location, channels):
        with _open_bands(location) as (_, read):
            bands = read()
    else:
        bands = _decode(location, upright, channels)
    if bands.dtype.itemsize > 1:
        bands = _reduce_to_eight_bits(bands, location)
    return fit_channels(bands if bands.ndim == 3 else bands[..., None], channels, str(location))


def fit_channels(pixels: Bytes, channels: int, name: str) -> Bytes:
    """Returns [H, W, C] with so many channels: grey becomes RGB, and RGB grey. Raises SampleError for other numbers."""
    own = pixels.shape[2]
    if own == channels:
        return pixels
    if (own, channels) == (1, RGB):
        return np.repeat(pixels, RGB, axis=2)
    if (own, channels) == (RGB, 1):
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    raise SampleError(_describe_channels(name, own, channels))


def _describe_channels(name: str, own: int, channels: int) -> str:
    return (
        f"Image {name} has {own} channels, where the network takes {channels}; give images of {channels} channels, or "
        "leave it out with `skip_bad`."
    )


def _decode(location: Location, upright: bool, channels: int) -> npt.NDArray[Any]:
    """Returns [H, W] or [H, W, C] of what Pillow reads: RGB for three channels, grey for one, else as it is stored."""
    with open_image(location) as image:
        _check_one_page(image, location)
        # Decode within the block, where failures become a message that names the file.
        if channels == RGB and image.format == "TIFF":
            own = image.tag_v2.get(_NUM_SAMPLES, 1)  # type: ignore[attr-defined]
            # Pillow reads the first three of five or more.
            if own > len("RGBA"):
                raise SampleError(_describe_channels(str(location), own, channels))
        image.load()
        turned = ImageOps.exif_transpose(image) if upright else image

        if turned.mode in (
            *_SIXTEEN_BITS,
            "I",
        ):  # Pillow reads many a 16-bit file as I, which has 32
            return np.asarray(turned)
        if turned.mode not in _EIGHT_BITS:
            raise SampleError(
                f"Image {location} has mode {turned.mode}, where 8 or 16 bits per channel are allowed; "
                "save it as 8-bit RGB."
            )

        # By way of RGBA a transparent palette colour keeps its colour, and Pillow does not warn.
        if turned.mode in ("P", "PA"):
            transparent = turned.mode == "PA" or "transparency" in turned.info
            turned = turned.convert("RGBA" if transparent or channels == RGB else "RGB")

        wanted = {RGB: "RGB", 1: "L"}.get(channels)
        if wanted is None:
            wanted = turned.mode if turned.mode in _BANDS else "RGB"
        return np.asarray(turned if turned.mode == wanted else turned.convert(wanted))


def _holds_bands(location: Location, channels: int) -> bool:
    """Returns whether an image is read as an array of bands and not by Pillow, which knows four at most.

    Of TIFF files Pillow divides bands by one that it takes for alpha, so networks of other channels have theirs read so.
    """
    if isinstance(location, str | os.PathLike):
        if os.fspath(location).lower().endswith(ARRAY):
            return True
        if channels in (1, RGB) or not os.path.isfile(location):
            return False
        with open(location, "rb") as file:
            return file.read(4) in _TIFF
    return channels not in (1, RGB) and location.read()[:4] in _TIFF


@contextmanager
def _open_bands(location: Location) -> Iterator[tuple[tuple[int, ...], _Read]]:
    """Opens a TIFF or .npy file whose pixels are not read yet: its shape, H W or H W C, and what reads it.

    Raises SampleError for what is missing or broken, for too many pixels, and unless these are of 8 or 16 bits.
    """
    _check_present(location)
    try:
        with _open_array(location) as (shape, dtype, read):
            if len(shape) not in (2, 3) or 0 in shape:
                raise SampleError(
                    f"Image {location} has the shape {shape}, where H W or H W C is allowed; save it so, or leave it out "
                    "with `skip_bad`."
                )
            if dtype not in (np.uint8, np.uint16):
                raise SampleError(
                    f"Image {location} holds {dtype}, where uint8 or uint16 is allowed; save it so, with the brightest "
                    "value that matters at 255 or 65535."
                )
            if shape[0] * shape[1] > 2 * (Image.MAX_IMAGE_PIXELS or sys.maxsize):
                raise SampleError(_describe_large(location, f"{shape[0]}x{shape[1]}"))
            yield shape, read
    except SampleError:
        raise
    except Exception as error:  # damaged files make decoders fail in every possible way
        raise SampleError(_describe_broken(location, error)) from error


@contextmanager
def _open_array(
    location: Location,
) -> Iterator[tuple[tuple[int, ...], np.dtype[Any] | None, _Read]]:
    if isinstance(location, str | os.PathLike) and os.fspath(location).lower().endswith(ARRAY):
        # Mapped, so that a header that lies about the size finds no memory.
        array = np.load(location, mmap_mode="r", allow_pickle=False)
        yield array.shape, array.dtype, lambda: np.array(array)
        return

    try:
        from tifffile import TiffFile
    except ImportError as error:
        raise SampleError(
            f"{location} is a TIFF of several bands, which the package tifffile reads; pip install tifffile."
        ) from error

    file = location if isinstance(location, str | os.PathLike) else io.BytesIO(location.read())
    with TiffFile(file) as tiff:
        kinds = [int(getattr(page, "subfiletype", 0)) for page in tiff.pages]
        _check_page_count(sum(not kind & _COPY_OR_MASK for kind in kinds), location)
        page = tiff.pages.first

        # Bands may lie one after another: S Y X.
        planes = page.axes == "SYX"
        shape = (*page.shape[1:], page.shape[0]) if planes else page.shape

        def read() -> npt.NDArray[Any]:
            array = page.asarray()
            return np.moveaxis(array, 0, 2) if planes else array

        yield shape, page.dtype, read


def _reduce_to_eight_bits(bands: npt.NDArray[Any], location: Location) -> Bytes:
    """Returns values of 0..65535 as those of 0..255."""
    # Values beyond 16 bits have no known white, so they cannot be scaled.
    low, high = int(bands.min()), int(bands.max())
    if low < 0 or high > 65535:
        raise SampleError(
            f"Image {location} holds values from {low} to {high}, where 0..65535 is allowed; save it as 8-bit RGB."
        )

    # The full range is scaled, not the image's own, which would change its brightness.
    scaled: Bytes = np.rint(bands * (255 / 65535)).astype(np.uint8)
    return scaled


def load_mask(location: Location, colours: tuple[Colour, ...] = ()) -> Bytes:
    """Returns [H, W] uint8: the grey value or the palette's index, as it stands in the file.

    A mask with equal channels, or with nothing but a red one, holds the class in them; alpha is dropped. With
    `colours`, one per class, a coloured mask and one with a palette hold the class whose colour they show.

    Raises SampleError for what is missing or cannot be decoded, for colours that stand for no class, and for values
    above 255.
    """
    with open_image(location) as mask:
        _check_one_page(mask, location)
        mask.load()

        # A table of colours decides where the mask shows colours.
        if colours and mask.mode in ("P", "PA", *_COLOURED):
            return _match_colours(np.asarray(mask.convert("RGB")), colours, location)

        # Elsewhere the class is a number, whatever it is stored in.
        if mask.mode in ("LA", "PA"):
            values = np.asarray(mask.getchannel(0))
        elif mask.mode in _COLOURED:
            values = _read_one_channel(np.asarray(mask), mask.mode, location)
        elif mask.mode in _MASK_MODES:
            values = np.asarray(mask)
        else:
            raise SampleError(
                f"Mask {location} has mode {mask.mode}, where an 8-bit grey or palette PNG is allowed whose pixel "
                "value is the class; convert it."
            )

    # Casting to 8 bits would wrap 256 to 0, a valid class.
    if values.dtype.itemsize > 1 and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 255:
            raise SampleError(
                f"Mask {location} holds the value {high if high > 255 else low}, where 0..255 is allowed; number the "
                "classes from 0 and paint what is to be ignored 255."
            )

    return values.astype(np.uint8)


def _read_one_channel(pixels: Bytes, mode: str, location: Location) -> Bytes:
    """Returns the channel that says the class: any of three equal ones, or the only one that is not 0."""
    # Grey saved as RGB has equal channels; some tools fill only the red one.
    red, green, blue = (pixels[..., channel] for channel in range(3))
    if np.array_equal(red, green) and np.array_equal(red, blue):
        return red
    if not green.any() and not blue.any():
        return red

    # Anything else is a drawing in colours, whose classes only a table can tell.
    codes = np.unique(_encode_colours(pixels))
    names = ", ".join(f"({_decode_colour(int(code))})" for code in codes[:3])
    raise SampleError(
        f"Mask {location} has mode {mode} and {len(codes)} colours ({names}{', …' if len(codes) > 3 else ''}), where "
        "the pixel value must be the class; put a labelmap.txt or class_dict.csv with each class's colour beside the "
        "data set's folders, or convert its colours to class indices."
    )


def _match_colours(pixels: Bytes, colours: tuple[Colour, ...], location: Location) -> Bytes:
    """Returns [H, W], for each pixel the number of its colour."""
    codes = _encode_colours(pixels)
    known = _encode_colours(np.array(colours, dtype=np.uint8))

    # Look each colour up in the sorted table: one by one in Python would be slow.
    order = np.argsort(known)
    places = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
    labels = order[places]

    # The search finds a neighbour for unknown colours too, so compare again.
    wrong = known[labels] != codes
    if wrong.any():
        first = _decode_colour(int(codes[wrong][0]))
        raise SampleError(
            f"Mask {location} holds the colour {first} ({int(wrong.sum())} pixels are of no class), where the "
            f"{len(colours)} colours of the data set's table are allowed; add it there, or repaint the mask."
        )

    return labels.astype(np.uint8)


def _encode_colours(pixels: Bytes) -> npt.NDArray[np.int32]:
    """Returns [..., 3 or more] as one number per colour."""
    # Widen before the shifts, which would overflow 8 bits.
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    return red << 16 | green << 8 | blue


def _decode_colour(code: int) -> str:
    return f"{code >> 16},{code >> 8 & 255},{code & 255}"


def read_header(location: Location, channels: int = RGB) -> tuple[tuple[int, int], int]:
    """Returns the size (H, W) as stored and the EXIF orientation, 1 where there is none; decodes nothing."""
    if _holds_bands(location, channels):
        with _open_bands(location) as (shape, _):
            return (shape[0], shape[1]), 1
    with open_image(location) as image:
        _check_one_page(image, location)
        return (image.height, image.width), image.getexif().get(_ORIENTATION, 1)


def describe_unequal(
    image: Location, mask: Location, image_size: tuple[int, ...], mask_size: tuple[int, ...]
) -> str:
    """Returns the message for a pair whose sizes (H, W) differ."""
    return (
        f"Image {image} is {image_size[0]}x{image_size[1]} but mask {mask} is {mask_size[0]}x{mask_size[1]} (HxW), "
        "where both must be the same size; export the mask again at the image's size."
    )


def voc_palette() -> tuple[int, ...]:
    """Returns the 256 colours of Pascal VOC's masks, flat: 768 numbers."""
    palette = []
    for index in range(256):
        # The bits of the index are dealt in turn to R, G and B, which take them from their highest bit down.
        for channel in range(3):
            bits = [(index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)]
            palette.append(sum(bits))

    return tuple(palette)


def read_palette(mask: Location | None) -> tuple[int, ...]:
    """Returns 768 numbers: the palette that a mask carries, filled up with VOC's; VOC's alone if it has no colours."""
    if mask is None:
        return voc_palette()

    try:
        with open_image(mask) as image:
            own = tuple(image.getpalette() or ()) if image.mode == "P" else ()
    except SampleError:  # raised again where the mask is read
        own = ()

    # Grey palettes only number the classes, and masks drawn in them look black.
    grey = all(own[i] == own[i + 1] == own[i + 2] for i in range(0, len(own), 3))
    return voc_palette() if grey else own + voc_palette()[len(own) :]
