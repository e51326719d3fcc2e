"""What a network's layers cost in time, roughly: multiplications, and the numbers that they read and write.

Eager networks on a CPU pass over memory once for each elementary step, and where maps are large and products narrow
that takes longer than the products do. So beside its MACs a layer is charged for every number that it reads or
writes. The two constants are fits to measured steps of b0 and b2 (docs/log.md); only their ratio counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from segprune.pruning.budget.costs import Costs
from segprune.pruning.groups import Group
from segprune.pruning.plan import Widths
from segprune.stats import Layer

WRITE = 12.0  # MACs that take as long as one number written by a product
HIDDEN = 60.0  # one number that passes a depth-wise convolution and the activation behind it
FUSED = 100.0  # one number of the decode head's sum: upsampled and added per stage, normalised, read


class Work:
    """Time in units of MACs, as a function of the groups' widths."""

    def __init__(self, layers: Sequence[Layer], groups: Sequence[Group]) -> None:
        self._macs = Costs(layers, groups, "macs")
        self.groups, self.full = groups, self._macs.full
        charges = {"product": WRITE, "depthwise": HIDDEN}
        outputs = [charges.get(row.kind, 0.0) * row.positions for row in layers]
        inputs = [FUSED * row.positions if row.name.endswith("classifier") else 0.0 for row in layers]
        self._scores = np.array([[row.positions * row.kernel * (row.kind == "attention") for row in layers]] * 2)
        self._numbers = np.array([inputs, outputs])

    def total(self, widths: Widths) -> float:
        dims = self._macs.dims(widths)
        return self._macs.total(widths) - self._attention(widths) + float((dims * self._numbers).sum())

    def _attention(self, widths: Widths) -> float:
        """MACs of attention's two products: its time does not depend on how narrow heads are."""
        return float((self._macs.dims(widths) * self._scores).sum())
