"""What a score is made of: whole numbers counted pixel by pixel, and the ratios read off them at the end.

The counts of all pictures are added up first, so the IoU of a class is its intersection over its union in all of
them together, whoever counted them and in which order. A class of which nothing was counted has no value (None) and
does not enter the mean.

Boundary IoU (arXiv 2103.16562) is the IoU of the two masks' rims alone: of the pixels of a class that lie within d
of its contour, the picture's edge included, d being 2 % of the picture's diagonal. Distances are in whole pixels
along the axes and diagonals alike, as in the authors' erosion by a 3×3 square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

T = TypeVar("T")
Ratios = tuple[float | None, ...]

IGNORED = 255  # what a pixel's prediction and label become where its label is no class
BOUNDARY_RATIO = 0.02  # of the diagonal


@dataclass(frozen=True)
class Score:
    """Shares in [0, 1]; per class, None where nothing was counted that could be divided by.

    Recall is the share of a class's labelled pixels that were found, precision the share of those predicted that
    are right; `mean_accuracy` is the mean recall. `boundary_miou` and `boundary_iou` are None where no boundaries
    were counted. Rows of `confusion` are labels, columns predictions; it is empty where only the ratios were kept.
    """

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    iou: Ratios
    recall: Ratios
    precision: Ratios
    num_images: int
    boundary_miou: float | None = None
    boundary_iou: Ratios | None = None
    confusion: tuple[tuple[int, ...], ...] = ()


class Tally:
    """Pixels counted so far: `counts` is one int64 tensor, so that those of batches and processes can be added up.

    It holds the K×K confusion matrix, labels by predictions; with `boundary` also each class's intersection and
    then each class's union of the two rims.
    """

    def __init__(self, num_classes: int, *, boundary: bool = False, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.boundary = boundary
        size = num_classes * (num_classes + 2 * boundary)
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Count one picture, H W each and on the tally's device; labels that are not below K are ignored."""
        k = self.num_classes
        valid = labels < k
        # what is ignored goes into one bin more, which is cheaper than picking out the rest
        index = torch.where(valid, labels.int() * k + predicted.int(), k * k)
        self.counts[: k * k] += torch.bincount(index.flatten(), minlength=k * k + 1)[:-1]
        if self.boundary:
            rims = [_rims(torch.where(valid, x.to(torch.uint8), IGNORED)) for x in (predicted, labels)]
            self.counts[k * k :] += _rim_counts(rims[0], rims[1], k)


def _rims(regions: Tensor) -> Tensor:
    """[H, W] with everything ignored that is farther than d from another value or the picture's edge."""
    height, width = regions.shape
    reach = max(1, round(BOUNDARY_RATIO * math.hypot(height, width)))
    rim = _window_max(regions, reach) != 255 - _window_max(255 - regions, reach)  # not all the same
    rim[:reach] = rim[-reach:] = True
    rim[:, :reach] = rim[:, -reach:] = True
    return torch.where(rim, regions, IGNORED)


def _window_max(values: Tensor, reach: int) -> Tensor:
    """The highest value of [H, W] within `reach` pixels of each in both directions.

    A window of so many pixels is two overlapping ones half as long, so the costs grow with the reach's logarithm.
    """
    size = 2 * reach + 1
    for _ in range(2):
        values = F.pad(values, (reach, reach)).T.contiguous()  # padding with 0, the lowest
        length = 1
        while length < size:
            step = min(length, size - length)
            values = torch.maximum(values[:-step], values[step:])
            length += step
    return values


def _rim_counts(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """2K: what both rims share of each class, then what either has."""
    counted = [
        torch.bincount(rim.flatten().int(), minlength=IGNORED + 1)[:num_classes]
        for rim in (torch.where(predicted == labels, labels, IGNORED), predicted, labels)
    ]
    shared, *each = counted
    return torch.cat([shared, each[0] + each[1] - shared])


def score(counts: Tensor, num_classes: int, num_images: int) -> Score:
    """Read a `Score` off a tally's counts; ValueError where no pixel had a label."""
    counts = counts.cpu()
    size = num_classes * num_classes
    confusion = counts[:size].view(num_classes, num_classes)
    if int(confusion.sum()) == 0:
        raise ValueError("No labelled pixel was found, so there is nothing to score; check the masks' values.")
    right, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou, recall = _ratios(right, labelled + predicted - right), _ratios(right, labelled)
    boundary_iou = _ratios(*counts[size:].view(2, num_classes)) if len(counts) > size else None
    return Score(
        miou=_mean(iou),
        mean_accuracy=_mean(recall),
        pixel_accuracy=int(right.sum()) / int(confusion.sum()),
        iou=iou,
        recall=recall,
        precision=_ratios(right, predicted),
        num_images=num_images,
        boundary_miou=None if boundary_iou is None else _mean(boundary_iou),
        boundary_iou=boundary_iou,
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def _ratios(parts: Tensor, wholes: Tensor) -> Ratios:
    return tuple(a / b if b else None for a, b in zip(parts.tolist(), wholes.tolist(), strict=True))


def _mean(ratios: Ratios) -> float:
    known = [value for value in ratios if value is not None]
    return sum(known) / len(known)


def shard(samples: Sequence[T], process: int, processes: int) -> Sequence[T]:
    """What one of several processes scores: together they have each sample once, none two more than another."""
    assert 0 <= process < processes
    return samples[process::processes]
