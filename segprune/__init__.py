"""segprune: prune a trained SegFormer and get a smaller network that loads, trains and deploys like any other."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segprune.api import evaluate, export_model, finetune, load_images, prune
    from segprune.checkpoint import load, save
    from segprune.compiler import compiled
    from segprune.fold import fold_decoder
    from segprune.model import SegFormer
    from segprune.pruning.pruner_l1 import L1Pruner
    from segprune.stats import count

__all__ = [
    "L1Pruner",
    "SegFormer",
    "__version__",
    "compiled",
    "count",
    "evaluate",
    "export_model",
    "finetune",
    "fold_decoder",
    "load",
    "load_images",
    "prune",
    "save",
]

_HOMES = {
    "L1Pruner": "segprune.pruning.pruner_l1",
    "SegFormer": "segprune.model",
    "compiled": "segprune.compiler",
    "count": "segprune.stats",
    "evaluate": "segprune.api",
    "export_model": "segprune.api",
    "finetune": "segprune.api",
    "fold_decoder": "segprune.fold",
    "load": "segprune.checkpoint",
    "load_images": "segprune.api",
    "prune": "segprune.api",
    "save": "segprune.checkpoint",
}

try:
    __version__ = version("segprune")
except PackageNotFoundError:  # run from a clone that was never installed
    __version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Names are imported when first used: loading a pruned file needs no torch-pruning."""
    if name not in _HOMES:
        raise AttributeError(f"module 'segprune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
