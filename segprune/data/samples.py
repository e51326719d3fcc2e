"""What a data set is, whatever its layout: splits of samples, class names, a palette; and how torch is served.

A sample is cheap: it knows where its two pictures lie and reads them when asked. What a layout does to labels
(another numbering, classes that are ignored) is a table of 256 entries, applied when a mask is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from segprune.data.loading import load_batches
from segprune.data.pixels import Place, SampleError, header, load_image, load_mask, size_message
from segprune.data.transforms import IGNORE_INDEX, Bytes, Transform, normalise

Progress = Callable[[int, int], None]
S = TypeVar("S", bound="Sample")


class Sample(Protocol):
    """One picture and its labels. `name` is unique in the split; `str` is what an error names."""

    @property
    def name(self) -> str: ...

    def load(self) -> tuple[Bytes, Bytes]:
        """Image [H, W, 3] uint8 RGB and labels [H, W] uint8, 255 ignored; ValueError where they cannot be used."""
        ...


@dataclass(frozen=True, slots=True)
class Pair:
    """A sample of every layout: where its image and its mask lie, and the layout's table of labels."""

    name: str
    image: Place
    mask: Place
    table: bytes | None = None  # 256 labels by the mask's value; None: the value is the label

    def __str__(self) -> str:
        return str(self.image)

    def labels(self) -> Bytes:
        """[H, W] uint8."""
        mask = load_mask(self.mask)
        return mask if self.table is None else np.frombuffer(self.table, dtype=np.uint8).take(mask)

    def header(self) -> tuple[tuple[int, int], int]:
        """The image's size (H, W) as stored and its EXIF orientation, without decoding it."""
        return header(self.image)

    def load(self) -> tuple[Bytes, Bytes]:
        """Image [H, W, 3] and labels [H, W]; SampleError where one cannot be read or their sizes differ."""
        image, labels = load_image(self.image), self.labels()
        if image.shape[:2] != labels.shape:
            upright = load_image(self.image, upright=True)
            if upright.shape[:2] != labels.shape:
                raise SampleError(size_message(self.image, self.mask, image.shape, labels.shape))
            image = upright
        return image, labels


@dataclass(frozen=True)
class Source:
    """An opened data set. Opening reads no picture; a split is listed when it is asked for."""

    layout: str
    root: str
    class_names: tuple[str, ...]  # () if unknown
    palette: tuple[int, ...]  # 768 numbers, R G B by class
    lister: Callable[[str], tuple[Pair, ...]] = field(repr=False, compare=False)
    own_numbering: bool = True  # whether the values in the masks are the labels themselves

    def split(self, name: str) -> tuple[Pair, ...]:
        """The samples of "train", "val" or another split, in an order that is always the same.

        Raises FileNotFoundError where the split or one of its files is missing, ValueError where it is empty.
        """
        return self.lister(name)

    def with_split(self, name: str, samples: Sequence[Pair]) -> Source:
        """The same data set with these samples as the split of that name, for instance the readable ones."""
        others, kept = self.lister, tuple(samples)
        return replace(self, lister=lambda asked: kept if asked == name else others(asked))


class SegmentationData(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pixels [3, H, W] float32 normalised and labels [H, W] int64; labels >= num_classes become IGNORE_INDEX.

    What the transform draws depends on (seed, epoch, index) alone. Workers take a copy of the data set when
    they start, so `set_epoch` reaches only those started after it: leave persistent_workers off.
    """

    def __init__(self, samples: Sequence[Sample], num_classes: int, transform: Transform, seed: int = 0) -> None:
        self.samples = tuple(samples)
        self.num_classes = num_classes
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        values = np.arange(256)
        self._targets = np.where(values < num_classes, values, IGNORE_INDEX)  # int64 by label

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, labels = self.samples[index].load()
        rng = np.random.default_rng([self.seed, self.epoch, index])
        image, labels = self.transform(image, labels, rng)
        return normalise(image), torch.from_numpy(self._targets.take(labels))


def readable(
    samples: Sequence[S], num_workers: int = 0, progress: Progress | None = None
) -> tuple[tuple[S, ...], tuple[str, ...]]:
    """Decodes every pair once: the samples that can be used, in order, and the messages of those that cannot.

    `num_workers` processes share the work. ValueError where not one sample is left.
    """
    good: list[S] = []
    bad: list[str] = []
    for complaints in _complaints(samples, num_workers):
        for complaint in complaints:
            sample = samples[len(good) + len(bad)]
            if complaint is None:
                good.append(sample)
            else:
                bad.append(complaint)
        if progress is not None:
            progress(len(good) + len(bad), len(samples))
    if bad and not good:
        raise ValueError(f"None of {len(bad)} pictures can be used; mend the data set, beginning with this: {bad[0]}")
    return tuple(good), tuple(bad)


def _complaints(samples: Sequence[Sample], num_workers: int) -> Iterator[list[str | None]]:
    """For a few samples at a time, what is wrong with each."""
    yield from load_batches(
        samples,
        batch_size=8,
        num_workers=num_workers,
        collate_fn=_try,
        generator=torch.Generator(),  # a loader draws a number; not from the global generator
    )


def _try(samples: Sequence[Sample]) -> list[str | None]:
    complaints: list[str | None] = []
    for sample in samples:
        try:
            sample.load()
            complaints.append(None)
        except (ValueError, OSError) as error:
            complaints.append(str(error))
    return complaints
