"""Hugging Face `datasets`: a folder or a hub name, with an image column and a label column.

A folder is one written by `save_to_disk`, an imagefolder whose metadata names a mask beside each image, or parquet
files. Pictures are taken encoded, as they are stored, and decoded by us like files; the mask's pixel value is the
class, 255 is ignored. The package `datasets` is imported only here, and only when such a set is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from segprune.data.listing import aliases, class_names
from segprune.data.pixels import SampleError, palette_of
from segprune.data.samples import Pair, Source

LOOKED_FOR = "a folder of save_to_disk, metadata.jsonl beside images, or *.parquet"
IMAGE_COLUMNS = ("image", "images", "img", "picture", "pixel_values")
LABEL_COLUMNS = (
    "label",
    "labels",
    "mask",
    "masks",
    "annotation",
    "annotations",
    "segmentation",
    "segmentation_mask",
    "semantic_mask",
    "seg",
)
_SAVED = ("dataset_dict.json", "state.json")
_SIGNS = (*_SAVED, "metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True, slots=True)
class HfCell:
    """A picture in a row of one column."""

    column: Any  # a datasets.Dataset of that column alone, pictures left encoded
    row: int
    where: str  # "column image of train in PATH"

    def __str__(self) -> str:
        return f"row {self.row}, {self.where}"

    def read(self) -> bytes:
        (value,) = self.column[self.row].values()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and os.path.isfile(value):
            return Path(value).read_bytes()
        if not isinstance(value, bytes):
            raise SampleError(f"{self} holds no picture; put one there, or leave the row out with --skip_bad.")
        return value


def find(folder: Path) -> Path | None:
    """The folder itself if it is one of datasets'."""
    parents = [folder, folder / "data", *(folder / alias for split in ("train", "val") for alias in aliases(split))]
    signs = any((parent / name).is_file() for parent in parents for name in _SIGNS)
    return folder if signs or any(next(parent.glob("*.parquet"), None) for parent in parents[:2]) else None


def source(place: Path | str) -> Source:
    """An opened folder, or what the hub name "owner/name" or "owner/name:config" stands for."""
    splits = _load(place)
    first = "train" if "train" in splits else next(iter(splits))
    (sample,) = _split(place, splits, first, 1)
    names = _names(Path(place)) if os.path.isdir(place) else ()
    return Source("hf", str(place), names, palette_of(sample.mask), partial(_split, place, splits))


def _load(place: Path | str) -> Mapping[str, Any]:
    """Splits by name. ImportError without the package, ValueError for what it cannot open."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{place} is to be opened by Hugging Face's datasets, which is not installed; "
            'pip install "datasets>=4,<6".'
        ) from error
    try:
        if os.path.isdir(place):
            saved = any(os.path.isfile(os.path.join(place, name)) for name in _SAVED)
            loaded = datasets.load_from_disk(place) if saved else datasets.load_dataset(os.fspath(place))
        else:
            name, _, config = str(place).partition(":")
            loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # a library over a network and many readers fails in many ways
        raise ValueError(
            f"{place} could not be opened by datasets ({' '.join(str(error).split())[:300]}); check the name or "
            "folder and the connection, and for a set with several configurations write NAME:CONFIG."
        ) from error
    return loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _split(place: Path | str, splits: Mapping[str, Any], split: str, limit: int | None = None) -> tuple[Pair, ...]:
    name = next((alias for alias in (split, *aliases(split)) if alias in splits), None)
    if name is None:
        raise FileNotFoundError(
            f"{place} has no {split} split (it has {', '.join(splits)}); make one with train_test_split of datasets, "
            f"name it {split}, and save_to_disk both."
        )
    table = splits[name]
    image, label = _columns(table.features, f"{name} of {place}")
    if not len(table):
        raise ValueError(f"{name} of {place} has no row; give a split with pictures.")
    images, labels = (_encoded(table, column) for column in (image, label))
    of_image, of_label = (f"column {column} of {name} in {place}" for column in (image, label))
    return tuple(
        Pair(f"{name}_{row:06d}", HfCell(images, row, of_image), HfCell(labels, row, of_label))
        for row in range(len(table) if limit is None else min(limit, len(table)))
    )


def _columns(features: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The names of the image column and the label column; ValueError where they cannot be told."""
    pictures = [name for name, feature in features.items() if _holds_pictures(feature)]
    images = [name for name in IMAGE_COLUMNS if name in pictures]
    labels = [name for name in LABEL_COLUMNS if name in pictures]
    if images and not labels and len(pictures) == 2:
        labels = [name for name in pictures if name != images[0]]
    if not images or not labels:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise ValueError(
            f"The columns of {where} are {columns}, where one of pictures named image and one of masks named label are "
            "needed; rename them with rename_columns of datasets, masks as pictures, and save_to_disk."
        )
    return images[0], labels[0]


def _holds_pictures(feature: Any) -> bool:
    if isinstance(feature, dict):  # a picture saved without saying so
        return set(feature) == {"bytes", "path"}
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _encoded(table: Any, column: str) -> Any:
    """The column alone, its pictures left as they are stored."""
    import datasets

    alone = table.select_columns([column]).with_format(None)
    if isinstance(alone.features[column], datasets.Image):
        alone = alone.cast_column(column, datasets.Image(decode=False))
    return alone


def _names(folder: Path) -> tuple[str, ...]:
    """classes.txt, or the id2label.json that many data sets on the hub have."""
    names = class_names(folder)
    path = folder / "id2label.json"
    if names or not path.is_file():
        return names
    try:
        table = {int(number): str(name) for number, name in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{path} is not a table of names such as {{"0": "wall"}}; mend it or remove it.') from error
    return tuple(table.get(number, "") for number in range(max(table, default=-1) + 1))
