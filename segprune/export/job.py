"""What every format's writer gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from segprune.data.leaves import draw_example, draw_leaves
from segprune.data.transforms import Bytes, normalise
from segprune.export.manifest import MIN_DYNAMIC, Manifest
from segprune.spec import Preprocessing, preprocessing_of_drawn

MAX_BATCHES = 8
NUM_DRAWN = 8  # images to find the ranges of activations with, where none are given


@dataclass(frozen=True)
class Job:
    """The network, what its file will say of itself, and images [H, W, C] uint8 for calibration."""

    network: nn.Module  # a `Deployed`, or its graph in half precision
    manifest: Manifest
    size: tuple[int, int]  # H W of the example; with a static shape the only one
    images: Sequence[Bytes]
    opset: int = 18  # of ONNX

    @property
    def in_channels(self) -> int:
        return self.preprocessing.num_channels

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are normalised; where the network's file does not say it, only generated ones are."""
        assert self.manifest.spec is not None
        return preprocessing_of_drawn(self.manifest.spec)

    def make_example(self) -> Tensor:
        """Returns an input to trace the network with. Of a dynamic one no two sizes are equal and none is 1."""
        # Tracing takes equal sizes for one symbol, and a 1 for a constant.
        batch, height, width = (2, 2 * MIN_DYNAMIC, 2 * MIN_DYNAMIC + 32)
        if self.manifest.shape is not None:
            batch, (height, width) = self.manifest.shape[0], self.size

        return self.prepare(np.zeros((batch, height, width, self.in_channels), dtype=np.uint8))

    def prepare(self, images: Sequence[Bytes] | Bytes) -> Tensor:
        """Returns the images as the file takes them: B H W C uint8 or normalised B C H W."""
        # With preprocessing built in, normalising here would do it twice.
        if self.manifest.preprocess:
            return torch.from_numpy(np.stack(list(images)))
        return torch.stack([normalise(image, self.preprocessing) for image in images])

    def make_batches(self) -> list[Tensor]:
        """Returns the images in batches that the file takes; the last one is filled up with the first images.

        Without images they are drawn: dead leaves, whose edges and contrasts are those of photographs.
        """
        size = 1 if self.manifest.shape is None else self.manifest.shape[0]
        # A file of a fixed batch takes nothing less, so the last batch needs filling.
        images = list(self.images)
        if not images:
            for index in range(NUM_DRAWN):
                images.append(draw_leaves(0, index, self.size, self.in_channels))
        images += images[: -len(images) % size]
        return [self.prepare(images[i : i + size]) for i in range(0, len(images), size)]

    def choose_compared(self) -> Iterator[list[Bytes]]:
        """Yields the images to compare: those at hand, else generated ones; a dynamic file also gets odd sizes."""
        shape = self.manifest.shape
        size = 2 if shape is None else shape[0]

        # A few batches show a wrong file as well as all of them, in less time.
        images = list(self.images[: MAX_BATCHES * size]) or _draw(
            size, self.size, self.in_channels
        )
        for i in range(0, len(images), size):
            yield images[i : i + size]

        # Odd sizes and another batch show constants that tracing left in the graph.
        if shape is None:
            for number, odd in (
                (1, (MIN_DYNAMIC + 11, MIN_DYNAMIC + 45)),
                (3, (MIN_DYNAMIC + 32, MIN_DYNAMIC)),
            ):
                yield _draw(number, odd, self.in_channels)

    def trace(self) -> torch.export.ExportedProgram:
        """Returns the graph of torch.export, with free batch, height and width for a dynamic file."""
        shapes = None
        if self.manifest.shape is None:
            # Sides are dimensions 1, 2 of B H W C and 2, 3 of B C H W.
            height, width = (1, 2) if self.manifest.preprocess else (2, 3)
            dynamic = torch.export.Dim.DYNAMIC
            sides = {height: dynamic(min=MIN_DYNAMIC), width: dynamic(min=MIN_DYNAMIC)}
            shapes = ({0: dynamic(min=1)} | sides,)

        with torch.no_grad():
            return torch.export.export(
                self.network, (self.make_example(),), dynamic_shapes=shapes
            )


def _draw(number: int, size: tuple[int, int], channels: int) -> list[Bytes]:
    return [draw_example(index, size, channels) for index in range(number)]
