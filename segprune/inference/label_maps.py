"""From pictures of any size to a class per pixel, three ways, with several scales and mirrored views if asked for.

letterbox   the picture fitted whole into `input_shape`, grey around it, as the VOC scripts do
whole       the picture at its own size, padded on the right and below to a multiple of 32 with grey
slide       windows of `input_shape` at every `stride`, the last one moved back to the edge; where they overlap their
            logits are averaged (mmsegmentation's way); a picture smaller than the window is padded with grey

Padding is cut off the logits again, which are then resized bilinearly to the picture's own size. Of several views
the softmax is averaged and not the logits: those of another scale may be larger for no better reason, while a
softmax gives every view one vote per pixel.

Logits are resized in strips of rows, and rows of windows are run as the strips need them. So one view costs no more
memory for a larger picture than the network itself asks for, and `slide` and `letterbox` bound that; several views
keep their sum besides, K H W float32 of each picture in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from segprune.data import MEAN, STD, letterbox
from segprune.data.transforms import GREY

Mode = Literal["letterbox", "whole", "slide"]
MODES: tuple[Mode, ...] = get_args(Mode)
Predict = Callable[[Tensor], Tensor]  # pixels B 3 H W, normalised float32 on the device -> logits B K h w
Bytes = npt.NDArray[np.uint8]

MULTIPLE = 32  # of a whole picture's sides: what the last stage of an encoder reduces by
STRIP_NUMBERS = 1 << 25  # logits of one strip, 128 MiB
CPU_STRIP_NUMBERS = 1 << 20  # what stays in the cache: choosing classes of 150 so takes 0.4 of the time


@dataclass(frozen=True)
class EvalMode:
    """How pictures are put through the network. Sizes are H, W in pixels.

    `input_shape` is the letterbox or the window and means nothing to `whole`; `stride` is of `slide`, by default two
    thirds of the window. Each of `scales` resizes the picture (of `letterbox`, the box) for one view more; `flip`
    adds the mirrored picture to each. `boundary` asks for boundary IoU.
    """

    mode: Mode = "letterbox"
    input_shape: tuple[int, int] = (512, 512)
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    boundary: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"The mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}.")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            given = " ".join(f"{scale:g}" for scale in self.scales) or "empty"
            raise ValueError(f"scales is {given}; give at least one, each above 0, such as 0.75 1 1.25.")
        if self.stride is not None and self.mode != "slide":
            raise ValueError(f"stride has no effect in mode {self.mode}; leave it out, or choose the mode slide.")
        if not all(0 < step <= side for step, side in zip(self.steps, self.input_shape, strict=True)):
            window = "×".join(map(str, self.input_shape))
            raise ValueError(
                f"stride is {self.steps[0]}×{self.steps[1]}, where 1×1 to the window's {window} is allowed; "
                "a longer one would leave pixels out."
            )

    @property
    def steps(self) -> tuple[int, int]:
        """The stride in force."""
        height, width = self.input_shape
        return self.stride or (math.ceil(height * 2 / 3), math.ceil(width * 2 / 3))


@dataclass(frozen=True)
class View:
    """A picture at one scale on its canvas [H, W, 3] uint8; the box (top, left, h, w) is where it lies."""

    canvas: Tensor
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Picture:
    """A view for every scale, and the picture's own size (H, W)."""

    views: tuple[View, ...]
    size: tuple[int, int]


def prepare(image: Bytes, how: EvalMode) -> Picture:
    """An image [H, W, 3] RGB resized and padded for each scale."""
    return Picture(tuple(_view(image, how, scale) for scale in how.scales), (image.shape[0], image.shape[1]))


def _view(image: Bytes, how: EvalMode, scale: float) -> View:
    if how.mode == "letterbox":
        shape = how.input_shape if scale == 1 else _scaled(how.input_shape, scale, least=MULTIPLE)
        canvas, _, box = letterbox(image, None, shape)
        return View(torch.from_numpy(canvas), box)
    height, width = _scaled(image.shape[:2], scale, least=1)
    if (height, width) != image.shape[:2]:
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    if how.mode == "whole":
        shape = (math.ceil(height / MULTIPLE) * MULTIPLE, math.ceil(width / MULTIPLE) * MULTIPLE)
    else:
        shape = (max(height, how.input_shape[0]), max(width, how.input_shape[1]))
    canvas = np.full((*shape, 3), GREY, dtype=np.uint8)
    canvas[:height, :width] = image
    return View(torch.from_numpy(canvas), (0, 0, height, width))


def _scaled(size: Sequence[int], scale: float, least: int) -> tuple[int, int]:
    return max(least, round(size[0] * scale)), max(least, round(size[1] * scale))


@dataclass(frozen=True)
class Network:
    """A `predict` on its device, and how many pictures or windows it is given at a time."""

    predict: Predict
    num_classes: int
    device: torch.device | str
    batch_size: int

    @property
    def strip_numbers(self) -> int:
        return CPU_STRIP_NUMBERS if torch.device(self.device).type == "cpu" else STRIP_NUMBERS

    def __call__(self, pixels: Tensor, mirrored: bool) -> Tensor:
        """B H W 3 uint8 -> logits B K H W float32; of mirrored pictures, mirrored back."""
        x = normalised(pixels.to(self.device))
        logits = self.predict(x.flip(-1) if mirrored else x).float()
        if logits.dim() != 4 or logits.shape[:2] != (len(x), self.num_classes):
            raise ValueError(
                f"The network made {tuple(logits.shape)} of a batch of {len(x)}, where B K H W with {len(x)} pictures "
                f"and {self.num_classes} classes is expected; give a network with as many classes as the data."
            )
        if logits.shape[2:] != x.shape[2:]:
            logits = F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=False)
        return logits.flip(-1) if mirrored else logits


def normalised(pixels: Tensor) -> Tensor:
    """B H W 3 uint8 -> B 3 H W float32, as `segprune.data.normalise` but where the pixels are."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (MEAN, STD))
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


def label_maps(network: Network, pictures: Sequence[Picture], how: EvalMode) -> list[Tensor]:
    """The likeliest class of every pixel, [H, W] uint8 on the device, of each picture in its own size."""
    views = [(number, mirrored) for number in range(len(how.scales)) for mirrored in (False, True)[: 1 + how.flip]]
    strips = partial(_strips, limit=network.strip_numbers)
    if len(views) == 1:  # its logits and their softmax have the same highest class
        maps: dict[int, Tensor] = {}
        for i, rows in _logits(network, pictures, how, *views[0]):
            maps[i] = torch.cat([strip.argmax(0).to(torch.uint8) for strip in strips(rows, pictures[i].size)])
        return [maps[i] for i in range(len(pictures))]
    votes = [torch.zeros(network.num_classes, *picture.size, device=network.device) for picture in pictures]
    for number, mirrored in views:
        for i, rows in _logits(network, pictures, how, number, mirrored):
            top = 0
            for strip in strips(rows, pictures[i].size):
                votes[i][:, top : top + strip.shape[1]] += strip.softmax(0)
                top += strip.shape[1]
    return [vote.argmax(0).to(torch.uint8) for vote in votes]


@dataclass(frozen=True)
class _Rows:
    """Logits of a view whose rows are asked for from the top down: `read(a, b)` gives K b-a W."""

    read: Callable[[int, int], Tensor]
    shape: tuple[int, int, int]  # K H W


def _logits(
    network: Network, pictures: Sequence[Picture], how: EvalMode, number: int, mirrored: bool
) -> Iterator[tuple[int, _Rows]]:
    """Each picture's index and the logits of one of its views, those of one size through the network together."""
    views = [picture.views[number] for picture in pictures]
    if how.mode == "slide":
        for i, view in enumerate(views):
            yield i, _Rows(_Sliding(network, view, how, mirrored).read, (network.num_classes, *view.box[2:]))
        return
    alike: dict[Any, list[int]] = {}
    for i, view in enumerate(views):
        alike.setdefault(view.canvas.shape, []).append(i)
    for members in alike.values():
        logits = network(torch.stack([views[i].canvas for i in members]), mirrored)
        for i, one in zip(members, logits, strict=True):
            top, left, height, width = views[i].box
            inner = one[:, top : top + height, left : left + width]
            yield i, _Rows(partial(_between, inner), (network.num_classes, height, width))


def _between(logits: Tensor, a: int, b: int) -> Tensor:
    return logits[:, a:b]


class _Sliding:
    """A view's logits, made one row of windows at a time and let go of when what lies below is asked for."""

    def __init__(self, network: Network, view: View, how: EvalMode, mirrored: bool) -> None:
        self.network, self.view, self.mirrored, self.window = network, view, mirrored, how.input_shape
        height, width, _ = view.canvas.shape
        self.tops = _starts(height, self.window[0], how.steps[0])
        self.lefts = _starts(width, self.window[1], how.steps[1])
        self.covers_y, self.covers_x = (
            _cover(starts, window, side).to(network.device)
            for starts, window, side in zip((self.tops, self.lefts), self.window, (height, width), strict=True)
        )
        self.first = 0  # row of the view that the sums begin with
        self.sums = torch.zeros(network.num_classes, 0, width, device=network.device)

    def read(self, a: int, b: int) -> Tensor:
        while self.tops and self.tops[0] < b:  # all windows that reach above b
            self._run_row(self.tops.pop(0))
        self.sums, self.first = self.sums[:, a - self.first :], a
        width = self.view.box[3]
        covers = self.covers_y[a:b, None] * self.covers_x[:width]
        return self.sums[:, : b - a, :width] / covers

    def _run_row(self, top: int) -> None:
        height, width = self.window
        self.sums = F.pad(self.sums, (0, 0, 0, top + height - self.first - self.sums.shape[1]))
        for start in range(0, len(self.lefts), self.network.batch_size):
            lefts = self.lefts[start : start + self.network.batch_size]
            pixels = torch.stack([self.view.canvas[top : top + height, left : left + width] for left in lefts])
            for left, logits in zip(lefts, self.network(pixels, self.mirrored), strict=True):
                self.sums[:, top - self.first : top - self.first + height, left : left + width] += logits


def _starts(side: int, window: int, step: int) -> list[int]:
    """Where windows begin along a side, so that they cover it all and the last ends with it."""
    return [min(step * i, side - window) for i in range(math.ceil((side - window) / step) + 1)]


def _cover(starts: list[int], window: int, side: int) -> Tensor:
    """How many windows lie over each pixel of a side."""
    covers = torch.zeros(side)
    for start in starts:
        covers[start : start + window] += 1
    return covers


def _strips(rows: _Rows, size: tuple[int, int], limit: int) -> Iterator[Tensor]:
    """The logits resized to `size`, in strips K r W from the top down that hold about `limit` numbers.

    Bilinear with half-pixel centres, as `interpolate(align_corners=False)`, which takes no part of a picture.
    """
    height, width = size
    num_classes, view_height, view_width = rows.shape
    ratio = view_height / height
    step = max(1, int(limit / num_classes / max(width, view_width * ratio)))
    for top in range(0, height, step):
        bottom = min(height, top + step)
        block = rows.read(top, bottom) if view_height == height else _resized_rows(rows, ratio, top, bottom)
        if view_width != width:
            block = F.interpolate(block[None], size=(bottom - top, width), mode="bilinear", align_corners=False)[0]
        yield block


def _resized_rows(rows: _Rows, ratio: float, top: int, bottom: int) -> Tensor:
    """Rows from top to bottom of what is as high as the view over `ratio`; K r W, the width left as it is."""
    last = rows.shape[1] - 1
    y = ((torch.arange(top, bottom, dtype=torch.float64) + 0.5) * ratio - 0.5).clamp(min=0)
    above = y.long().clamp(max=last)
    below = (above + 1).clamp(max=last)
    first = int(above[0])
    block = rows.read(first, int(below[-1]) + 1)
    weight = (y - above).float()[:, None]
    above, below, weight = (values.to(block.device) for values in (above - first, below - first, weight))
    return torch.lerp(block[:, above], block[:, below], weight)
