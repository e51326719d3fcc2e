"""An .onnx file of `segprune export` as one function: from an image to the class of every pixel.

Needs onnxruntime, NumPy and Pillow, but neither PyTorch nor segprune: the file itself says what it takes and returns.
Images are treated as by `segprune predict`: fitted whole into the file's size with grey around, logits
resized bilinearly to the image's own size, the highest taken. Runs on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from PIL import Image

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

KEY = "segprune"  # the name of the metadata that describe the file
# Of pixels in 0..255, for a file that does not say what its network was trained with.
USUAL_PIXELS = {
    "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
    "channels": "rgb",
}
GREY = 128  # around an image of another shape than the file's
USUAL = (512, 512)  # H W that a file of any size is used at
MIN_SIDE = 64  # of a file of any size
MAX_SIDE = 1 << 15  # of a batch and of images, that a file may say of itself
MAX_CLASSES = 256  # that a mask can tell apart
STRIP_NUMBERS = 1 << 20  # logits resized at a time, so that large images need little memory


@dataclass(frozen=True)
class Segmenter:
    """An open file. `shape` is the H W that images are fitted into, `batch` what the file takes at a time.

    With `preprocess` it takes pixels uint8 B H W 3, else normalised float32 B 3 H W; with `argmax` it returns classes
    uint8 B H W, else logits float32 B K H W. `palette` is 768 numbers, red, green and blue of each class in turn.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[int, ...]
    shape: tuple[int, int]
    batch: int
    preprocess: bool
    argmax: bool
    pixels: dict[
        str, Any
    ]  # mean, std and order of the channels, where the file does not preprocess
    run: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]

    def __call__(self, image: Bytes) -> Bytes:
        """Returns the class of every pixel [H, W] of an image [H, W, 3] RGB. Threads may call it at the same time."""
        canvas, (top, left, height, width) = letterbox(image, self.shape)
        x: npt.NDArray[Any] = canvas
        if not self.preprocess:
            x = self._normalise(canvas)

        # Only the part of the canvas that shows the image counts.
        out = self.run(np.repeat(x[None], self.batch, axis=0))[0]
        out = out[..., top : top + height, left : left + width]

        # Classes are resized as if each had the logit 1 where it is and 0 elsewhere; absent ones never win.
        if self.argmax:
            present = np.unique(out)
            classes: Bytes = present[
                find_highest(
                    (out == present[:, None, None]).astype(np.float32), image.shape[:2]
                )
            ]
            return classes

        if not np.isfinite(out).all():
            raise ArithmeticError(
                f"{self.name} gives logits that are NaN or infinite; export another checkpoint."
            )
        return find_highest(out, image.shape[:2])

    def _normalise(self, canvas: Bytes) -> Floats:
        ordered = canvas[..., ::-1] if self.pixels["channels"] == "bgr" else canvas
        mean, std = (np.array(self.pixels[name], dtype=np.float32) for name in ("mean", "std"))
        return np.ascontiguousarray(((ordered - mean) / std).transpose(2, 0, 1))  # 3 H W


def open_segmenter(
    path: str, input_shape: tuple[int, int] | None = None, threads: int = 0
) -> Segmenter:
    """Opens a file and runs it once. `input_shape` (H W) is for files of any size; ONNX Runtime chooses for 0 threads.

    Raises FileNotFoundError or ValueError that says in one sentence why a file cannot be used.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give an .onnx file that segprune export wrote."
        )

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors

    # Read what the file says of itself.
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        description = json.loads(session.get_modelmeta().custom_metadata_map.get(KEY, "{}"))
    except Exception as error:  # ONNX Runtime has exceptions of its own
        raise ValueError(
            f"{path} is no ONNX file, or only a part of one; copy it again, or give another."
        ) from error
    channels = _count_channels(description)
    if channels != len(USUAL_PIXELS["mean"]):
        raise ValueError(
            f"{path} takes images of {channels} channels, where uploads are RGB; give a file that takes these."
        )
    if not _is_whole(description):
        raise ValueError(
            f"{path} does not say what it takes and returns; give a file that segprune export wrote."
        )

    input_name = session.get_inputs()[0].name
    segmenter = Segmenter(
        name=Path(path).name,
        class_names=_read_names(path, description),
        palette=tuple(description.get("palette", ())) or voc_palette(),
        shape=_choose_shape(path, description["shape"], input_shape),
        batch=1 if description["shape"] is None else description["shape"][0],
        preprocess=description["preprocess"],
        argmax=description["argmax"],
        pixels=_pixels_in(description),
        run=lambda x: session.run(None, {input_name: x})[0],
    )

    # A first run shows that it works, and is the slow one.
    try:
        segmenter(np.full((*segmenter.shape, 3), GREY, dtype=np.uint8))
    except ArithmeticError:
        raise
    except Exception as error:  # ONNX Runtime has exceptions of its own
        raise ValueError(
            f"{path} does not take or return what it says of itself; export the checkpoint again."
        ) from error
    return segmenter


def _is_whole(description: Any) -> bool:
    """Tells whether all that is read of what a file says of itself is there, of its type and within its range."""
    if not isinstance(description, dict):
        return False
    shape = description.get("shape", ())
    names, palette = description.get("class_names", ()), description.get("palette", [])
    return (
        (shape is None or (isinstance(shape, list) and len(shape) == 3))
        and all(type(side) is int and 1 <= side <= MAX_SIDE for side in shape or ())
        and type(description.get("num_classes")) is int
        and description["num_classes"] >= 1
        and type(description.get("preprocess")) is type(description.get("argmax")) is bool
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(palette, list)
        and len(palette) in (0, 3 * 256)
        and all(type(number) is int and 0 <= number <= 255 for number in palette)
        and all(len(_pixels_in(description)[name]) == 3 for name in ("mean", "std"))
    )


def _count_channels(description: Any) -> Any:
    """Returns how many channels the network's images have, as far as it is stated."""
    spec = description.get("spec") if isinstance(description, dict) else None
    usual = len(USUAL_PIXELS["mean"])
    return spec.get("in_channels", usual) if isinstance(spec, dict) else usual


def _pixels_in(description: dict[str, Any]) -> dict[str, Any]:
    """Returns what the file's network was trained with, as far as it is stated in numbers."""
    spec = description.get("spec")
    own = spec.get("preprocessing") if isinstance(spec, dict) else None
    stated = own if isinstance(own, dict) else {}
    pixels: dict[str, Any] = USUAL_PIXELS | stated
    for name in ("mean", "std"):
        numbers = pixels[name] if isinstance(pixels[name], list | tuple) else ()
        pixels[name] = [number for number in numbers if type(number) in (int, float)]
    return pixels


def _read_names(path: str, description: dict[str, Any]) -> tuple[str, ...]:
    """Returns the classes' names, or their numbers where the file has no names."""
    names, number = tuple(description["class_names"]), description["num_classes"]
    if number > MAX_CLASSES:
        raise ValueError(
            f"{path} has {number} classes, where masks can hold {MAX_CLASSES}; give another file."
        )
    if names and len(names) != number:
        raise ValueError(
            f"{path} has {number} classes and names for {len(names)}; export a checkpoint that names all."
        )
    return names or tuple(map(str, range(number)))


def _choose_shape(
    path: str, own: list[int] | None, input_shape: tuple[int, int] | None
) -> tuple[int, int]:
    """Returns the H W to use; `own` is the batch, height and width of a file of one size."""
    if own is not None:
        if input_shape not in (None, (own[1], own[2])):
            raise ValueError(
                f"{path} takes images of {own[1]}×{own[2]} alone; leave the input shape out."
            )
        return own[1], own[2]

    shape = input_shape or USUAL
    if min(shape) < MIN_SIDE:
        raise ValueError(
            f"{path} takes sides of {MIN_SIDE} pixels and more; give a larger input shape."
        )
    return shape


def letterbox(image: Bytes, shape: tuple[int, int]) -> tuple[Bytes, tuple[int, int, int, int]]:
    """Returns the image resized to just fit into the middle of `shape` (H, W), and its box (top, left, h, w) there."""
    factor = min(shape[0] / image.shape[0], shape[1] / image.shape[1])
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2

    canvas = np.full((*shape, 3), GREY, dtype=np.uint8)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    canvas[top : top + height, left : left + width] = np.asarray(resized)

    return canvas, (top, left, height, width)


def find_highest(planes: Floats, size: tuple[int, ...]) -> Bytes:
    """Returns the index [H, W] of the highest of the planes K h w, resized bilinearly with half-pixel centres."""
    num_planes, *small = planes.shape

    # In pieces, so that the K planes never stand in memory at full size, of whatever shape the image is.
    out = np.empty(size, dtype=np.uint8)
    num_columns = min(size[1], max(1, STRIP_NUMBERS // num_planes))
    num_rows = max(1, STRIP_NUMBERS // (num_planes * max(num_columns, small[1])))
    for top in range(0, size[0], num_rows):
        rows = slice(top, min(top + num_rows, size[0]))
        above, below, down = _find_neighbours(small[0], size[0], rows)
        strip = _interpolate(planes[:, above], planes[:, below], down[:, None])  # K r w

        for begin in range(0, size[1], num_columns):
            columns = slice(begin, min(begin + num_columns, size[1]))
            left, right, across = _find_neighbours(small[1], size[1], columns)
            piece = _interpolate(strip[..., left], strip[..., right], across)  # K r c
            out[rows, columns] = piece.argmax(0)

    return out


def _find_neighbours(
    small: int, large: int, part: slice
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Floats]:
    """Returns for a part of `large` places along a side the two of `small` beside each, and how near the second is."""
    place = ((np.arange(part.start, part.stop) + 0.5) * (small / large) - 0.5).clip(min=0)
    first = place.astype(np.intp)
    return first, np.minimum(first + 1, small - 1), (place - first).astype(np.float32)


def _interpolate(first: Floats, second: Floats, share: Floats) -> Floats:
    return first + (second - first) * share


def voc_palette() -> tuple[int, ...]:
    """Returns Pascal VOC's 256 colours, flat: 768 numbers."""
    palette = []
    for index in range(256):
        # The bits of the index are dealt in turn to red, green and blue, which take them from their highest bit down.
        for channel in range(3):
            bits = [(index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)]
            palette.append(sum(bits))

    return tuple(palette)
