"""Images for the repair and for scores: checked once, and moved to where the network is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from segprune.model import SegFormer, check_input


def checked_images(model: SegFormer, batches: Iterable[Tensor]) -> list[Tensor]:
    """Returns the batches B 3 H W on the network's device and in its precision, without empty ones.

    Raises ValueError for another shape, and for values that are not finite.
    """
    parameter = model.decode_head.classifier.weight
    images = []
    for batch in batches:
        check_input(tuple(batch.shape))
        if not bool(batch.isfinite().all()):
            raise ValueError(
                "An image holds values that are not finite; check how the images are normalised."
            )
        if len(batch):
            images.append(batch.to(parameter.device, parameter.dtype))
    return images
