"""What repairs share: pairs of activations, dense and pruned, and layers solved anew from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segprune.model import pool_map, to_map, to_tokens
from segprune.pruning.groups import Side
from segprune.pruning.repair.moments import Rows, fit
from segprune.pruning.trace import width_of

ROWS = 2048  # of one image that a layer is solved from; neighbours say much the same
CHUNK = 2**24  # numbers in an unfolded piece of activations
Removed = Mapping[tuple[str, Side], set[int]]


@dataclass
class Pairs:
    """The same activations in the dense and in the pruned network, one tensor per batch.

    `sizes` are heights and widths of the maps that tokens (B N C) come from.
    """

    dense: list[Tensor]
    pruned: list[Tensor]
    sizes: list[tuple[int, int]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.dense, self.pruned, strict=True))

    def through(
        self, dense: Callable[[Tensor], Tensor], pruned: Callable[[Tensor], Tensor]
    ) -> Pairs:
        return Pairs(
            [dense(x) for x in self.dense], [pruned(x) for x in self.pruned], self.sizes
        )

    def as_maps(self) -> Pairs:
        dense, pruned = (
            [to_map(x, *size) for x, size in zip(tokens, self.sizes, strict=True)]
            for tokens in (self.dense, self.pruned)
        )
        return Pairs(dense, pruned, self.sizes)

    def pooled(self, factor: int) -> Pairs:
        """Returns tokens of the maps averaged over windows of `factor` × `factor`."""

        def pool(x: Tensor) -> Tensor:
            return to_tokens(pool_map(x, factor))

        sizes = [(-(-height // factor), -(-width // factor)) for height, width in self.sizes]
        pooled = self.as_maps().through(pool, pool)
        return Pairs(pooled.dense, pooled.pruned, sizes)


def kept(removed: Removed, name: str, side: Side, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Returns the positions of the dense layer's side that are kept, ascending."""
    # Ascending, as surgery.py slices: row i of the pruned layer is the i-th position kept.
    missing = removed.get((name, side), set())
    positions = [i for i in range(width_of(layer, side)) if i not in missing]
    return torch.tensor(positions, dtype=torch.long, device=layer.weight.device)


def flat(x: Tensor) -> Tensor:
    """Returns rows to solve from, B N C -> n C; of an image with more than `ROWS` positions only every few."""
    # An odd stride, for an even one would see the same columns of every row.
    stride = 1 if x.shape[1] <= ROWS else math.ceil(x.shape[1] / ROWS) | 1
    return x[:, ::stride].flatten(0, -2)


@torch.no_grad()
def assign(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight.view_as(layer.weight))
    assert layer.bias is not None
    layer.bias.copy_(bias)


def fit_layer(layer: nn.Linear | nn.Conv2d, rows: Rows, weight: Tensor, damping: float) -> None:
    """Solves the layer anew from rows of what it reads and should put out; `weight` (out in [kernel]) is the prior."""
    assign(layer, *fit(rows, weight.flatten(1), damping))


def conv_rows(layer: nn.Conv2d, maps: list[Tensor], targets: list[Tensor]) -> Rows:
    """Yields what the convolution reads in each map (B C H W), as rows, beside the targets (B N D).

    Image by image where the patches of a whole batch would be large.
    """
    for x, y in zip(maps, targets, strict=True):
        # As many images at a time as fit into a chunk.
        patches = y.shape[1] * x.shape[1] * layer.kernel_size[0] * layer.kernel_size[1]
        step = max(1, CHUNK // patches)
        for some, wanted in zip(x.split(step), y.split(step), strict=True):
            # Patches B C·k·k L, turned to B L C·k·k: one row for each output position.
            padding: Any = layer.padding  # never a word here
            unfolded = F.unfold(some, layer.kernel_size, padding=padding, stride=layer.stride)
            yield flat(unfolded.transpose(1, 2)), flat(wanted)
