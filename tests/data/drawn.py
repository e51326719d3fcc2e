"""What the tests of data share: noise as pictures, written in any mode, and pairs of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
SIZE = (20, 30)


def noise(*shape: int, high: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def write_image(
    path: Path, pixels: np.ndarray | None = None, orientation: int = 1
) -> np.ndarray:
    """Writes and returns the pixels; noise that depends on the file's name if none are given."""
    if pixels is None:
        pixels = noise(*SIZE, 3, seed=sum(path.stem.encode()))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"exif": exif} if orientation != 1 else {}))
    return pixels


def write_mask(
    path: Path, labels: np.ndarray | None = None, palette: tuple[int, ...] = ()
) -> np.ndarray:
    """Writes and returns the labels; 0..4 at random, depending on the file's name, if none are given."""
    if labels is None:
        labels = noise(*SIZE, high=5, seed=1 + sum(path.stem.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(labels)
    if palette:
        mask.putpalette(palette)
    mask.save(path)
    return labels


def write_voc(root: Path, names: tuple[str, ...] = ("a", "b")) -> Path:
    for name in names:
        write_image(root / f"JPEGImages/{name}.png")
        write_mask(root / f"SegmentationClass/{name}.png")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return root
