"""How far exported files are from PyTorch, dense and pruned, and what int8 costs in mIoU.

    python -m benchmarks.export logs/best_epoch_weights.pth --data shapes [--size 128 128] [--skip aotinductor]

The checkpoint is the b0; b2 has random weights with trained-like statistics, on which classes lie close together.
Pruned means `L1Pruner(model, 0.5)` without fine-tuning. All on generated pictures, static sizes, one file after
another; `off by` is the largest difference of logits over the largest logit.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from benchmarks.trained_like import fill
from segprune import L1Pruner, SegFormer, load
from segprune.data import letterbox, open_source
from segprune.export import FORMATS, Limits, export, open_exported
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.spec import standard_spec

ANY = Limits(None, 0.0)  # everything is kept and shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128))
    parser.add_argument(
        "--score_size", type=int, nargs=2, default=(64, 64), help="of the pictures in --data"
    )
    parser.add_argument("--skip", nargs="*", default=(), help="formats to leave out")
    flags = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    b0, b2 = load(flags.checkpoint), SegFormer(standard_spec("b2", 8)).eval()
    fill(b2)
    example = torch.randn(1, 3, *flags.size)
    networks: dict[str, Any] = {
        "b0 dense": b0,
        "b0 pruned": L1Pruner(b0, 0.5, repair=False).prune(example),
    }
    _int8(networks, flags)
    networks |= {"b2 dense": b2, "b2 pruned": L1Pruner(b2, 0.5, repair=False).prune(example)}
    print(f"\ntorch {torch.__version__}, {flags.size[0]}×{flags.size[1]}, batch 1")
    print(
        "| network | format | precision | off by | equal class (%) | MB | seconds to export |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, network in networks.items():
        for format in FORMATS:
            for precision in ("fp32", "fp16"):
                if format not in flags.skip:
                    _row(name, network, format, precision, tuple(flags.size))


def _row(
    name: str, network: SegFormer, format: str, precision: Any, size: tuple[int, int]
) -> None:
    with TemporaryDirectory() as folder:
        path, start = Path(folder) / f"it{FORMATS[format].suffix}", perf_counter()
        _, difference = export(
            network, path, format=format, precision=precision, size=size, limits=ANY
        )
        megabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        print(
            f"| {name} | {format} | {precision} | {difference.relative:.1e} | {100 * difference.agreement:.3f} "
            f"| {megabytes:.1f} | {perf_counter() - start:.0f} |",
            flush=True,
        )


def _int8(networks: dict[str, SegFormer], flags: argparse.Namespace) -> None:
    source, size = open_source(flags.data), tuple(flags.score_size)
    samples = source.split("train")[:100]
    pictures = [letterbox(sample.load()[0], None, size)[0] for sample in samples]
    val, how = source.split("val"), EvalMode(input_shape=size)
    print(
        f"int8, {size[0]}×{size[1]}, calibrated on {len(pictures)} pictures, scored on {len(val)}"
    )
    print("| network | format | mIoU fp32 | mIoU int8 | equal class (%) | MB |")
    print("|---|---|---|---|---|---|")
    for name, network in networks.items():
        before = evaluate(network, val, network.spec.num_classes, how).miou
        for format in (format for format in FORMATS if "int8" in FORMATS[format].precisions):
            with TemporaryDirectory() as folder:
                path = Path(folder) / f"it{FORMATS[format].suffix}"
                options: dict[str, Any] = {
                    "precision": "int8",
                    "size": size,
                    "pictures": pictures,
                    "limits": ANY,
                }
                _, difference = export(network, path, format=format, **options)
                after = evaluate(
                    open_exported(path, trust=True), val, network.spec.num_classes, how
                ).miou
                megabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
            print(
                f"| {name} | {format} | {before:.4f} | {after:.4f} | {100 * difference.agreement:.3f} "
                f"| {megabytes:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
