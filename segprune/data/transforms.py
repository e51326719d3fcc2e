"""Images and masks made ready for a network: letterbox, augmentation, normalisation.

Images are uint8 [H, W, C] in 0..255, RGB unless a network takes other channels, masks uint8 [H, W] holding class
indices; both are numpy arrays
until `normalise`. Padding is grey 128 in images and `IGNORE_INDEX` in masks, in training as in evaluation.
MEAN and STD are those of a network that says nothing else: ImageNet's on 0..255.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from segprune.spec import NO_CLASS, RGB, Preprocessing

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Box = tuple[int, int, int, int]
Transform = Callable[[Bytes, Bytes, np.random.Generator], tuple[Bytes, Bytes]]

IGNORE_INDEX = NO_CLASS
IMAGENET = Preprocessing()
MEAN, STD = IMAGENET.mean, IMAGENET.std
GREY = 128

BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.3, 0.4  # factors are drawn from 1 - x .. 1 + x
HUE = 0.05  # share of the colour circle, to either side

# RGB to luma and two chroma axes (NTSC's YIQ): hue is an angle of the chroma plane, saturation its length
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def normalise(image: Bytes, preprocessing: Preprocessing = IMAGENET) -> torch.Tensor:
    """Returns [H, W, C] uint8 as the [C, H, W] float32 that a network with this preprocessing takes."""
    return normalise_pixels(torch.from_numpy(np.array(image))[None], preprocessing)[0]


def normalise_pixels(
    pixels: torch.Tensor, preprocessing: Preprocessing = IMAGENET
) -> torch.Tensor:
    """Returns B C H W float32 of B H W C uint8, on the pixels' own device."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device)
    std = torch.tensor(preprocessing.std, device=pixels.device)
    scaled = (order_channels(pixels, preprocessing).float() - mean) / std
    return scaled.permute(0, 3, 1, 2).contiguous()


def restore_pixels(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """The inverse of `normalise_pixels`, in float32: B H W C in 0..255, not rounded."""
    mean = torch.tensor(preprocessing.mean, device=images.device)
    std = torch.tensor(preprocessing.std, device=images.device)
    return order_channels(images.float().permute(0, 2, 3, 1) * std + mean, preprocessing)


def renormalise(images: torch.Tensor, own: Preprocessing, other: Preprocessing) -> torch.Tensor:
    """Returns images B C H W that were normalised for one network as another one takes them."""
    same = (own.mean, own.std, own.channels) == (other.mean, other.std, other.channels)
    return images if same else normalise_pixels(restore_pixels(images, own), other)


def order_channels(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Turns the channels in the last dimension into the network's order, and back: R and B change places, if any."""
    if preprocessing.channels == "rgb":
        return pixels
    if pixels.shape[-1] == RGB:
        return pixels.flip(-1)
    return torch.cat([pixels[..., :RGB].flip(-1), pixels[..., RGB:]], -1)


def letterbox(
    image: Bytes, mask: Bytes | None, shape: tuple[int, int]
) -> tuple[Bytes, Bytes | None, Box]:
    """Fits the whole image and mask into `shape` (H, W): aspect ratio kept, padded on both sides alike.

    The image is resized bicubically, the mask by nearest neighbour. The box (top, left, h, w) is where the
    image lies inside: `logits[..., top : top + h, left : left + w]` belongs to it.
    """
    # The padding is split evenly; an odd pixel is added at the bottom or the right.
    height, width = _fit(image.shape[:2], shape)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    whole = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))

    image = resize(image, (height, width), whole, Image.Resampling.BICUBIC)
    image = _pad(image, shape, (top, left), GREY)
    # Nearest neighbour keeps labels; blending two would name a third class.
    if mask is not None:
        mask = resize(mask, (height, width), whole, Image.Resampling.NEAREST)
        mask = _pad(mask, shape, (top, left), IGNORE_INDEX)

    return image, mask, (top, left, height, width)


@dataclass(frozen=True)
class EvalTransform:
    """Letterbox to `shape` (H, W); draws nothing from the generator."""

    shape: tuple[int, int]

    def __call__(
        self, image: Bytes, mask: Bytes, rng: np.random.Generator
    ) -> tuple[Bytes, Bytes]:
        image, boxed, _ = letterbox(image, mask, self.shape)
        # A mask went in, so a mask comes out.
        assert boxed is not None
        return image, boxed


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, crop, horizontal flip and colour, to `shape` (H, W).

    A scale of 1 is the letterbox's size. A larger image is cropped at random, a smaller one is placed at random in
    padding. `flip` is a probability. All randomness comes from the caller's generator.
    """

    shape: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    colour: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(
                f"scale {self.scale} must be (low, high) with 0 < low <= high; give both, low first."
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(
                f"flip {self.flip} must be a probability in 0..1; give 0 to switch it off."
            )

    def __call__(
        self, image: Bytes, mask: Bytes, rng: np.random.Generator
    ) -> tuple[Bytes, Bytes]:
        size, box, corner = self._draw_crop(image.shape[:2], rng)
        image = resize(image, size, box, Image.Resampling.BICUBIC)
        mask = resize(mask, size, box, Image.Resampling.NEAREST)

        if rng.random() < self.flip:
            image, mask = image[:, ::-1], mask[:, ::-1]
        if self.colour:
            image = jitter_colour(image, rng)

        return _pad(image, self.shape, corner, GREY), _pad(
            mask, self.shape, corner, IGNORE_INDEX
        )

    def _draw_crop(
        self, size: tuple[int, ...], rng: np.random.Generator
    ) -> tuple[tuple[int, int], tuple[float, float, float, float], tuple[int, int]]:
        """Draws which part of an image of `size` is seen.

        Returns its size after scaling, its box in the source, and its top left corner in `shape`. Only this part is
        resampled, so that large images and scales cost no more than small ones.
        """
        # Where the scaled image is larger it is cropped, where smaller it is placed.
        scaled = _fit(size, self.shape, rng.uniform(*self.scale))
        seen = (min(scaled[0], self.shape[0]), min(scaled[1], self.shape[1]))
        start = [int(rng.integers(0, n - s + 1)) for n, s in zip(scaled, seen, strict=True)]
        corner = [
            int(rng.integers(0, n - s + 1)) for n, s in zip(self.shape, seen, strict=True)
        ]

        # Source pixels per scaled pixel; rounding must not reach beyond the source.
        y, x = size[0] / scaled[0], size[1] / scaled[1]
        right = min((start[1] + seen[1]) * x, float(size[1]))
        bottom = min((start[0] + seen[0]) * y, float(size[0]))
        return seen, (start[1] * x, start[0] * y, right, bottom), (corner[0], corner[1])


def jitter_colour(image: Bytes, rng: np.random.Generator) -> Bytes:
    """Changes brightness, contrast, saturation and hue of [H, W, C] at random, in one linear map of the channels.

    Saturation and hue are RGB's alone; of other images, all channels are equal parts of the brightness.
    """
    brightness, contrast, saturation = (
        rng.uniform(1 - x, 1 + x) for x in (BRIGHTNESS, CONTRAST, SATURATION)
    )
    angle = 2 * np.pi * rng.uniform(-HUE, HUE)

    # Brightness and contrast scale everything.
    channels = image.shape[2]
    matrix, luma = brightness * contrast * np.eye(channels), np.full(channels, 1 / channels)

    # Hue turns the chroma plane, saturation stretches it.
    if channels == RGB:
        turn = np.eye(3)
        turn[1:, 1:] = saturation * np.array(
            [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        )
        matrix = brightness * contrast * np.linalg.inv(_YIQ) @ turn @ _YIQ
        luma = _YIQ[0]

    # Contrast changes the distance from the image's mean luma, which therefore only brightness may move.
    mean_luma = float(image.mean(axis=(0, 1)) @ luma)
    offset = brightness * (1 - contrast) * mean_luma

    changed = image.astype(np.float32) @ matrix.T.astype(np.float32) + np.float32(offset)
    rounded: Bytes = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
    return rounded


def _fit(size: tuple[int, ...], shape: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """Returns the (height, width) of an image of `size` that just fits `shape`, times `scale`; at least one pixel."""
    factor = scale * min(shape[0] / size[0], shape[1] / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def resize(
    array: Bytes,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None,
    how: Image.Resampling,
) -> Bytes:
    """Returns the part `box` (left, top, right, bottom) of an array, all of it if None, resampled to `size` (H, W)."""
    # Pillow knows no other images of several channels, and weighs colours by a fourth one, taking it for alpha.
    if array.ndim == 3 and array.shape[2] != RGB:
        bands = [resize(array[..., i], size, box, how) for i in range(array.shape[2])]
        return np.stack(bands, axis=2)
    resized = Image.fromarray(array).resize((size[1], size[0]), how, box=box)
    return np.asarray(resized)


def _pad(array: Bytes, shape: tuple[int, int], corner: tuple[int, int], value: int) -> Bytes:
    """Returns `shape` filled with `value`, with the array's top left corner at `corner`."""
    padded: Bytes = np.full((*shape, *array.shape[2:]), value, dtype=np.uint8)
    top, left = corner
    padded[top : top + array.shape[0], left : left + array.shape[1]] = array
    return padded
