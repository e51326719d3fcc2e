"""What a data set is, whatever its layout: splits of samples, class names, a palette; and how torch is served.

A sample is cheap: it knows where its two images lie and reads them when it is loaded. What a layout does to labels
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
from segprune.data.pixels import (
    Colour,
    Location,
    SampleError,
    describe_unequal,
    load_image,
    load_mask,
    read_header,
)
from segprune.data.transforms import IGNORE_INDEX, IMAGENET, Bytes, Transform, normalise
from segprune.spec import RGB, Preprocessing

Progress = Callable[[int, int], None]
S = TypeVar("S", bound="Sample")


class MissingSplitError(FileNotFoundError):
    """A data set has no split of that name; other files that are missing raise a plain FileNotFoundError."""


class Sample(Protocol):
    """One image and its labels. `name` is unique in the split; `str` is what an error names."""

    @property
    def name(self) -> str: ...

    def load(self) -> tuple[Bytes, Bytes]:
        """Returns the image [H, W, C] uint8 and its labels [H, W] uint8, 255 ignored.

        Raises ValueError where they cannot be used.
        """
        ...


@dataclass(frozen=True, slots=True)
class Pair:
    """A sample of every layout: where its image and its mask lie, and the layout's table of labels."""

    name: str
    image: Location
    mask: Location
    table: bytes | None = None  # 256 labels by the mask's value; None: the value is the label
    colours: tuple[Colour, ...] = ()  # of the classes; a coloured mask is read by them
    channels: int = RGB  # of the image that the network takes

    def __str__(self) -> str:
        return str(self.image)

    def load_labels(self) -> Bytes:
        """Returns [H, W] uint8."""
        mask = load_mask(self.mask, self.colours)
        return (
            mask if self.table is None else np.frombuffer(self.table, dtype=np.uint8).take(mask)
        )

    def read_header(self) -> tuple[tuple[int, int], int]:
        """Returns the image's size (H, W) as stored and its EXIF orientation, without decoding it."""
        return read_header(self.image, self.channels)

    def load(self) -> tuple[Bytes, Bytes]:
        """Returns image [H, W, C] and labels [H, W]. Raises SampleError for unreadable files and unequal sizes."""
        # The upright image is decoded only where the stored one does not fit.
        image = load_image(self.image, channels=self.channels)
        labels = self.load_labels()

        # The mask of a turned image may have been drawn on the image as stored or on the upright one.
        if image.shape[:2] != labels.shape:
            upright = load_image(self.image, upright=True, channels=self.channels)
            if upright.shape[:2] != labels.shape:
                raise SampleError(
                    describe_unequal(self.image, self.mask, image.shape, labels.shape)
                )
            image = upright

        return image, labels


@dataclass(frozen=True)
class Source:
    """An opened data set. Opening reads no image; a split is listed when `split` is called."""

    layout: str
    root: str
    class_names: tuple[str, ...]  # () if unknown
    palette: tuple[int, ...]  # 768 numbers, R G B by class
    lister: Callable[[str], tuple[Pair, ...]] = field(repr=False, compare=False)
    own_numbering: bool = True  # whether the values in the masks are the labels themselves
    notes: tuple[str, ...] = ()  # what was taken for granted when the set was opened

    def split(self, name: str) -> tuple[Pair, ...]:
        """Returns the samples of "train", "val" or another split, in an order that is always the same.

        "all" is what a set holds that has no splits. Raises MissingSplitError, a FileNotFoundError, where there is no
        such split, FileNotFoundError where one of its files is missing, and ValueError where it is empty.
        """
        return self.lister(name)

    def with_split(self, name: str, samples: Sequence[Pair]) -> Source:
        """Returns the data set with these samples as the split of that name, for instance the readable ones."""
        # All other splits are listed as before.
        list_others = self.lister
        own = tuple(samples)
        return replace(self, lister=lambda split: own if split == name else list_others(split))


def shift_labels(source: Source, offset: int, ignore_index: int = IGNORE_INDEX) -> Source:
    """Returns the data set with `offset` added to every label; 255, and what would be negative, is ignored.

    -1 makes classes of masks in which they are numbered from 1, and 0 is to be ignored. The label `ignore_index`, as
    it is after that, is ignored too. Raises ValueError for offsets outside of -254..0.
    """
    # A positive offset would move class 254 onto the ignored 255.
    if not -254 <= offset <= 0:
        raise ValueError(
            f"`label_offset` is {offset}, where -254..0 is allowed; -1 is for classes numbered from 1."
        )
    if offset == 0 and ignore_index == IGNORE_INDEX:
        return source

    labels = [*[255] * -offset, *range(255 + offset), 255]  # new label by the old one
    shifted = bytes(255 if label == ignore_index else label for label in labels)

    def list_shifted(split: str) -> tuple[Pair, ...]:
        # Pairs with equal tables share the new one too, which saves memory in large sets.
        pairs = source.split(split)
        tables = {
            pair.table: shifted if pair.table is None else pair.table.translate(shifted)
            for pair in pairs
        }
        return tuple(replace(pair, table=tables[pair.table]) for pair in pairs)

    own_numbering = source.own_numbering and offset == 0
    return replace(source, lister=list_shifted, own_numbering=own_numbering)


def with_channels(source: Source, channels: int) -> Source:
    """Returns the data set with its images read with so many channels."""

    def list_read(split: str) -> tuple[Pair, ...]:
        return tuple(replace(pair, channels=channels) for pair in source.split(split))

    return source if channels == RGB else replace(source, lister=list_read)


class SegmentationData(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pixels [C, H, W] float32 normalised and labels [H, W] int64; labels >= num_classes become IGNORE_INDEX.

    What the transform draws depends on (seed, epoch, index) alone. Workers take a copy of the data set when
    they start, so `set_epoch` reaches only those started after it: leave persistent_workers off.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        num_classes: int,
        transform: Transform,
        seed: int = 0,
        preprocessing: Preprocessing = IMAGENET,
    ) -> None:
        self.samples = tuple(samples)
        self.num_classes = num_classes
        self.transform = transform
        self.seed = seed
        self.preprocessing = preprocessing
        self.epoch = 0
        # A table of 256 targets makes the cut at num_classes one look-up per pixel.
        values = np.arange(256)
        self._targets = np.where(values < num_classes, values, IGNORE_INDEX)  # int64 by label

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, labels = self.samples[index].load()

        # One generator per sample, so that neither workers nor order change what is drawn.
        rng = np.random.default_rng([self.seed, self.epoch, index])
        image, labels = self.transform(image, labels, rng)
        pixels = normalise(image, self.preprocessing)
        return pixels, torch.from_numpy(self._targets.take(labels))


def readable(
    samples: Sequence[S], num_workers: int = 0, progress: Progress | None = None
) -> tuple[tuple[S, ...], tuple[str, ...]]:
    """Decodes every pair once. Returns the samples that can be used, in order, and the messages of the others.

    `num_workers` processes share the work. Raises ValueError if not one sample can be used.
    """
    good: list[S] = []
    bad: list[str] = []

    # Complaints come in the order of the samples.
    for complaints in _try_all(samples, num_workers):
        for complaint in complaints:
            sample = samples[len(good) + len(bad)]
            if complaint is None:
                good.append(sample)
            else:
                bad.append(complaint)

        if progress is not None:
            progress(len(good) + len(bad), len(samples))

    # Without a single good image the cause is the data set, not some files.
    if bad and not good:
        raise ValueError(
            f"None of {len(bad)} images can be used; repair the data set, beginning with this: {bad[0]}"
        )
    return tuple(good), tuple(bad)


def _try_all(samples: Sequence[Sample], num_workers: int) -> Iterator[list[str | None]]:
    """Yields for a few samples at a time what is wrong with each, None where nothing is."""
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
        # Exceptions become text here, since an error in a worker would end the whole pass.
        try:
            sample.load()
            complaints.append(None)
        except (ValueError, OSError) as error:
            complaints.append(str(error))

    return complaints
