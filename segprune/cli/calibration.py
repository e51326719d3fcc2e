"""A few images without labels, for criteria that need some, for the repair and for the scan."""

from __future__ import annotations

from torch import Tensor

from segprune.cli.console import show_notes
from segprune.cli.pruning import PruneConfig, needs_images
from segprune.data import Source
from segprune.data.unlabelled import batch_images, list_images, load_images
from segprune.pruning.importance import NEED_DATA


def images_for(config: PruneConfig, source: Source | None) -> list[Tensor]:
    """Images for the method and the repair: none where nobody needs them, or by default where --data has none."""
    if not needs_images(config):
        return []
    try:
        if config.images:
            places = list_images(config.images)
        elif source is not None:
            places = list_images(source)
        else:
            return []
    except FileNotFoundError as error:
        if config.images or config.repair or config.pruning_method in NEED_DATA:
            raise
        show_notes((f"No repair, since there are no images for it: {error}",))
        return []
    return batch_images(load_images(places, config.num_images, config.input_shape))
