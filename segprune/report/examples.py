"""Images of the page: a few of the validation split, with what two networks see in them.

Which ones is decided by a rule. `NUM_TRIED` images, spread evenly over the split, are put through the networks. They are
sorted by how many more of their labelled pixels are right before than after; half of the examples are the worst ones,
the others lie around the median. Where there is one network alone, they are sorted by how many pixels it has wrong.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from segprune.data import IGNORE_INDEX, Sample
from segprune.data.transforms import Bytes
from segprune.inference.draw import as_rgb
from segprune.inference.evaluate import EvalMode
from segprune.inference.label_maps import Network, Predict, label_maps, prepare
from segprune.spec import preprocessing_of

NUM_TRIED = 24
NUM_SHOWN = 12
LONGEST = 560  # pixels of a side on the page
QUALITY = 82  # of the photograph's JPEG
SAME, LOST, GAINED, OTHER = range(4)  # what became of a pixel
CHANGES = (  # their colours; where nothing changed, the image shows
    (0, 0, 0),
    (214, 39, 40),
    (44, 160, 44),
    (240, 180, 0),
)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Example:
    """One image. The layers are data URIs: the image, and laid over it the classes, transparent where none is shown."""

    name: str
    rule: Literal["worst", "typical"]
    size: tuple[int, int]  # W, H of the layers
    image: str
    truth: str
    before: str  # "" where there is one network alone
    after: str
    changed: str
    right: tuple[float | None, float]  # share of the labelled pixels, before and after
    classes: tuple[int, ...]  # that occur in it


@dataclass(frozen=True)
class _Tried:
    sample: Sample
    maps: tuple[Bytes, ...]  # of the networks
    right: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Grows with what is to be shown first."""
        return self.right[0] - self.right[-1] if len(self.right) > 1 else -self.right[0]


def choose_examples(
    networks: Sequence[Predict],
    samples: Sequence[Sample],
    num_classes: int,
    palette: Sequence[int],
    how: EvalMode,
    device: torch.device,
    progress: Progress | None = None,
) -> list[Example]:
    """Returns the examples of one network, or of one before and one after; those with no labelled pixel are left out."""
    seers = [
        Network(network, num_classes, device, 1, preprocessing_of(network))
        for network in networks
    ]
    places = np.linspace(0, len(samples) - 1, min(NUM_TRIED, len(samples))).round().astype(int)

    tried = []
    for done, place in enumerate(places, start=1):
        image, labels = samples[place].load()
        labels = _known_labels(labels, num_classes)
        maps = []
        for seer in seers:
            with torch.inference_mode():
                (predicted,) = label_maps(seer, [prepare(image, how)], how)
            maps.append(predicted.cpu().numpy().astype(np.uint8))
        known = labels != IGNORE_INDEX
        if known.any():
            right = tuple(float(np.mean(own[known] == labels[known])) for own in maps)
            tried.append(_Tried(samples[place], tuple(maps), right))
        if progress is not None:
            progress(done, len(places))

    # The worst half first; of the rest, those around the median.
    tried.sort(key=lambda one: one.loss, reverse=True)
    num_worst = min(NUM_SHOWN // 2, (len(tried) + 1) // 2)
    others = tried[num_worst:]
    num_typical = min(NUM_SHOWN - num_worst, len(others))
    middle = len(tried) // 2 - num_worst
    first = max(0, min(len(others) - num_typical, middle - num_typical // 2))

    examples = [_draw(one, "worst", num_classes, palette) for one in tried[:num_worst]]
    for one in others[first : first + num_typical]:
        examples.append(_draw(one, "typical", num_classes, palette))
    return examples


def _known_labels(labels: Bytes, num_classes: int) -> Bytes:
    """Returns the labels, with those that are no class ignored, as they are where a network is scored."""
    known: Bytes = np.where(labels < num_classes, labels, IGNORE_INDEX).astype(np.uint8)
    return known


def _draw(
    one: _Tried, rule: Literal["worst", "typical"], num_classes: int, palette: Sequence[int]
) -> Example:
    # Read again: pixels of all that were tried would take much memory.
    image, labels = one.sample.load()
    labels = _known_labels(labels, num_classes)
    scale = min(1.0, LONGEST / max(labels.shape))
    size = (max(1, round(labels.shape[1] * scale)), max(1, round(labels.shape[0] * scale)))

    photo = io.BytesIO()
    Image.fromarray(as_rgb(image)).resize(size, Image.Resampling.BILINEAR).save(
        photo, format="JPEG", quality=QUALITY
    )
    after = one.maps[-1]
    before = one.maps[0] if len(one.maps) > 1 else None
    present = np.union1d(labels, after)
    return Example(
        name=one.sample.name,
        rule=rule,
        size=size,
        image=_data_uri(photo, "jpeg"),
        truth=_map_uri(labels, palette, size),
        before="" if before is None else _map_uri(before, palette, size),
        after=_map_uri(after, palette, size),
        changed=_change_uri(labels, before, after, size),
        right=(one.right[0] if before is not None else None, one.right[-1]),
        classes=tuple(int(k) for k in present if k != IGNORE_INDEX),
    )


def _map_uri(labels: Bytes, palette: Sequence[int], size: tuple[int, int]) -> str:
    """Returns the classes in their colours; black, mostly background, and what is ignored hide nothing."""
    colours = np.array(palette, dtype=np.uint8).reshape(256, 3)
    colours[IGNORE_INDEX] = 0
    return _palette_uri(labels, colours, size)


def _change_uri(
    labels: Bytes, before: Bytes | None, after: Bytes, size: tuple[int, int]
) -> str:
    """Returns where the two networks differ, and whose fault it is; of one network, where it is wrong."""
    if before is None:
        kinds = np.where(after == labels, SAME, LOST)
    else:
        kinds = np.where(after == labels, GAINED, np.where(before == labels, LOST, OTHER))
        kinds[before == after] = SAME
    kinds[labels == IGNORE_INDEX] = SAME

    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(CHANGES)] = CHANGES
    return _palette_uri(kinds.astype(np.uint8), colours, size)


def _palette_uri(values: Bytes, colours: Bytes, size: tuple[int, int]) -> str:
    """Returns a image of the values in their colours [256, 3], transparent where that is black."""
    # Values must not be mixed, so that the nearest one is taken.
    drawn = Image.fromarray(values).resize(size, Image.Resampling.NEAREST)
    drawn.putpalette(colours.tobytes())
    transparency = (255 * colours.any(axis=1)).astype(np.uint8).tobytes()
    file = io.BytesIO()
    drawn.save(file, format="PNG", optimize=True, transparency=transparency)
    return _data_uri(file, "png")


def _data_uri(file: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
