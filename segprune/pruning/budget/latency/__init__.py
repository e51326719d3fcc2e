"""A latency as the budget: the steps of a SegFormer timed once by themselves, added up for any widths, and corrected.

Additive tables of measured layers follow NetAdapt (arXiv 1804.03230) and FBNet (arXiv 1812.03443). A sum of steps
misses what they do to each other's caches and launches; so `meet` measures the cut network beside the dense one and
asks again. Times are milliseconds for one image in evaluation mode, in one place: a device, a precision and, on a
CPU, the number of threads that torch has. On a GPU all of them are of replayed CUDA graphs (segprune/timing.py).
"""

from segprune.pruning.budget.latency.costs import LatencyCosts, dense_in_predicted_ms
from segprune.pruning.budget.latency.steps import Place, Shape, steps
from segprune.pruning.budget.latency.table import LatencyTable, default_folder, measure_shapes
from segprune.pruning.budget.latency.target import Met, meet

__all__ = [
    "LatencyCosts",
    "LatencyTable",
    "Met",
    "Place",
    "Shape",
    "default_folder",
    "dense_in_predicted_ms",
    "measure_shapes",
    "meet",
    "steps",
]
