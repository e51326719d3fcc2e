"""b0 … b5 × rates 0.3, 0.5, 0.7, from a Hugging Face folder and from a bubbliiiing-style .pth.

    python -m benchmarks.variants [b0 b1 …]

Each file is pruned by the command's own steps, saved, loaded again, and run forward and backward. Needs the
requirements of the tests: transformers writes the Hugging Face folder.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

import segprune
from benchmarks.trained_like import fill
from segprune.model import SegFormer
from segprune.spec import VARIANTS
from tests.dialects import hf_model, reference

NUM_CLASSES = 5
SHAPE = (512, 512)


def main(variants: list[str]) -> None:
    print(
        "| variant | file | rate | parameters removed | MACs removed | off by (points) | seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    worst = 0.0
    for variant in variants:
        for source in ("HF folder", "bubbliiiing .pth"):
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory() as folder:
                path = _write(source, variant, Path(folder))
                for rate in (0.3, 0.5, 0.7):
                    worst = max(worst, _row(path, source, variant, rate, Path(folder)))
    print(f"\nFurthest from its rate: {worst:.3f} percentage points.")


def _write(source: str, variant: str, folder: Path) -> Path:
    if source == "HF folder":
        hf_model(variant, fill).save_pretrained(folder / "hf")
        return folder / "hf"
    path = folder / "ep100.pth"
    torch.save(reference("bubbliiiing", fill, variant, NUM_CLASSES).state_dict(), path)
    return path


def _row(path: Path, source: str, variant: str, rate: float, folder: Path) -> float:
    """One line of the table; gives how far the share of parameters is from the rate, in percentage points."""
    start = time.perf_counter()
    dense = segprune.load(path)
    pruned = segprune.L1Pruner(dense, rate, repair=False).prune(
        torch.empty(1, 3, *SHAPE, device="meta")
    )
    assert isinstance(pruned, SegFormer)
    seconds = time.perf_counter() - start
    file = folder / f"{variant}_pruned_{rate:g}.pth"
    segprune.save(pruned, file)
    loaded = segprune.load(file).train()
    x = torch.randn(2, 3, 64, 64)
    loss = loaded(x).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loaded.parameters())
    before, after = segprune.count(dense.spec, SHAPE), segprune.count(loaded.spec, SHAPE)
    assert after.parameters == sum(p.numel() for p in loaded.parameters())
    removed, macs = 1 - after.parameters / before.parameters, 1 - after.macs / before.macs
    off = 100 * (removed - rate)
    print(
        f"| {variant} | {source} | {rate} | {removed:.2%} | {macs:.2%} | {off:+.3f} | {seconds:.1f} |",
        flush=True,
    )
    return abs(off)


if __name__ == "__main__":
    main(sys.argv[1:] or list(VARIANTS))
