"""What a network loses of the dense one's mIoU, on a part of the images first, and on all of them where it is close.

The part is drawn once, so that all networks are compared on the same images. A loss on it has a margin, by the
jackknife over its images; each image counts for both networks, so what makes one hard cancels. Units: points of mIoU,
hundredths of the range from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from segprune.data import Sample
from segprune.inference.evaluate import Progress, tallies
from segprune.inference.label_maps import EvalMode
from segprune.inference.metrics import Score, score

PART = 0.2  # of the images that are looked at first
LEAST_PART = 50  # images; where there are fewer, all are looked at
CONFIDENCE = 1.96  # standard deviations of a normal distribution that hold 95 % of it


@dataclass(frozen=True)
class Drop:
    """Points of mIoU lost; below 0 the network is better. `margin`: half of the 95 % interval, 0 for all images."""

    points: float
    margin: float
    num_images: int


@dataclass(frozen=True)
class _Counts:
    """Pixels of the images seen so far: the confusion of all, and [n, 2, K] intersections and unions of each."""

    total: Tensor
    by_image: Tensor


class DropScorer:
    """Scores networks against the dense one, which is scored on all images at once. No image is seen twice."""

    def __init__(
        self,
        dense: nn.Module,
        samples: Sequence[Sample],
        num_classes: int,
        how: EvalMode,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        # The part is the beginning of a random order.
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(samples), generator=generator).tolist()
        self.samples = [samples[i] for i in order]
        self.num_part = min(len(samples), max(LEAST_PART, round(PART * len(samples))))

        self.num_classes = num_classes
        self.how = how
        self.loading = {"device": device, "batch_size": batch_size, "num_workers": num_workers}
        self.progress = progress
        self._counts: dict[nn.Module, _Counts] = {}
        self.dense = self._count(dense, len(samples))

    def drop(self, network: nn.Module, whole: bool) -> Drop:
        """Returns what the network loses on the part, or on all images."""
        counts = self._count(network, len(self.samples) if whole else self.num_part)
        number = len(counts.by_image)
        dense, pruned = self.dense.by_image[:number].double(), counts.by_image.double()
        points = 100.0 * float(_miou(dense.sum(0)) - _miou(pruned.sum(0)))

        # The loss without each of the images. The part is drawn from a finite number of
        # images, of which the unseen share alone is unknown.
        unseen = 1.0 - number / len(self.samples)
        if not unseen or number < 2:
            return Drop(points, 0.0, number)
        without = 100.0 * (_miou(dense.sum(0) - dense) - _miou(pruned.sum(0) - pruned))
        variance = (number - 1) / number * float((without - without.mean()).square().sum())
        return Drop(points, CONFIDENCE * math.sqrt(variance * unseen), number)

    def score(self, network: nn.Module | None = None) -> Score:
        """Returns the score of a network on all images; of the dense one if none is given."""
        counts = self.dense
        if network is not None:
            counts = self._count(network, len(self.samples))
        return score(counts.total, self.num_classes, len(self.samples))

    def _count(self, network: nn.Module, number: int) -> _Counts:
        """Returns the counts of the first `number` images at least."""
        known = self._counts.get(network)
        start = 0 if known is None else len(known.by_image)
        if known is not None and start >= number:
            return known

        k = self.num_classes
        rows = [] if known is None else [known.by_image]
        total: Tensor | int = 0 if known is None else known.total
        done = 0
        for counts in tallies(
            network,
            self.samples[start:number],
            k,
            self.how,
            **self.loading,  # type: ignore[arg-type]
        ):
            counts = counts.cpu()  # B …: one row per image
            total = total + counts.sum(0)
            matrix = counts[:, : k * k].view(-1, k, k)
            right = matrix.diagonal(dim1=1, dim2=2)
            union = matrix.sum(1) + matrix.sum(2) - right
            rows.append(torch.stack([right, union], dim=1))
            done += len(counts)
            if self.progress is not None:
                self.progress(done, number - start)

        assert isinstance(total, Tensor)
        self._counts[network] = _Counts(total, torch.cat(rows))
        return self._counts[network]


def _miou(counts: Tensor) -> Tensor:
    """Returns the mIoU of intersections and unions [..., 2, K]; classes without a pixel are left out."""
    right, union = counts.unbind(-2)
    seen = union > 0
    iou = torch.where(seen, right / union.clamp(min=1.0), 0.0)
    return iou.sum(-1) / seen.sum(-1).clamp(min=1)
