"""Curves: what each group loses after the repair as a function of its width, and the widths that follow from them.

`measure_curves` reads them off a few images without labels, `allocate` spends a budget by them; `Work` is a cost in
time for what is charged. A loss is in nats per pixel: the divergence of the logits from the dense network's.
"""

from segprune.pruning.curves.allocation import allocate, missing
from segprune.pruning.curves.measure import Curve, measure_curves
from segprune.pruning.curves.work import Work

__all__ = ["Curve", "Work", "allocate", "measure_curves", "missing"]
