"""What a network's layers cost in time, roughly: multiplications, and the numbers that they write.

Eager networks on a CPU pass over memory once for each elementary step, and where maps are large and products narrow
that takes longer than the products do. So beside its MACs a layer is charged for the numbers that it writes, and for
those that normalisation, activation and upsampling pass behind it. Attention is not charged: its softmax takes the
same time however narrow heads are. The constants are ratios of measured steps of b0 at 512 x 512 on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from segprune.pruning.budget.costs import Costs
from segprune.pruning.groups import Group
from segprune.stats import Layer

WRITE = 12.0  # MACs that take as long as one number written by a product
HIDDEN = 60.0  # one number that passes a depth-wise convolution and the activation behind it
FUSED = 100.0  # one number of the decode head's sum: upsampled and added per stage, normalised, read


def time_costs(layers: Sequence[Layer], groups: Sequence[Group]) -> Costs:
    """Returns time in units of MACs as a function of the groups' widths."""
    coefficients = np.zeros((3, len(layers)))
    for i, layer in enumerate(layers):
        if layer.kind == "attention":
            continue

        # Row 1 is the price of an input channel, row 2 that of an output channel.
        coefficients[:, i] = layer.coefficients("macs")
        if layer.kind == "product":
            coefficients[2, i] += WRITE * layer.positions
        elif layer.kind == "depthwise":
            coefficients[2, i] += HIDDEN * layer.positions

        # The classifier's inputs are as many as the channels of the decode head's sum.
        if layer.name.endswith("classifier"):
            coefficients[1, i] += FUSED * layer.positions
    return Costs(layers, groups, "macs", coefficients=coefficients)
