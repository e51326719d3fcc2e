"""L1Pruner: the pruner of the manual, and the place to protect more layers."""

from __future__ import annotations

from torch import nn

from segprune.pruning.pruner import Pruner


class L1Pruner(Pruner):
    """`Pruner` under the name that torch-pruning's users know. All arguments are `Pruner`'s.

    With images, and synthetic ones count, curves decide; l1 ranks all channels with `plan_by="scores"` or `repair=False`.

    >>> from segprune import SegFormer
    >>> from segprune.spec import standard_spec
    >>> pruned = L1Pruner(SegFormer(standard_spec("b0", 8)), pruning_rate=0.5, repair=False).prune()
    >>> 0.49 < 1 - sum(p.numel() for p in pruned.parameters()) / 3716200 < 0.51
    True
    """

    def _collect_ignored_layers(self) -> list[nn.Module]:
        """Layers whose outputs are never cut: edit this to protect more of them."""
        return super()._collect_ignored_layers()
