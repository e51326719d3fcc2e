"""Dense in PyTorch eager, as it was loaded, against rate 0.5, folded, in the runtimes that deploy it.

    python -m benchmarks.deploy [--variant b2] [--rate 0.5] [--threads 2] [--rounds 20] [--seconds 300]

Random weights with trained-like statistics, 512×512, 150 classes, batch 1, float32, logits of the input's size. All
run in turns; ratios are of medians. `original` is the dense network exported as it was loaded, with nothing folded,
which `segprune export` never writes; `dense` in the runtimes is what it writes of the same checkpoint. Needs the
export extra.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import segprune
from benchmarks.trained_like import fill
from segprune.benchmark import Row, export_cases, grid, measure, open_case
from segprune.cli.console import keep_freed_memory
from segprune.export import Manifest, onnx, openvino
from segprune.export.job import Job
from segprune.export.network import Deployed
from segprune.spec import standard_spec

SHAPE, NUM_CLASSES = (512, 512), 150
RUNTIMES = ("onnxruntime", "openvino")
TARGETS = {"in PyTorch eager": 12.0, "in the same runtime": 4.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="b2")
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="no new round after so long"
    )
    flags = parser.parse_args()
    keep_freed_memory()  # as the commands do
    with TemporaryDirectory() as folder:
        dense, pruned = _write(flags.variant, flags.rate, Path(folder))
        make_cases = partial(grid, sizes=(SHAPE,), threads=(flags.threads,))
        cases = make_cases([dense, *_write_original(dense, Path(folder))])
        cases += make_cases([dense, pruned], runtimes=RUNTIMES)
        cases += make_cases([pruned], fold=True)
        opened = [open_case(case) for case in export_cases(cases, Path(folder))]
        rows, peaks = measure(opened, max_rounds=flags.rounds, max_seconds=flags.seconds)
    peak = f"peak {peaks[flags.threads]:.0f} GMAC/s"
    print(f"{flags.variant}, {flags.threads} threads, {rows[0].latency.runs} rounds, {peak}\n")
    _show(rows)


def _write(variant: str, rate: float, folder: Path) -> tuple[str, str]:
    """The checkpoints of the dense and of the pruned network."""
    torch.manual_seed(0)
    dense = fill(segprune.SegFormer(standard_spec(variant, NUM_CLASSES))).eval()
    assert isinstance(dense, segprune.SegFormer)
    pruned = segprune.L1Pruner(dense, rate, repair=False).prune(
        torch.empty(1, 3, *SHAPE, device="meta")
    )
    assert isinstance(pruned, segprune.SegFormer)
    paths = str(folder / "dense.pth"), str(folder / "pruned.pth")
    for model, path in zip((dense, pruned), paths, strict=True):
        segprune.save(model, path)
    return paths


def _write_original(checkpoint: str, folder: Path) -> list[str]:
    """The network of the checkpoint in every one of `RUNTIMES`, unfolded."""
    model = segprune.load(checkpoint)
    network = Deployed(model)
    network.network = model
    paths = []
    for writer, format, suffix in ((onnx, "onnx", ".onnx"), (openvino, "openvino", ".xml")):
        manifest = Manifest(
            model.spec.variant,
            NUM_CLASSES,
            format,
            "fp32",
            (1, *SHAPE),
            preprocess=False,
            argmax=False,
            spec=model.spec,
        )
        paths.append(str(folder / f"original{suffix}"))
        writer.write(Job(network, manifest, SHAPE, ()), Path(paths[-1]))
    return paths


def _show(rows: list[Row]) -> None:
    print("| network | runtime | latency (ms), p90 | GMACs | GMAC/s | of peak | × faster |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        assert row.macs is not None
        print(
            f"| {Path(row.case.path).stem} | {row.runtime} | {row.latency.median_ms:.0f} ({row.latency.p90_ms:.0f}) "
            f"| {row.macs / 1e9:.2f} | {row.gmacs_per_second:.1f} | {row.peak_share:.0%} | {row.faster:.2f} |"
        )
    pruned = [
        row
        for row in rows
        if Path(row.case.path).stem == "pruned" and row.case.runtime in RUNTIMES
    ]
    best = min(pruned, key=lambda row: row.latency.median_ms)
    same = next(
        row for row in rows if row.case.runtime == best.case.runtime
    )  # the original's come first
    print("\n| pruned in its best runtime against the dense original | × faster | target |")
    print("|---|---|---|")
    for (where, target), other in zip(TARGETS.items(), (rows[0], same), strict=True):
        print(
            f"| {where} | {other.latency.median_ms / best.latency.median_ms:.1f} | {target:g} |"
        )


if __name__ == "__main__":
    main()
