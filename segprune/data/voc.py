"""Folders in VOC layout: found, read, and served as a torch data set.

The layout is `JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val}.txt`; a mask's pixel
value (grey or palette PNG) is the class, 255 is ignored. Sizes are (H, W) in pixels.

Images are read as they are stored. An EXIF orientation is applied only where the picture as stored does not
have the mask's size and the turned one does: masks drawn on the upright picture fit then, and all others
keep the pixels that other VOC readers see.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from segprune.data.transforms import IGNORE_INDEX, Bytes, Transform, normalise

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")
LAYOUT = "JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val}.txt"

_IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_MASK_MODES = ("1", "L", "P")


@dataclass(frozen=True)
class Sample:
    """One picture of a split and the mask that belongs to it."""

    name: str
    image: Path
    mask: Path


def find_root(folder: str | Path) -> Path:
    """The folder that holds JPEGImages: `folder` itself, a VOC* in it, or a VOC* in its VOCdevkit.

    Raises FileNotFoundError where there is none and ValueError where there are several.
    """
    folder = Path(folder)
    if (folder / "JPEGImages").is_dir():
        return folder
    for parent in (folder, folder / "VOCdevkit"):
        found = [child for child in sorted(parent.glob("VOC*")) if (child / "JPEGImages").is_dir()]
        if len(found) > 1:
            names = ", ".join(child.name for child in found)
            raise ValueError(f"{parent} holds several data sets ({names}); give the path of one of them.")
        if found:
            return found[0]
    what = "has no data set in VOC layout" if folder.is_dir() else "is not a folder"
    raise FileNotFoundError(
        f"{folder} {what}; give a folder that holds {LAYOUT}, or write a generated one with `segprune shapes DIR`."
    )


def read_split(root: str | Path, split: str) -> tuple[Sample, ...]:
    """The samples that `ImageSets/Segmentation/{split}.txt` lists, in order; `root` as `find_root` returns it.

    Raises FileNotFoundError for a missing list, image or mask, ValueError for a list that names nothing.
    """
    root = Path(root)
    names = _read_names(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    images = _by_stem(root / "JPEGImages", IMAGE_EXTENSIONS)
    masks = _by_stem(root / "SegmentationClass", (".png",))
    _check_present(names, images, root / "JPEGImages", "image", ".jpg", split)
    _check_present(names, masks, root / "SegmentationClass", "mask", ".png", split)
    return tuple(Sample(name, images[name], masks[name]) for name in names)


def load_image(path: Path, upright: bool = False) -> Bytes:
    """[H, W, 3] uint8 RGB; grey, palette and alpha are converted. `upright` applies the EXIF orientation.

    Raises ValueError for a file that cannot be decoded or has more than 8 bits per channel.
    """
    with opened(path) as image:
        image.load()
    if image.mode not in _IMAGE_MODES:
        raise ValueError(
            f"Image {path} has mode {image.mode}, where 8 bits per channel are allowed; save it as 8-bit RGB."
        )
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a transparent palette colour keeps its colour and warns of nothing
    return np.asarray(image.convert("RGB"))


def load_mask(path: Path) -> Bytes:
    """[H, W] uint8: the grey value or the palette's index, which is the class.

    Raises ValueError for a file that cannot be decoded or is neither grey nor palette.
    """
    with opened(path) as mask:
        mask.load()
    if mask.mode not in _MASK_MODES:
        raise ValueError(
            f"Mask {path} has mode {mask.mode}, where an 8-bit grey or palette PNG is allowed whose pixel "
            "value is the class; convert its colours to class indices."
        )
    return np.asarray(mask).astype(np.uint8)


def load_pair(sample: Sample) -> tuple[Bytes, Bytes]:
    """Image [H, W, 3] and mask [H, W] of one sample; ValueError where their sizes differ."""
    image, mask = load_image(sample.image), load_mask(sample.mask)
    if image.shape[:2] != mask.shape:
        upright = load_image(sample.image, upright=True)
        if upright.shape[:2] != mask.shape:
            raise ValueError(size_message(sample, image.shape[:2], mask.shape))
        image = upright
    return image, mask


def size_message(sample: Sample, image: tuple[int, ...], mask: tuple[int, ...]) -> str:
    """What is said of a pair whose sizes (H, W) differ."""
    return (
        f"Image {sample.image} is {image[0]}x{image[1]} but mask {sample.mask} is {mask[0]}x{mask[1]} (HxW), "
        "where both must be the same size; export the mask again at the image's size."
    )


class VocDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pixels [3, H, W] float32 normalised and labels [H, W] int64; labels >= num_classes become IGNORE_INDEX.

    What the transform draws depends on (seed, epoch, index) alone. Workers take a copy of the data set when
    they start, so `set_epoch` reaches only those started after it: leave persistent_workers off.
    """

    def __init__(self, folder: str | Path, split: str, num_classes: int, transform: Transform, seed: int = 0) -> None:
        self.samples = read_split(find_root(folder), split)
        self.num_classes = num_classes
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = load_pair(self.samples[index])
        rng = np.random.default_rng([self.seed, self.epoch, index])
        image, mask = self.transform(image, mask, rng)
        labels = np.where(mask < self.num_classes, mask, IGNORE_INDEX).astype(np.int64)
        return normalise(image), torch.from_numpy(labels)


def voc_palette() -> list[int]:
    """The 256 colours of Pascal VOC's masks, flat: an index's bits dealt in turn to R, G, B, highest first."""
    return [
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
        for index in range(256)
        for channel in range(3)
    ]


def _read_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, the list of the split's images; "
            "write it with one image name per line, without extension."
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, the only encoding read; save it as UTF-8.") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise ValueError(f"{path} lists no image; write one image name per line, without extension.")
    return names


def _by_stem(folder: Path, extensions: tuple[str, ...]) -> dict[str, Path]:
    """The folder's files by name without extension; where several share a name, the earliest extension's."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    ranked = [path for path in paths if path.suffix.lower() in extensions]
    ranked.sort(key=lambda path: extensions.index(path.suffix.lower()), reverse=True)
    return {path.stem: path for path in ranked}


def _check_present(
    names: tuple[str, ...], found: dict[str, Path], folder: Path, kind: str, extension: str, split: str
) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(
            f"{kind.capitalize()} {folder / (missing[0] + extension)} is missing ({len(missing)} of "
            f"{len(names)} {kind}s of {split}.txt are); add it or take its name off {split}.txt."
        )


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The image file open, pixels not yet decoded; failures in the block become ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the path of an image file.")
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}); replace or remove the file.") from error
