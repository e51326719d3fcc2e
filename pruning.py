"""`from pruning import L1Pruner` in a clone; `from segprune import L1Pruner` when installed."""

from segprune import L1Pruner

__all__ = ["L1Pruner"]
