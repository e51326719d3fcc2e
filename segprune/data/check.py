"""The label check before training: mistakes in a data set found before they cost hours.

Every mask is read whole; of an image only the header is, for its size. Counts are pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from segprune.data.pixels import Place, size_message
from segprune.data.samples import Pair, Source
from segprune.data.transforms import IGNORE_INDEX


@dataclass(frozen=True)
class LabelReport:
    """What the masks hold. `absent` are the classes without a pixel in the first split that was read."""

    num_images: dict[str, int]  # per split
    pixels: tuple[int, ...]  # per class, over all splits read
    ignored: int
    absent: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass
class _Findings:
    """Grows while the files are read: per kind of mistake its first message and number of files; counts."""

    num_classes: int
    trained: bool  # the network, so its number of classes is given
    first: dict[str, str] = field(default_factory=dict)
    num_bad: dict[str, int] = field(default_factory=dict)
    counts: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)  # [256] per split
    num_masks_at_limit: int = 0  # masks that hold the label num_classes
    turned: list[Place] = field(default_factory=list)  # images with an EXIF orientation

    def add(self, kind: str, message: str) -> None:
        self.first.setdefault(kind, message)
        self.num_bad[kind] = self.num_bad.get(kind, 0) + 1


def check_labels(
    source: Source,
    num_classes: int,
    splits: Sequence[str] = ("train", "val"),
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    trained: bool = False,
) -> LabelReport:
    """Reads the masks of the splits (the first `limit` of each) and refuses what would train wrongly.

    `progress` is called with (masks done, masks in all); `trained` says that `num_classes` is that of a network that
    there is already, which decides what is advised. Raises FileNotFoundError for missing lists, images
    and masks, and ValueError for masks that are RGB or unreadable, sizes that differ within a pair, labels
    above `num_classes` other than 255, and a first split whose masks hold nothing but 0 and 255. The message
    names the first file found and counts the files alike. The label `num_classes` is ignored, with a note.
    """
    if not 1 <= num_classes <= IGNORE_INDEX:
        raise ValueError(f"num_classes is {num_classes}, where 1..{IGNORE_INDEX} is allowed; label 255 is ignored.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, where at least 1 is allowed; leave it out to read every mask.")
    samples = {split: source.split(split)[:limit] for split in splits}
    findings = _Findings(num_classes, trained)
    total, done = sum(map(len, samples.values())), 0
    for split, chosen in samples.items():
        findings.counts[split] = np.zeros(256, dtype=np.int64)
        for sample in chosen:
            _inspect(sample, split, findings, source)
            done += 1
            if progress is not None:
                progress(done, total)
    if findings.first:
        kind, message = next(iter(findings.first.items()))
        raise ValueError(f"{message.removesuffix('.')} ({findings.num_bad[kind]} of {total} files {kind}).")
    if source.own_numbering:
        _check_binary(samples[splits[0]], findings.counts[splits[0]], num_classes)
    return _report(samples, findings, splits[0], limit)


def _inspect(sample: Pair, split: str, findings: _Findings, source: Source) -> None:
    try:
        mask = sample.labels()
    except ValueError as error:
        findings.add("have a mask that cannot be used", str(error))
        return
    try:
        size, orientation = sample.header()
    except ValueError as error:
        findings.add("have an image that cannot be read", str(error))
        return
    if orientation != 1:
        findings.turned.append(sample.image)
    if size != mask.shape and not (orientation in (5, 6, 7, 8) and size[::-1] == mask.shape):
        findings.add("have a mask of another size", size_message(sample.image, sample.mask, size, mask.shape))
    counts = np.bincount(mask.reshape(-1), minlength=256)
    findings.counts[split] += counts
    findings.num_masks_at_limit += bool(findings.num_classes != IGNORE_INDEX and counts[findings.num_classes])
    wrong = [int(value) for value in np.flatnonzero(counts) if findings.num_classes < value < IGNORE_INDEX]
    if wrong:
        findings.add("have such labels", _range_message(sample.mask, wrong, findings, source))


def _range_message(mask: Place, wrong: list[int], findings: _Findings, source: Source) -> str:
    num_classes = findings.num_classes
    raised = "raise --num_classes or relabel the masks"
    remedy = "relabel the masks, or give a network that was trained for these classes" if findings.trained else raised
    values = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
    counted = "" if source.own_numbering else f" (as the layout {source.layout} numbers them)"
    return (
        f"Mask {mask} holds the label{'s' * (len(wrong) > 1)} {values}{counted}, where 0..{num_classes - 1} and "
        f"{IGNORE_INDEX} (ignored) are allowed with {num_classes} classes; {remedy}."
    )


def _check_binary(samples: tuple[Pair, ...], counts: npt.NDArray[np.int64], num_classes: int) -> None:
    """Many a mask rightly holds 255, to be ignored; a split with nothing but 0 beside it was painted wrong."""
    if num_classes < 2 or not counts[IGNORE_INDEX] or counts[1:IGNORE_INDEX].any():
        return
    holders = [sample.mask for sample in samples if (sample.labels() == IGNORE_INDEX).any()]
    raise ValueError(
        f"Mask {holders[0]} and all others hold only 0 and 255, where the pixel value must be the class and "
        f"255 is ignored; paint the object 1 instead of 255 ({len(holders)} of {len(samples)} masks hold 255)."
    )


def _report(samples: dict[str, tuple[Pair, ...]], findings: _Findings, first: str, limit: int | None) -> LabelReport:
    num_classes = findings.num_classes
    counts = np.sum(list(findings.counts.values()), axis=0)
    absent = tuple(int(c) for c in np.flatnonzero(findings.counts[first][:num_classes] == 0))
    notes = []
    if absent:
        names = ", ".join(map(str, absent))
        notes.append(f"Without a pixel in the masks of {first}, so never learnt: class {names}.")
    if findings.num_masks_at_limit:
        share = 100 * counts[num_classes] / counts.sum()
        wanted = (
            f"the network needs {num_classes + 1} of them"
            if findings.trained
            else f"--num_classes must be {num_classes + 1}"
        )
        notes.append(
            f"The label {num_classes} = num_classes is ignored ({findings.num_masks_at_limit} masks, "
            f"{share:.1f} % of all pixels); if it is a class, {wanted}."
        )
    if findings.turned:
        notes.append(
            f"{len(findings.turned)} images carry an EXIF orientation ({findings.turned[0]} first) and are read "
            "as stored unless only the turned picture has the mask's size; save them upright to be sure."
        )
    if limit is not None:
        notes.append(f"Only the first {limit} masks of each split were read.")
    return LabelReport(
        num_images={split: len(chosen) for split, chosen in samples.items()},
        pixels=tuple(int(n) for n in counts[:num_classes]),
        ignored=int(counts[num_classes:].sum()),
        absent=absent,
        notes=tuple(notes),
    )
