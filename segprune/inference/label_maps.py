"""From images of any size to a class per pixel, in one of three modes, with several scales and mirrored views if asked.

letterbox   the whole image is fitted into `input_shape`, with grey around it, as the VOC scripts do
whole       the image keeps its own size and is padded with grey on the right and below to a multiple of 32
slide       windows of `input_shape` at every `stride`, the last one moved back to the edge; where windows overlap,
            their logits are averaged, as mmsegmentation does; an image smaller than the window is padded with grey

The padding is cut off the logits, which are then resized bilinearly to the image's own size. Several views are
averaged by their softmax and not by their logits: the logits of another scale may be larger for no better reason,
while a softmax gives every view one vote per pixel.

Memory: logits are resized in strips of rows, and rows of windows are run as the strips need them. So a larger image
costs one view no more memory than the network itself needs, and `slide` and `letterbox` bound that. Several views
also keep their sum, K H W float32 for each image of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from segprune.data import letterbox
from segprune.data.transforms import GREY, IMAGENET, normalise_pixels, resize
from segprune.spec import Preprocessing

Mode = Literal["letterbox", "whole", "slide"]
MODES: tuple[Mode, ...] = get_args(Mode)
Predict = Callable[
    [Tensor], Tensor
]  # pixels B 3 H W, normalised float32 on the device -> logits B K h w
Bytes = npt.NDArray[np.uint8]

MULTIPLE = 32  # of the sides of a whole image: the encoder's last stage reduces by 32
STRIP_NUMBERS = 1 << 25  # logits in one strip, 128 MiB
CPU_STRIP_NUMBERS = (
    1 << 21
)  # fits the cache: choosing among 150 classes then takes half of the time


@dataclass(frozen=True)
class EvalMode:
    """How images are put through the network. Sizes are H, W in pixels.

    `input_shape` is the letterbox or the window; `whole` does not use it. `stride` belongs to `slide` and is two
    thirds of the window if None. Each of `scales` adds a view of the image (in `letterbox`, of the box) resized by
    it; `flip` adds the mirrored image to each view. `boundary` asks for boundary IoU.
    """

    mode: Mode = "letterbox"
    input_shape: tuple[int, int] = (512, 512)
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    boundary: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(
                f"`mode` {self.mode!r} is unknown; choose one of {', '.join(MODES)}."
            )

        # NaN and infinity fail this comparison as well.
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            given = " ".join(f"{scale:g}" for scale in self.scales) or "empty"
            raise ValueError(
                f"`scales` is {given}; give at least one, each above 0, such as 0.75 1 1.25."
            )

        # Only sliding windows have a stride.
        if self.stride is not None and self.mode != "slide":
            raise ValueError(
                f"`stride` has no effect in mode {self.mode}; leave it out, or choose the mode slide."
            )

        if not all(
            0 < step <= side for step, side in zip(self.steps, self.input_shape, strict=True)
        ):
            window = "×".join(map(str, self.input_shape))
            raise ValueError(
                f"`stride` is {self.steps[0]}×{self.steps[1]}, where 1×1 to the window's {window} is allowed; "
                "a longer one would leave pixels out."
            )

    @property
    def steps(self) -> tuple[int, int]:
        """The stride that is used."""
        height, width = self.input_shape
        return self.stride or (math.ceil(height * 2 / 3), math.ceil(width * 2 / 3))


@dataclass(frozen=True)
class View:
    """An image at one scale on its canvas [H, W, C] uint8; it lies in the box (top, left, h, w)."""

    canvas: Tensor
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Prepared:
    """An image made ready: one view for every scale, and the image's own size (H, W)."""

    views: tuple[View, ...]
    size: tuple[int, int]


def prepare(image: Bytes, how: EvalMode) -> Prepared:
    """Resizes and pads an image [H, W, C] for each scale."""
    views = tuple(_view(image, how, scale) for scale in how.scales)
    return Prepared(views, (image.shape[0], image.shape[1]))


def _view(image: Bytes, how: EvalMode, scale: float) -> View:
    # letterbox: the image is fitted into the input's shape; `box` is where it lies there.
    if how.mode == "letterbox":
        shape = (
            how.input_shape if scale == 1 else _scaled(how.input_shape, scale, least=MULTIPLE)
        )
        canvas, _, box = letterbox(image, None, shape)
        return View(torch.from_numpy(canvas), box)

    # whole and slide: nothing but `scale` changes the image's size.
    height, width = _scaled(image.shape[:2], scale, least=1)
    if (height, width) != image.shape[:2]:
        image = resize(image, (height, width), None, Image.Resampling.BICUBIC)

    # Pad below and to the right: to a multiple of 32, or to one window at least.
    if how.mode == "whole":
        shape = (
            math.ceil(height / MULTIPLE) * MULTIPLE,
            math.ceil(width / MULTIPLE) * MULTIPLE,
        )
    else:
        shape = (max(height, how.input_shape[0]), max(width, how.input_shape[1]))

    # `box` leaves the padding out, whose logits nobody reads.
    canvas = np.full((*shape, image.shape[2]), GREY, dtype=np.uint8)
    canvas[:height, :width] = image
    return View(torch.from_numpy(canvas), (0, 0, height, width))


def _scaled(size: Sequence[int], scale: float, least: int) -> tuple[int, int]:
    return max(least, round(size[0] * scale)), max(least, round(size[1] * scale))


@runtime_checkable
class Upsampling(Protocol):
    """What a SegFormer has, whose last upsampling can wait until rows are read."""

    @property
    def upsamples_last(self) -> bool: ...
    def parts(self, x: Tensor) -> tuple[list[Tensor], Tensor]: ...
    def resize(self, logits: Tensor, size: torch.Size) -> Tensor: ...
    def can_resize_rows(self, logits: Tensor, size: torch.Size) -> bool: ...
    def resize_rows(
        self, logits: Tensor, size: torch.Size, top: int, bottom: int
    ) -> Tensor: ...


@dataclass(frozen=True)
class Network:
    """A `predict` on its device, how many images or windows it gets at a time, and how their pixels are made ready.

    With `upsampling`, `predict` returns logits before that network's last upsampling, and only rows that are read are
    upsampled.
    """

    predict: Predict
    num_classes: int
    device: torch.device | str
    batch_size: int
    preprocessing: Preprocessing = IMAGENET
    upsampling: Upsampling | None = None

    @property
    def strip_numbers(self) -> int:
        return CPU_STRIP_NUMBERS if torch.device(self.device).type == "cpu" else STRIP_NUMBERS

    def __call__(self, pixels: Tensor, mirrored: bool) -> list[_Rows]:
        """Returns the logits float32 of each of the pixels B H W C uint8; mirrored images' are mirrored back."""
        x = normalise_pixels(pixels.to(self.device), self.preprocessing)  # B C H W
        size = x.shape[2:]
        logits = self.predict(x.flip(-1) if mirrored else x).float()

        # A function with another number of classes would give a score that means nothing.
        if logits.dim() != 4 or logits.shape[:2] != (len(x), self.num_classes):
            raise ValueError(
                f"The network made {tuple(logits.shape)} of a batch of {len(x)}, where B K H W with {len(x)} images "
                f"and {self.num_classes} classes is expected; give a network with as many classes as the data."
            )

        resize_rows = None
        if self.upsampling is not None:
            if self.upsampling.can_resize_rows(logits, size):
                resize_rows = self.upsampling.resize_rows
            else:
                logits = self.upsampling.resize(logits, size)
        # SegFormers resize their logits themselves; other functions may give coarser ones.
        elif logits.shape[2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)

        def read(i: int, top: int, bottom: int) -> Tensor:
            rows = logits[i, :, top:bottom]
            if resize_rows is not None:
                rows = resize_rows(logits[i : i + 1], size, top, bottom)[0]
            return rows.flip(-1) if mirrored else rows

        shape = (self.num_classes, size[0], size[1])
        return [_Rows(partial(read, i), shape) for i in range(len(x))]


def make_network(
    predict: Predict,
    num_classes: int,
    device: torch.device | str,
    batch_size: int,
    preprocessing: Preprocessing,
) -> Network:
    """Returns the network that label maps are made with; of a SegFormer itself, one that upsamples as rows are read."""
    if isinstance(predict, Upsampling) and predict.upsamples_last:
        before = _before_upsampling(predict)
        return Network(before, num_classes, device, batch_size, preprocessing, predict)
    return Network(predict, num_classes, device, batch_size, preprocessing)


def _before_upsampling(network: Upsampling) -> Predict:
    return lambda x: network.parts(x)[1]


def label_maps(network: Network, images: Sequence[Prepared], how: EvalMode) -> list[Tensor]:
    """Returns the likeliest class of every pixel, [H, W] uint8 on the device, of each image in its own size."""
    limit = network.strip_numbers
    # A view is a scale's number, and whether the image is mirrored.
    views = [(number, False) for number in range(len(how.scales))]
    if how.flip:
        views += [(number, True) for number, _ in views]

    # The logits of a single view and their softmax have the same highest class, so no votes are counted.
    if len(views) == 1:
        maps: dict[int, Tensor] = {}
        for i, rows in _read_logits(network, images, how, *views[0]):
            strips = [
                strip.argmax(0).to(torch.uint8)
                for strip in _resize_in_strips(rows, images[i].size, limit)
            ]
            maps[i] = torch.cat(strips)
        return [maps[i] for i in range(len(images))]

    # Views vote with probabilities, since their logits may differ in magnitude.
    votes = [
        torch.zeros(network.num_classes, *image.size, device=network.device) for image in images
    ]  # K H W
    for number, mirrored in views:
        for i, rows in _read_logits(network, images, how, number, mirrored):
            # Strips come from the top down, and `top` is where the next one begins.
            top = 0
            for strip in _resize_in_strips(rows, images[i].size, limit):
                bottom = top + strip.shape[1]
                votes[i][:, top:bottom] += strip.softmax(0)
                top = bottom
    return [vote.argmax(0).to(torch.uint8) for vote in votes]


@dataclass(frozen=True)
class _Rows:
    """The logits of a view, read from the top down: `read(top, bottom)` gives the rows between, K r W."""

    read: Callable[[int, int], Tensor]
    shape: tuple[int, int, int]  # K H W


def _read_logits(
    network: Network, images: Sequence[Prepared], how: EvalMode, number: int, mirrored: bool
) -> Iterator[tuple[int, _Rows]]:
    """Yields each image's index and the logits of its view `number`; views of one size share a batch."""
    views = [image.views[number] for image in images]

    # The windows of one large image fill batches by themselves.
    if how.mode == "slide":
        for i, view in enumerate(views):
            windows = _SlidingWindows(network, view, how, mirrored)
            yield i, _Rows(windows.read, (network.num_classes, *view.box[2:]))
        return

    # Only images of one size can be stacked to a batch.
    same_size: dict[torch.Size, list[int]] = {}
    for i, view in enumerate(views):
        same_size.setdefault(view.canvas.shape, []).append(i)

    for members in same_size.values():
        batch = network(torch.stack([views[i].canvas for i in members]), mirrored)
        for i, logits in zip(members, batch, strict=True):
            height, width = views[i].box[2:]
            read = partial(_read_box, logits, views[i].box)
            yield i, _Rows(read, (network.num_classes, height, width))


def _read_box(rows: _Rows, box: tuple[int, int, int, int], first: int, last: int) -> Tensor:
    """Returns rows `first` to `last` of what lies in the box (top, left, h, w), without the padding around it."""
    top, left, _, width = box
    return rows.read(top + first, top + last)[:, :, left : left + width]


class _SlidingWindows:
    """A view's logits from overlapping windows, summed up one row of windows at a time.

    `sums` holds only the rows of the view from `first` on: what lies above the last strip that was read is dropped,
    and a row of windows is run when a strip reaches into it.
    """

    def __init__(self, network: Network, view: View, how: EvalMode, mirrored: bool) -> None:
        self.network = network
        self.view = view
        self.window = how.input_shape
        self.mirrored = mirrored

        # The windows form a grid, so their starts along each axis are enough.
        height, width, _ = view.canvas.shape
        self.tops = _window_starts(height, self.window[0], how.steps[0])
        self.lefts = _window_starts(width, self.window[1], how.steps[1])

        # How many windows cover a pixel is the product of what its row and its column count.
        self.covers_y = _count_windows(self.tops, self.window[0], height).to(network.device)
        self.covers_x = _count_windows(self.lefts, self.window[1], width).to(network.device)

        # Only rows that coming strips read are kept in memory; `first` is the top one.
        self.first = 0
        self.sums = torch.zeros(network.num_classes, 0, width, device=network.device)  # K r W

    def read(self, top: int, bottom: int) -> Tensor:
        """Returns the mean logits of the view's rows from `top` to `bottom`, K r W."""
        # Windows that begin at `bottom` or below do not reach these rows; others must run.
        while self.tops and self.tops[0] < bottom:
            self._run_row(self.tops.pop(0))

        # Drop the rows above, which no later strip reads.
        self.sums = self.sums[:, top - self.first :]
        self.first = top

        # The mean over the windows that cover a pixel, without the padding on the right.
        width = self.view.box[3]
        covers = self.covers_y[top:bottom, None] * self.covers_x[:width]
        return self.sums[:, : bottom - top, :width] / covers

    def _run_row(self, top: int) -> None:
        """Adds the logits of all windows that begin at row `top`."""
        height, width = self.window

        # Make room for the rows below those that earlier windows reached.
        start = top - self.first
        self.sums = F.pad(self.sums, (0, 0, 0, start + height - self.sums.shape[1]))

        # A row of windows may be longer than a batch.
        for begin in range(0, len(self.lefts), self.network.batch_size):
            lefts = self.lefts[begin : begin + self.network.batch_size]
            windows = [
                self.view.canvas[top : top + height, left : left + width] for left in lefts
            ]
            batch = self.network(torch.stack(windows), self.mirrored)
            for left, logits in zip(lefts, batch, strict=True):
                rows = logits.read(0, height)
                self.sums[:, start : start + height, left : left + width] += rows


def _window_starts(side: int, window: int, step: int) -> list[int]:
    """Returns where windows begin along a side: they cover all of it, and the last one ends where it ends."""
    number = math.ceil((side - window) / step) + 1
    return [min(step * i, side - window) for i in range(number)]


def _count_windows(starts: list[int], window: int, side: int) -> Tensor:
    """Returns how many windows cover each pixel of a side."""
    covers = torch.zeros(side)
    for start in starts:
        covers[start : start + window] += 1
    return covers


def _resize_in_strips(rows: _Rows, size: tuple[int, int], limit: int) -> Iterator[Tensor]:
    """Yields the logits resized to `size` in strips K r W, from the top down, of about `limit` numbers each.

    The result is that of `interpolate(align_corners=False)`, which cannot compute a part of an image.
    """
    height, width = size
    num_classes, view_height, view_width = rows.shape
    ratio = view_height / height  # rows of the view per row of the result

    # A strip is read at the view's resolution and made at the image's; the larger of both must fit.
    numbers_per_row = num_classes * max(width, view_width * ratio)
    step = max(1, int(limit / numbers_per_row))

    for top in range(0, height, step):
        bottom = min(height, top + step)
        # Bilinear resizing is separable: the height first, from few rows, then the width.
        strip = (
            rows.read(top, bottom)
            if view_height == height
            else _resize_rows(rows, ratio, top, bottom)
        )
        if view_width != width:
            strip = F.interpolate(
                strip[None], size=(bottom - top, width), mode="bilinear", align_corners=False
            )[0]
        yield strip


def _resize_rows(rows: _Rows, ratio: float, top: int, bottom: int) -> Tensor:
    """Returns rows `top` to `bottom` of the view resized in height alone, K r W; `ratio` is view over result."""
    last = rows.shape[1] - 1

    # Where the centre of each row of the result lies among the centres of the view's rows.
    y = (torch.arange(top, bottom, dtype=torch.float64) + 0.5) * ratio - 0.5
    y = y.clamp(min=0)

    # The two rows of the view that it lies between, the edge repeated, and how far it is from the upper one.
    above = y.long().clamp(max=last)
    below = (above + 1).clamp(max=last)
    weight = (y - above).float()[:, None]

    # Read just the rows between these two, and count from the first of them.
    first = int(above[0])
    block = rows.read(first, int(below[-1]) + 1)
    above, below = (above - first).to(block.device), (below - first).to(block.device)
    return torch.lerp(block[:, above], block[:, below], weight.to(block.device))
