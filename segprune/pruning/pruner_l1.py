"""L1Pruner: the pruner that ranks channels by the absolute values of their weights."""

from __future__ import annotations

from torch import nn

from segprune.pruning.pruner import Pruner


class L1Pruner(Pruner):
    """`Pruner` with its default method, l1. All arguments are `Pruner`'s.

    >>> from segprune import SegFormer
    >>> from segprune.spec import standard_spec
    >>> pruned = L1Pruner(SegFormer(standard_spec("b0", 8)), pruning_rate=0.5, repair=False).prune()
    >>> 0.49 < 1 - sum(p.numel() for p in pruned.parameters()) / 3716200 < 0.51
    True
    """

    def _collect_ignored_layers(self) -> list[nn.Module]:
        """Layers whose outputs are never cut: edit this to protect more of them."""
        return super()._collect_ignored_layers()
