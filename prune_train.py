"""Prune a trained SegFormer, and fine-tune it: python prune_train.py --help

Values written into SETTINGS replace the defaults; flags on the command line win over both. For example
SETTINGS = {"model_path": "logs/best_epoch_weights.pth", "phi": "b2", "pruning_rate": 0.5}
"""

from segprune.cli import door

SETTINGS: dict[str, object] = {}

if __name__ == "__main__":
    door("prune", "prune_train.py", SETTINGS)
