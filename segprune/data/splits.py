"""A split to score on for data sets that come without one: another split, or a share set aside from train.

Images of one video or one drive are alike, and with some of them on both sides every score is too good. So whole
videos are set aside where the images' names show them: names that differ in their last number alone are of one video.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from segprune.data.samples import (
    MissingSplitError,
    Pair,
    Source,
    shift_labels,
    with_channels,
)
from segprune.data.transforms import IGNORE_INDEX, IMAGENET
from segprune.spec import Preprocessing

_MOST = 2.0  # times the share: videos that would take more are not set aside


@dataclass(frozen=True)
class DataChoices:
    """What a user says of a data set that its files do not: how labels are numbered, and what is scored on.

    Labels are read as `expected` says, which is what the network was trained with; a `label_offset` that is given
    overrules its own. `val_split` is another split to score on, `val_share` the share of train to set aside with
    `seed`.
    """

    label_offset: int | None = None
    val_split: str = ""
    val_share: float | None = None
    seed: int = 11
    expected: Preprocessing = IMAGENET

    def __post_init__(self) -> None:
        if self.val_split and self.val_share is not None:
            raise ValueError(
                "`val_split` and `val_share` both say what is scored on; leave one of them out."
            )

    def apply(self, source: Source) -> Source:
        """Returns the data set as it was chosen."""
        source = with_channels(self._read_labels(source), self.expected.num_channels)
        if self.val_split:
            return score_on(source, self.val_split)
        if self.val_share is not None:
            return set_val_aside(source, self.val_share, self.seed)
        return source

    def _read_labels(self, source: Source) -> Source:
        offset, ignored = self.label_offset, self.expected.ignore_index

        # A layout that numbers the labels anew has made classes of them already.
        if offset is None:
            offset = self.expected.label_offset if source.own_numbering else 0
        shifted = shift_labels(source, offset, ignored)

        # What the user did not say himself is told.
        if offset and self.label_offset is None:
            shifted = _add_note(
                shifted,
                f"{offset} is added to every label, as the checkpoint says (`label_offset` overrules).",
            )
        if ignored != IGNORE_INDEX:
            shifted = _add_note(shifted, f"The label {ignored} is ignored (`ignore_index`).")
        return shifted


def score_whole_pool(source: Source) -> Source:
    """Returns a data set that has no splits with all of it as "val", and any other as it is."""
    # Only a set without any split has "all", so nothing that was trained on is scored.
    try:
        source.split("val")
    except MissingSplitError:
        try:
            samples = source.split("all")
        except FileNotFoundError:
            return source  # whose val is missed where it is used
        note = f"{source.root} has no splits, so all of its {len(samples)} images are scored."
        return _add_note(source.with_split("val", samples), note)

    return source


def score_on(source: Source, split: str) -> Source:
    """Returns the data set with its split of that name as "val" too."""
    samples = source.split(split)
    return _add_note(
        source.with_split("val", samples),
        f"Scored on the {len(samples)} images of {split} (`val_split`).",
    )


def set_val_aside(source: Source, share: float, seed: int) -> Source:
    """Returns the data set with about this share of "train", or of a set without splits, as "val" instead.

    The same share and seed set the same images aside. Raises ValueError for a share outside of (0, 1), and where there
    is a "val" already or too few images.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"`val_share` is {share}, where a share above 0 and below 1 is allowed; 0.1 is usual."
        )

    # A val split that exists was made on purpose and must not be replaced in silence.
    try:
        source.split("val")
    except MissingSplitError:
        pass
    else:
        raise ValueError(
            f"`val_share` was given, but {source.root} has a val split; leave `val_share` out."
        )

    # A set without splits is divided whole.
    try:
        samples = source.split("train")
    except MissingSplitError:
        samples = source.split("all")
    if len(samples) < 2:
        raise ValueError(
            f"{source.root} has {len(samples)} image to train on, of which none can be set aside; add some."
        )

    chosen, how = _choose(samples, share, np.random.default_rng(seed))
    # Keep the order of the samples, so that only the choice depends on the seed.
    val = [sample for number, sample in enumerate(samples) if number in chosen]
    train = [sample for number, sample in enumerate(samples) if number not in chosen]
    note = f"Set aside to score on: {len(val)} of {len(samples)} images of train, {how}."
    return _add_note(source.with_split("train", train).with_split("val", val), note)


def _add_note(source: Source, note: str) -> Source:
    return replace(source, notes=(*source.notes, note))


def _choose(
    samples: Sequence[Pair], share: float, rng: np.random.Generator
) -> tuple[set[int], str]:
    """Returns the numbers of the samples to set aside, and in words how they were chosen."""
    # At least one image on either side.
    target = min(max(1, round(share * len(samples))), len(samples) - 1)

    # Whole videos in random order, unless these are too few or too long to come near the share.
    videos = _group(samples, _name_video)
    chosen: set[int] = set()
    names = []
    for index in rng.permutation(len(videos)):
        name, numbers = list(videos.items())[index]
        if len(chosen) < target and len(chosen) + len(numbers) <= _MOST * target:
            chosen.update(numbers)
            names.append(name)
    # Accept the videos if they came to at least half of the share.
    if (
        1 < len(videos) < len(samples)
        and 2 * len(chosen) >= target
        and len(chosen) < len(samples)
    ):
        return chosen, f"all of those named {', '.join(f'{name}…' for name in sorted(names))}"

    # Else one by one, Roboflow's versions of one image together.
    originals = list(_group(samples, _name_original).values())
    chosen = set()
    for index in rng.permutation(len(originals))[: max(1, len(originals) - 1)]:
        if len(chosen) < target:
            chosen.update(originals[index])

    return chosen, "drawn one by one, since their names show no videos of a fitting length"


def _group(samples: Sequence[Pair], name: Callable[[str], str]) -> dict[str, list[int]]:
    """Returns the numbers of the samples whose names become the same."""
    groups: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(name(sample.name), []).append(number)

    return groups


def _name_original(name: str) -> str:
    """Returns the name without what Roboflow adds to tell the versions of an image apart: a_jpg of a_jpg.rf.0a1b2c."""
    return re.sub(r"\.rf\.[0-9a-f]+$", "", name)


def _name_video(name: str) -> str:
    """Returns the name without its last number: 0001TP of 0001TP_006690, Seq05VD of Seq05VD_f00000."""
    return re.sub(r"[_\-. ]*[a-zA-Z]?\d+\D*$", "", _name_original(name))
