"""mIoU straight after removing a share of the parameters: ours beside torch-pruning's plain global L1.

    python -m benchmarks.quality FILE --data DIR --input_shape 128 128 [--rates 0.3 0.5]

FILE is a trained checkpoint, for instance demo/logs/best_epoch_weights.pth after `make demo`. Nothing is fine-tuned.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import segprune
from benchmarks.baselines import prune_to
from segprune.data import open_source
from segprune.inference.evaluate import EvalMode, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--data", required=True)
    parser.add_argument("--input_shape", type=int, nargs=2, default=(128, 128))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5])
    flags = parser.parse_args()
    dense = segprune.load(flags.file)
    shape = (flags.input_shape[0], flags.input_shape[1])
    how = EvalMode(input_shape=shape)
    samples = open_source(flags.data).split("val")
    whole = sum(p.numel() for p in dense.parameters())

    def row(name: str, model: nn.Module) -> None:
        left = sum(p.numel() for p in model.parameters())
        miou = evaluate(model, samples, dense.spec.num_classes, how).miou
        print(
            f"| {name} | {left / 1e6:.3f} | {1 - left / whole:.1%} | {miou:.4f} |", flush=True
        )

    print("| network | params (M) | removed | mIoU, not fine-tuned |")
    print("|---|---|---|---|")
    row("dense", dense)
    x = torch.randn(1, 3, *shape)
    for rate in flags.rates:
        row(f"segprune {rate:g}", segprune.L1Pruner(dense, rate, repair=False).prune(x))
        row(f"torch-pruning plain global L1 {rate:g}", prune_to(dense, rate, x))


if __name__ == "__main__":
    main()
