"""Curves: what each group loses after the repair as a function of its width.

`measure_curves` reads them off a few images without labels; `budget` spends by them. A loss is in nats per pixel: the
divergence of the logits from the dense network's.
"""

from segprune.pruning.curves.measure import Curve, measure_curves

__all__ = ["Curve", "measure_curves"]
