"""Depth: whole blocks, or their attention or FFN alone, taken out of a SegFormer.

A branch adds to the residual stream, so that removing it equals multiplying its output by zero. What can be kept for
nothing is its mean output over some images: nothing else reads the stream between the last writer before it and the
branch, so that writer's bias takes it. Whole layers ranked by what the output is without them: "ShortGPT" (arXiv
2403.03853); attention and FFN each by itself: "What Matters in Transformers?" (arXiv 2406.15786).
"""

from segprune.pruning.depth.branches import Branch, branch_costs, branches, without
from segprune.pruning.depth.choice import choose
from segprune.pruning.depth.first import prune_depth
from segprune.pruning.depth.removal import remove
from segprune.pruning.depth.scores import branch_scores, noise

__all__ = [
    "Branch",
    "branch_costs",
    "branch_scores",
    "branches",
    "choose",
    "noise",
    "prune_depth",
    "remove",
    "without",
]
