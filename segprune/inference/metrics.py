"""What a score is made of: pixels counted in whole numbers, and the ratios computed from the counts at the end.

The counts of all images are added up first. So the IoU of a class is its intersection over its union in all images
together, whoever counted them and in which order. A class without any counted pixel has no value (None) and is left
out of the mean.

Boundary IoU (arXiv 2103.16562) is the IoU of the two masks' rims alone: the pixels of a class that lie within d of
its contour, the image's edge included. d is 2 % of the image's diagonal. Distances are in whole pixels along the axes
and diagonals alike, as in the authors' erosion by a 3×3 square.
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
    """Shares in [0, 1]; per class, None where the ratio's denominator is 0.

    Recall is the share of a class's labelled pixels that were predicted as it, precision the share of the pixels
    predicted as it that are labelled so; `mean_accuracy` is the mean recall. `boundary_miou` and `boundary_iou` are
    None if boundaries were not counted. Rows of `confusion` are labels, columns predictions; it is empty if only
    the ratios were kept.
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
    """Pixels counted so far. `counts` is one int64 tensor, so that those of batches and processes can be added up.

    It holds the K×K confusion matrix, labels by predictions. With `boundary` it also holds the K intersections and
    then the K unions of the two rims.
    """

    def __init__(
        self, num_classes: int, *, boundary: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        self.num_classes = num_classes
        self.boundary = boundary
        size = num_classes * (num_classes + 2 * boundary)
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Counts one image, H W each and on the tally's device; labels that are not below K are ignored."""
        k = self.num_classes
        valid = labels < k

        # Ignored pixels are counted in one extra bin, which is cheaper than selecting the others.
        index = torch.where(valid, labels.int() * k + predicted.int(), k * k)
        self.counts[: k * k] += torch.bincount(index.flatten(), minlength=k * k + 1)[:-1]

        # Ignored pixels become a region of their own, whose rim is not counted.
        if self.boundary:
            predicted_rims = _keep_rims(torch.where(valid, predicted.to(torch.uint8), IGNORED))
            label_rims = _keep_rims(torch.where(valid, labels.to(torch.uint8), IGNORED))
            self.counts[k * k :] += _count_rims(predicted_rims, label_rims, k)


def _keep_rims(regions: Tensor) -> Tensor:
    """Returns [H, W] with all pixels ignored that are farther than d from another value and from the edge."""
    height, width = regions.shape
    reach = max(1, round(BOUNDARY_RATIO * math.hypot(height, width)))

    # A pixel belongs to a rim if the highest and the lowest value around it differ.
    highest = _window_max(regions, reach)
    lowest = 255 - _window_max(255 - regions, reach)
    rim = highest != lowest
    # The image's edge counts as a boundary.
    rim[:reach] = rim[-reach:] = True
    rim[:, :reach] = rim[:, -reach:] = True
    return torch.where(rim, regions, IGNORED)


def _window_max(values: Tensor, reach: int) -> Tensor:
    """Returns the highest value of [H, W] within `reach` pixels of each pixel along both axes.

    A window is built from two overlapping ones half as long, so the cost grows with the logarithm of the reach.
    """
    size = 2 * reach + 1
    for _ in range(2):  # once per axis: each pass transposes
        values = F.pad(values, (reach, reach)).T.contiguous()  # padded with 0, the lowest value
        length = 1  # of the windows whose maximum `values` holds
        while length < size:
            step = min(length, size - length)
            values = torch.maximum(values[:-step], values[step:])
            length += step
    return values


def _count_rims(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Returns 2K counts: each class's intersection of the two rims, then each class's union."""

    def count(rims: Tensor) -> Tensor:
        return torch.bincount(rims.flatten().int(), minlength=IGNORED + 1)[:num_classes]

    # A pixel is in a class's intersection if it lies on its rim in both maps.
    shared = count(torch.where(predicted == labels, labels, IGNORED))
    return torch.cat([shared, count(predicted) + count(labels) - shared])


def score(counts: Tensor, num_classes: int, num_images: int) -> Score:
    """Computes a `Score` from a tally's counts. ValueError if no pixel had a label."""
    counts = counts.cpu()
    size = num_classes * num_classes
    confusion = counts[:size].view(num_classes, num_classes)
    if int(confusion.sum()) == 0:
        raise ValueError(
            "No pixel has a label, so there is nothing to score; check the masks' values."
        )

    # K × K, rows are labels and columns predictions; right pixels lie on the diagonal.
    right, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = _divide(right, labelled + predicted - right)
    recall = _divide(right, labelled)
    # The counts of the rims follow the matrix, if they were taken.
    boundary_iou = _divide(*counts[size:].view(2, num_classes)) if len(counts) > size else None

    return Score(
        miou=_mean(iou),
        mean_accuracy=_mean(recall),
        pixel_accuracy=int(right.sum()) / int(confusion.sum()),
        iou=iou,
        recall=recall,
        precision=_divide(right, predicted),
        num_images=num_images,
        boundary_miou=None if boundary_iou is None else _mean(boundary_iou),
        boundary_iou=boundary_iou,
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def _divide(parts: Tensor, wholes: Tensor) -> Ratios:
    return tuple(
        a / b if b else None for a, b in zip(parts.tolist(), wholes.tolist(), strict=True)
    )


def _mean(ratios: Ratios) -> float:
    known = [value for value in ratios if value is not None]
    return sum(known) / len(known)


def shard(samples: Sequence[T], process: int, processes: int) -> Sequence[T]:
    """Returns one process's share of the samples: together they have each one once, in shares equal to within one."""
    assert 0 <= process < processes
    return samples[process::processes]
