"""Mean intersection over union on a data set.

Each picture is letterboxed to the network's input size; its logits are cut out of the letterbox and resized to the
mask's own size before the highest class is taken, so the score is that of the original pixels. One confusion
matrix is summed over the whole split: the IoU of a class is its intersection over its union in all pictures
together. A class that neither occurs nor is predicted has no IoU and does not enter the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from segprune.data import Sample, letterbox, normalise

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """`miou` and `pixel_accuracy` in [0, 1]; `iou` per class, None where a class has no pixels at all."""

    miou: float
    iou: tuple[float | None, ...]
    pixel_accuracy: float
    num_images: int


def evaluate(
    model: nn.Module,
    samples: Sequence[Sample],
    num_classes: int,
    input_shape: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Score:
    """Score of `model` (logits B K H W) on the samples; it comes back in the mode it was in."""
    batches = confusion_matrices(
        model, samples, num_classes, input_shape, device=device, batch_size=batch_size, num_workers=num_workers
    )
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    done = 0
    for seen, matrix in batches:
        total += matrix
        done += seen
        if progress is not None:
            progress(done, len(samples))
    return score(total, len(samples))


def confusion_matrices(
    model: nn.Module,
    samples: Sequence[Sample],
    num_classes: int,
    input_shape: tuple[int, int],
    *,
    device: torch.device | str,
    batch_size: int,
    num_workers: int,
) -> Iterator[tuple[int, Tensor]]:
    """For each batch the number of pictures and their K×K matrix: rows are labels, columns predictions."""
    loader: DataLoader[Any] = DataLoader(
        list(samples),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=partial(_load_batch, input_shape=input_shape),
    )
    was_training = model.training
    model.eval()
    try:
        for pixels, masks, boxes in loader:
            with torch.inference_mode():
                logits = model(pixels.to(device)).float()
                matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
                for one, mask, (top, left, height, width) in zip(logits, masks, boxes, strict=True):
                    inner = one[None, :, top : top + height, left : left + width]
                    if inner.shape[2:] != mask.shape:
                        inner = F.interpolate(inner, size=mask.shape, mode="bilinear", align_corners=False)
                    matrix += confusion_matrix(inner[0].argmax(0).cpu(), torch.from_numpy(mask), num_classes)
            yield len(masks), matrix
    finally:
        model.train(was_training)


def _load_batch(
    samples: Sequence[Sample], input_shape: tuple[int, int]
) -> tuple[Tensor, list[np.ndarray[Any, Any]], list[tuple[int, int, int, int]]]:
    pixels, masks, boxes = [], [], []
    for sample in samples:
        image, mask = sample.load()
        boxed, _, box = letterbox(image, None, input_shape)
        pixels.append(normalise(boxed))
        masks.append(mask)
        boxes.append(box)
    return torch.stack(pixels), masks, boxes


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """K×K counts of (label, prediction); pixels whose label is not below K are ignored."""
    valid = labels < num_classes
    index = labels[valid].long() * num_classes + predicted[valid].long()
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def score(matrix: Tensor, num_images: int) -> Score:
    """Read a `Score` off a confusion matrix; ValueError where no pixel had a label."""
    if int(matrix.sum()) == 0:
        raise ValueError("No labelled pixel was found, so there is nothing to score; check the masks' values.")
    counts = matrix.double()
    intersection = counts.diag()
    union = counts.sum(0) + counts.sum(1) - intersection
    iou = tuple(float(i / u) if u > 0 else None for i, u in zip(intersection, union, strict=True))
    known = [value for value in iou if value is not None]
    return Score(sum(known) / len(known), iou, float(intersection.sum() / counts.sum()), num_images)
