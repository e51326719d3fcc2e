"""A few pictures without labels, for criteria that need some, for the repair and for the scan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from segprune.cli.console import show_notes
from segprune.cli.pruning import PruneConfig, needs_images
from segprune.data import Location, Source, letterbox, load_image, normalise
from segprune.data.listing import list_files
from segprune.data.transforms import Bytes
from segprune.inference.inputs import IMAGES
from segprune.pruning.importance import NEED_DATA

BATCH = 8


def load_pictures(places: Sequence[Location], number: int, shape: tuple[int, int]) -> list[Bytes]:
    """`number` of the pictures at most, letterboxed into `shape`: [H, W, 3] uint8. ValueError for one that is damaged.

    They are spread over all, since neighbours in a data set are often alike.
    """
    number = min(number, len(places))
    chosen = [places[i * len(places) // number] for i in range(number)]
    return [letterbox(load_image(place, upright=True), None, shape)[0] for place in chosen]


def load_images(places: Sequence[Location], number: int, shape: tuple[int, int]) -> list[Tensor]:
    """The same as batches B 3 H W, normalised."""
    images = [normalise(picture) for picture in load_pictures(places, number, shape)]
    return [torch.stack(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]


def places_in(folder: str, flag: str = "--images") -> Sequence[Location]:
    """All pictures below a folder, in order of their names. FileNotFoundError where there is none."""
    found = [path for path in list_files(folder) if Path(path).suffix.lower() in IMAGES]
    if not found:
        raise FileNotFoundError(f"{flag} {folder} holds no picture; give a folder with {', '.join(IMAGES)} files.")
    return found


def places_of(source: Source, split: str = "train") -> Sequence[Location]:
    """The pictures of a part of a data set."""
    return [pair.image for pair in source.split(split)]


def images_for(config: PruneConfig, source: Source | None) -> list[Tensor]:
    """Pictures for the method and the repair: none where nobody needs them, or by default where --data has none."""
    if not needs_images(config):
        return []
    try:
        if config.images:
            places = places_in(config.images)
        elif source is not None:
            places = places_of(source)
        else:
            return []
    except FileNotFoundError as error:
        if config.images or config.repair or config.pruning_method in NEED_DATA:
            raise
        show_notes((f"No repair, since there are no pictures for it: {error}",))
        return []
    return load_images(places, config.num_images, config.input_shape)
