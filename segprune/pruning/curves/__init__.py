"""Curves: what each group loses after the repair as a function of its width, and the widths that follow from them.

`measure_curves` reads them off a few images without labels, `allocate` spends a budget by them;
`time_costs` is a cost in time. A loss is in nats per pixel: the divergence of the logits from the dense network's.
"""

from segprune.pruning.curves.allocation import allocate, missing
from segprune.pruning.curves.measure import Curve, measure_curves
from segprune.pruning.curves.work import time_costs

__all__ = ["Curve", "allocate", "measure_curves", "missing", "time_costs"]
