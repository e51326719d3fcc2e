"""Train a SegFormer, from scratch, from a checkpoint or from a pruned file: python train.py --help

Values written into SETTINGS replace the defaults; flags on the command line win over both. For example
SETTINGS = {"data": "VOCdevkit", "num_classes": 21, "epochs": 100}
"""

from segprune.cli import door

SETTINGS: dict[str, object] = {}

if __name__ == "__main__":
    door("train", "train.py", SETTINGS)
