"""The label check before training: mistakes in a data set found before they cost hours.

Every mask is read whole; of an image only the header is, for its size. Counts are pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from segprune.data.pixels import Location, describe_unequal
from segprune.data.samples import Pair, Source
from segprune.data.transforms import IGNORE_INDEX

_TURNED_BY_A_QUARTER = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_MAX_LABELS_NAMED = 5


@dataclass(frozen=True)
class LabelReport:
    """What the masks hold. `absent` are the classes without a pixel in the first split that was read."""

    num_images: dict[str, int]  # per split
    pixels: tuple[int, ...]  # per class, over all splits read
    ignored: int
    absent: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass
class _Tally:
    """Grows while the files are read: per kind of mistake its first message and number of files; counts."""

    num_classes: int
    trained: bool  # the network, so that its number of classes is fixed
    first: dict[str, str] = field(default_factory=dict)
    num_bad: dict[str, int] = field(default_factory=dict)
    counts: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)  # [256] per split
    num_masks_at_limit: int = 0  # masks that hold the label num_classes
    turned: list[Location] = field(default_factory=list)  # images with an EXIF orientation

    def add(self, kind: str, message: str) -> None:
        self.first.setdefault(kind, message)
        self.num_bad[kind] = self.num_bad.get(kind, 0) + 1


def check_labels(
    source: Source,
    num_classes: int,
    splits: Sequence[str] = ("train", "val"),
    progress: Callable[[int, int], None] | None = None,
    trained: bool = False,
) -> LabelReport:
    """Reads the masks of the splits and refuses what would train wrongly.

    `progress` is called with (masks done, masks in all). `trained` says that `num_classes` belongs to a network that
    exists already, which decides what the messages advise. The label `num_classes` is ignored, with a note.

    Raises FileNotFoundError for missing lists, images and masks, and ValueError for masks that are unreadable or
    coloured, sizes that differ within a pair, labels above `num_classes` other than 255, classes numbered from 1, a
    split in which every pixel is ignored, and a first split whose masks hold nothing but 0 and 255. Where single files
    are wrong, the message names the first one and counts all of them.
    """
    if not 1 <= num_classes <= IGNORE_INDEX:
        raise ValueError(
            f"`num_classes` is {num_classes}, where 1..{IGNORE_INDEX} is allowed; label 255 is ignored."
        )

    # List every split first, so that a missing one is reported before anything is read.
    samples = {split: source.split(split) for split in splits}
    total = sum(len(pairs) for pairs in samples.values())
    tally = _Tally(num_classes, trained)

    # Read on after a mistake: the message counts all the files that have it.
    done = 0
    for split, pairs in samples.items():
        tally.counts[split] = np.zeros(256, dtype=np.int64)
        for pair in pairs:
            _inspect(pair, split, tally, source)
            done += 1
            if progress is not None:
                progress(done, total)

    # One sentence about the kind of mistake that was met first.
    if tally.first:
        kind, message = next(iter(tally.first.items()))
        raise ValueError(
            f"{message.removesuffix('.')} ({tally.num_bad[kind]} of {total} files {kind})."
        )

    counts = np.sum(list(tally.counts.values()), axis=0)
    # A layout that renumbers its labels defines them, so these mistakes cannot occur.
    if source.own_numbering:
        _check_binary(samples[splits[0]], tally.counts[splits[0]], num_classes)
        _check_first_label(counts, num_classes)
    # A split of ignored pixels alone gives a loss of NaN and no score.
    for split, pairs in samples.items():
        if not tally.counts[split][:num_classes].any():
            raise ValueError(
                f"Every pixel in the {len(pairs)} masks of {split} is ignored (its label is {IGNORE_INDEX} or "
                "`num_classes`), so that nothing can be learnt or scored; correct the masks, or use another split."
            )

    # Classes are learnt from the first split, so only their absence there matters.
    absent = np.flatnonzero(tally.counts[splits[0]][:num_classes] == 0)
    return LabelReport(
        num_images={split: len(pairs) for split, pairs in samples.items()},
        pixels=tuple(counts[:num_classes].tolist()),
        ignored=int(counts[num_classes:].sum()),
        absent=tuple(absent.tolist()),
        notes=(*source.notes, *_write_notes(tally, counts, absent.tolist(), splits[0])),
    )


def _inspect(pair: Pair, split: str, tally: _Tally, source: Source) -> None:
    """Adds what one pair holds, and what is wrong with it, to the tally."""
    # Without a mask there is nothing to count or to compare, so the pair ends here.
    try:
        mask = pair.load_labels()
    except ValueError as error:
        tally.add("have a mask that cannot be used", str(error))
        return

    try:
        size, orientation = pair.read_header()
    except ValueError as error:
        tally.add("have an image that cannot be read", str(error))
        return

    # The mask has the image's size as stored, or that of the upright image.
    if orientation != 1:
        tally.turned.append(pair.image)
    fits_upright = orientation in _TURNED_BY_A_QUARTER and size[::-1] == mask.shape
    if size != mask.shape and not fits_upright:
        tally.add(
            "have a mask of another size",
            describe_unequal(pair.image, pair.mask, size, mask.shape),
        )

    # A byte has 256 values; counting them all shows unexpected labels as well.
    counts = np.bincount(mask.reshape(-1), minlength=256)
    tally.counts[split] += counts
    num_classes = tally.num_classes
    if num_classes != IGNORE_INDEX and counts[num_classes]:
        tally.num_masks_at_limit += 1

    # The label num_classes is let through: it is ignored, and a note says so.
    wrong = [
        label for label in np.flatnonzero(counts).tolist() if num_classes < label < IGNORE_INDEX
    ]
    if wrong:
        tally.add("have such labels", _describe_labels(pair.mask, wrong, tally, source))


def _describe_labels(mask: Location, wrong: list[int], tally: _Tally, source: Source) -> str:
    """Returns the message for a mask with labels that are out of range."""
    # A coloured mask read as numbers can hold hundreds of labels; name a few.
    labels = ", ".join(map(str, wrong[:_MAX_LABELS_NAMED]))
    if len(wrong) > _MAX_LABELS_NAMED:
        labels += ", …"

    numbering = "" if source.own_numbering else f" (as the layout {source.layout} numbers them)"
    # The classes of a trained network are fixed, so the masks have to change.
    remedy = "raise `num_classes` or relabel the masks"
    if tally.trained:
        remedy = "relabel the masks, or give a network that was trained for these classes"

    return (
        f"Mask {mask} holds the label{'s' * (len(wrong) > 1)} {labels}{numbering}, where 0..{tally.num_classes - 1} "
        f"and {IGNORE_INDEX} (ignored) are allowed with {tally.num_classes} classes; {remedy}."
    )


def _check_binary(
    pairs: tuple[Pair, ...], counts: npt.NDArray[np.int64], num_classes: int
) -> None:
    """Raises ValueError if a split holds nothing but 0 and 255: then the object was painted 255, which is ignored."""
    # With a single class, 0 and 255 is what a correct mask holds.
    if num_classes < 2 or not counts[IGNORE_INDEX] or counts[1:IGNORE_INDEX].any():
        return

    # Read the masks again, since the counts do not say which of them hold 255.
    holders = [pair.mask for pair in pairs if (pair.load_labels() == IGNORE_INDEX).any()]
    raise ValueError(
        f"Mask {holders[0]} and all others hold only 0 and 255, where the pixel value must be the class and "
        f"255 is ignored; paint the object 1 instead of 255 ({len(holders)} of {len(pairs)} masks hold 255)."
    )


def _check_first_label(counts: npt.NDArray[np.int64], num_classes: int) -> None:
    """Raises ValueError if the classes are numbered from 1: no mask holds 0, and some hold the label num_classes."""
    # One 0 anywhere shows that counting starts there.
    if num_classes < 2 or num_classes == IGNORE_INDEX or counts[0] or not counts[num_classes]:
        return

    raise ValueError(
        f"The masks hold labels up to {num_classes} and no 0, where {num_classes} classes are numbered from 0 to "
        f"{num_classes - 1}; give `label_offset` -1 if the classes are numbered from 1, or paint {num_classes} as "
        f"{IGNORE_INDEX} if it is to be ignored."
    )


def _write_notes(
    tally: _Tally, counts: npt.NDArray[np.int64], absent: list[int], first: str
) -> tuple[str, ...]:
    num_classes = tally.num_classes
    notes = []

    # A class that training never sees.
    if absent:
        names = ", ".join(map(str, absent))
        notes.append(
            f"Without a pixel in the masks of {first}, so never learnt: class {names}."
        )

    # Some scripts paint borders with the first free number.
    if tally.num_masks_at_limit:
        # The share tells a stray pixel from a whole class that would be lost.
        share = 100 * counts[num_classes] / counts.sum()
        remedy = f"num_classes must be {num_classes + 1}"
        if tally.trained:
            remedy = f"the network needs {num_classes + 1} of them"
        notes.append(
            f"The label {num_classes} = num_classes is ignored ({tally.num_masks_at_limit} masks, {share:.1f} % of "
            f"all pixels); if it is a class, {remedy}."
        )

    # Of a half turn or a mirror, sizes do not tell which way the mask lies.
    if tally.turned:
        notes.append(
            f"{len(tally.turned)} images carry an EXIF orientation ({tally.turned[0]} first) and are read as stored "
            "unless only the turned image has the mask's size; save them upright to be sure."
        )

    return tuple(notes)
