"""Images for the repair and for scores: checked once, and moved to where the network is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from segprune.data.transforms import normalise_pixels
from segprune.model import SegFormer, check_input
from segprune.spec import preprocessing_of


def normalise_batches(model: nn.Module, batches: Iterable[Any]) -> list[Any]:
    """Returns the batches; those of pixels, uint8 B C H W, as the network was trained with. Others are ready."""
    return [
        normalise_pixels(batch.permute(0, 2, 3, 1), preprocessing_of(model))
        if isinstance(batch, Tensor) and batch.dtype == torch.uint8
        else batch
        for batch in batches
    ]


def checked_images(model: SegFormer, batches: Iterable[Tensor]) -> list[Tensor]:
    """Returns the batches B C H W on the network's device and in its precision, without empty ones.

    Raises ValueError for another shape, and for values that are not finite.
    """
    parameter = model.decode_head.classifier.weight
    images = []
    for batch in batches:
        check_input(tuple(batch.shape), model.spec.in_channels)
        if not bool(batch.isfinite().all()):
            raise ValueError(
                "An image holds values that are not finite; check how the images are normalised."
            )
        if len(batch):
            images.append(batch.to(parameter.device, parameter.dtype))
    return images
