"""A few images without labels: for criteria and the repair, which need some, and to calibrate an exported file."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from segprune.data.listing import choose_images, list_files
from segprune.data.pixels import IMAGE_EXTENSIONS, Location, load_image
from segprune.data.samples import MissingSplitError, Source
from segprune.data.transforms import IMAGENET, Bytes, letterbox, normalise_pixels
from segprune.spec import RGB, Preprocessing

BATCH = 8


def list_images(
    source: str | os.PathLike[str] | Source, split: str = "train"
) -> Sequence[Location]:
    """Returns where the images below a folder lie, folder by folder and by name, or those of a data set's split.

    FileNotFoundError for a folder without images.
    """
    if isinstance(source, Source):
        # The pool of a set without splits serves as its train split.
        try:
            pairs = source.split(split)
        except MissingSplitError:
            if split != "train":
                raise
            pairs = source.split("all")  # which only a set without splits has
        return [pair.image for pair in pairs]

    # The same walk as for data sets, so hidden files are left out here too.
    paths = choose_images(list_files(source))
    if not paths:
        raise FileNotFoundError(
            f"{source} holds no image; give a folder with {', '.join(IMAGE_EXTENSIONS)} files."
        )
    return paths


def load_images(
    places: Sequence[Location], number: int, shape: tuple[int, int], channels: int = RGB
) -> list[Bytes]:
    """Loads `number` of the images, or all if there are fewer, letterboxed into `shape`: [H, W, C] uint8.

    They are spread evenly over all of them, since neighbours in a data set are often alike. ValueError for one that
    is damaged.
    """
    # Whole-number steps take the first image and never the same one twice.
    number = min(number, len(places))
    chosen = [places[i * len(places) // number] for i in range(number)]
    images = [load_image(place, upright=True, channels=channels) for place in chosen]
    return [letterbox(image, None, shape)[0] for image in images]


def batch_images(
    images: Sequence[Bytes], preprocessing: Preprocessing = IMAGENET
) -> list[Tensor]:
    """Returns the images normalised in batches B C H W."""
    return [normalise_pixels(batch, preprocessing) for batch in _stack(images)]


def batch_pixels(images: Sequence[Bytes]) -> list[Tensor]:
    """Returns the images in batches B C H W of uint8, for a network that is not known yet."""
    return [batch.permute(0, 3, 1, 2).contiguous() for batch in _stack(images)]


def _stack(images: Sequence[Bytes]) -> list[Tensor]:
    pixels = [torch.from_numpy(image) for image in images]  # each H W C
    return [torch.stack(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
