"""An .onnx file of `segprune export` as one function: from a picture to the class of every pixel.

Needs onnxruntime, NumPy and Pillow, and neither PyTorch nor segprune: what the file takes and gives stands in the file
itself. Pictures go through it as `segprune predict` does it: fitted whole into the file's size with grey around, logits
resized bilinearly to the picture's own size, the highest taken. Runs on the CPU.
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

KEY = "segprune"  # the file's metadata under this name say what it takes and gives
MEAN = np.array((123.675, 116.28, 103.53), dtype=np.float32)  # of red, green and blue in 0..255, as it was trained with
STD = np.array((58.395, 57.12, 57.375), dtype=np.float32)
GREY = 128  # around a picture of another shape than the file's
USUAL = (512, 512)  # H W that a file of any size is used at
MIN_SIDE = 64  # of a file of any size
MAX_CLASSES = 256  # that a mask can tell apart
STRIP_NUMBERS = 1 << 20  # logits resized at a time, so that large pictures need little memory


@dataclass(frozen=True)
class Segmenter:
    """An open file. `shape` is the H W that pictures are fitted into, `batch` what the file takes at a time.

    With `preprocess` it takes pixels uint8 B H W 3, else normalised float32 B 3 H W; with `argmax` it gives classes
    uint8 B H W, else logits float32 B K H W. `palette` is 768 numbers, red, green and blue of each class in turn.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[int, ...]
    shape: tuple[int, int]
    batch: int
    preprocess: bool
    argmax: bool
    run: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]

    def __call__(self, image: Bytes) -> Bytes:
        """The class of every pixel [H, W] of a picture [H, W, 3] RGB. Threads may call it at the same time."""
        canvas, (top, left, height, width) = letterbox(image, self.shape)
        x: npt.NDArray[Any] = canvas
        if not self.preprocess:
            x = np.ascontiguousarray(((canvas - MEAN) / STD).transpose(2, 0, 1))  # 3 H W
        out = self.run(np.repeat(x[None], self.batch, axis=0))[0]
        out = out[..., top : top + height, left : left + width]
        if (
            self.argmax
        ):  # as if each class had the logit 1 where it is and 0 elsewhere; those that are nowhere never win
            present = np.unique(out)
            classes: Bytes = present[highest((out == present[:, None, None]).astype(np.float32), image.shape[:2])]
            return classes
        if not np.isfinite(out).all():
            raise ArithmeticError(f"{self.name} gives logits that are NaN or infinite; export another checkpoint.")
        return highest(out, image.shape[:2])


def open_segmenter(path: str, input_shape: tuple[int, int] | None = None, threads: int = 0) -> Segmenter:
    """Open a file and run it once. `input_shape` (H W) is for files of any size; 0 threads leave that to ONNX Runtime.

    FileNotFoundError and ValueError say in one sentence why a file cannot be used.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; give an .onnx file that segprune export wrote.")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        said = json.loads(session.get_modelmeta().custom_metadata_map.get(KEY, "{}"))
    except Exception as error:  # ONNX Runtime has exceptions of its own
        raise ValueError(f"{path} is no ONNX file, or only a part of one; copy it again, or give another.") from error
    if not said:
        raise ValueError(f"{path} says nothing of what it takes and gives; give a file that segprune export wrote.")
    source = session.get_inputs()[0].name
    segmenter = Segmenter(
        Path(path).name,
        _names(path, said),
        tuple(said.get("palette", ())) or voc_palette(),
        _shape(path, said["shape"], input_shape),
        1 if said["shape"] is None else said["shape"][0],
        said["preprocess"],
        said["argmax"],
        lambda x: session.run(None, {source: x})[0],
    )
    segmenter(np.full((*segmenter.shape, 3), GREY, dtype=np.uint8))
    return segmenter


def _names(path: str, said: dict[str, Any]) -> tuple[str, ...]:
    names, number = tuple(said["class_names"]), said["num_classes"]
    if number > MAX_CLASSES:
        raise ValueError(f"{path} has {number} classes, where masks can hold {MAX_CLASSES}; give another file.")
    if names and len(names) != number:
        raise ValueError(f"{path} has {number} classes and names for {len(names)}; export a checkpoint that names all.")
    return names or tuple(map(str, range(number)))


def _shape(path: str, own: list[int] | None, asked: tuple[int, int] | None) -> tuple[int, int]:
    if own is not None:
        if asked not in (None, (own[1], own[2])):
            raise ValueError(f"{path} takes pictures of {own[1]}×{own[2]} alone; leave the input shape out.")
        return own[1], own[2]
    if min(asked or USUAL) < MIN_SIDE:
        raise ValueError(f"{path} takes sides of {MIN_SIDE} pixels and more; give a larger input shape.")
    return asked or USUAL


def letterbox(image: Bytes, shape: tuple[int, int]) -> tuple[Bytes, tuple[int, int, int, int]]:
    """The picture resized to just fit `shape` (H, W), in its middle; and the box (top, left, h, w) where it lies."""
    factor = min(shape[0] / image.shape[0], shape[1] / image.shape[1])
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    canvas = np.full((*shape, 3), GREY, dtype=np.uint8)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    canvas[top : top + height, left : left + width] = np.asarray(resized)
    return canvas, (top, left, height, width)


def highest(planes: Floats, size: tuple[int, ...]) -> Bytes:
    """The index [H, W] of the highest of the planes K h w, resized bilinearly with half-pixel centres."""
    num_planes, *small = planes.shape
    above, below, down = _neighbours(small[0], size[0])
    left, right, across = _neighbours(small[1], size[1])
    out = np.empty(size, dtype=np.uint8)
    step = max(1, STRIP_NUMBERS // (num_planes * max(size[1], small[1])))
    for top in range(0, size[0], step):
        rows = slice(top, top + step)
        strip = _between(planes[:, above[rows]], planes[:, below[rows]], down[rows, None])  # K r w
        out[rows] = _between(strip[..., left], strip[..., right], across).argmax(0)  # K r W
    return out


def _neighbours(small: int, large: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Floats]:
    """Of each of `large` places along a side, the two of `small` that it lies between, and how near the second is."""
    place = ((np.arange(large) + 0.5) * (small / large) - 0.5).clip(min=0)
    first = place.astype(np.intp)
    return first, np.minimum(first + 1, small - 1), (place - first).astype(np.float32)


def _between(first: Floats, second: Floats, share: Floats) -> Floats:
    return first + (second - first) * share


def voc_palette() -> tuple[int, ...]:
    """Pascal VOC's 256 colours: an index's bits dealt in turn to red, green and blue, highest first."""
    return tuple(
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
        for index in range(256)
        for channel in range(3)
    )
