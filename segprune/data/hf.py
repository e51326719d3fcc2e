"""Hugging Face `datasets`: a folder or a hub name, with an image column and a label column.

A folder is one written by `save_to_disk`, an imagefolder whose metadata names a mask beside each image, or parquet
files. Images are taken encoded, as they are stored, and decoded by us like files; the mask's pixel value is the
class, 255 is ignored. The package `datasets` is imported only here, and only when such a set is opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from segprune.data.classes import read_classes
from segprune.data.listing import list_aliases
from segprune.data.pixels import SampleError, read_palette
from segprune.data.samples import MissingSplitError, Pair, Source
from segprune.files import read_json

SIGNS = "a folder of save_to_disk, metadata.jsonl beside images, or *.parquet"
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
MAX_NAMES = 1 << 16
_SAVED = ("dataset_dict.json", "state.json")
_FILES = (*_SAVED, "metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True, slots=True)
class HfCell:
    """An image in a row of one column."""

    column: Any  # a datasets.Dataset of that column alone, images left encoded
    row: int
    where: str  # "column image of train in PATH"

    def __str__(self) -> str:
        return f"row {self.row}, {self.where}"

    def read(self) -> bytes:
        # Without decoding, a row holds the file's bytes, or its path on this machine.
        (value,) = self.column[self.row].values()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and os.path.isfile(value):
            return Path(value).read_bytes()
        if not isinstance(value, bytes):
            raise SampleError(
                f"{self} holds no image; put one there, or leave the row out with `skip_bad`."
            )

        return value


def find_root(folder: Path) -> Path | None:
    """Returns the folder itself if `datasets` can open it."""
    # Parquet files lie in the folder itself, or in data/ as the hub lays them out.
    parents = [folder, folder / "data"]
    for parent in parents:
        if next(parent.glob("*.parquet"), None):
            return folder

    # An imagefolder has its metadata in the splits' folders.
    for split in ("train", "val"):
        parents.extend(folder / alias for alias in list_aliases(split))
    for parent in parents:
        if any((parent / name).is_file() for name in _FILES):
            return folder

    return None


def open_root(place: Path | str) -> Source:
    """Returns the data set of a folder, or of the hub name "owner/name" or "owner/name:config"."""
    splits = _load_splits(place)
    names = _read_names(Path(place)) if os.path.isdir(place) else ()

    # The palette is that of the first mask.
    first = "train" if "train" in splits else next(iter(splits))
    (sample,) = _list_split(place, splits, first, 1)
    return Source(
        "hf", str(place), names, read_palette(sample.mask), partial(_list_split, place, splits)
    )


def _load_splits(place: Path | str) -> Mapping[str, Any]:
    """Returns the splits by name. Raises ImportError without the package, ValueError for what it cannot open."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{place} is to be opened by Hugging Face's datasets, which is not installed; "
            'pip install "datasets>=4,<6".'
        ) from error

    try:
        # Folders of save_to_disk are for load_from_disk alone; load_dataset refuses them.
        if not os.path.isdir(place):
            name, _, config = str(place).partition(":")
            loaded = datasets.load_dataset(name, config or None)
        elif any(os.path.isfile(os.path.join(place, name)) for name in _SAVED):
            loaded = datasets.load_from_disk(place)
        else:
            loaded = datasets.load_dataset(os.fspath(place))
    except Exception as error:  # a library over a network and many readers fails in many ways
        raise ValueError(
            f"{place} could not be opened by datasets ({' '.join(str(error).split())[:300]}); check the name or "
            "folder and the connection, and for a set with several configurations write NAME:CONFIG."
        ) from error

    # A data set saved without a dictionary of splits is a single split.
    return loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _list_split(
    place: Path | str, splits: Mapping[str, Any], split: str, limit: int | None = None
) -> tuple[Pair, ...]:
    # The exact name first, then the aliases: "validation" serves as "val".
    name = next((alias for alias in (split, *list_aliases(split)) if alias in splits), None)
    if name is None:
        remedy = f"make one with train_test_split of datasets, name it {split}, and save_to_disk both"
        if split == "val":
            remedy += ", or train with `val_share` 0.1 or another `val_split`"
        raise MissingSplitError(
            f"{place} has no {split} split (it has {', '.join(splits)}); {remedy}."
        )

    table = splits[name]
    image_column, mask_column = _choose_columns(table.features, f"{name} of {place}")
    if not len(table):
        raise ValueError(f"{name} of {place} has no row; give a split with images.")

    # Rows are read one at a time, when a sample is loaded.
    images = _select_encoded(table, image_column)
    masks = _select_encoded(table, mask_column)
    pairs = []
    for row in range(len(table) if limit is None else min(limit, len(table))):
        image = HfCell(images, row, f"column {image_column} of {name} in {place}")
        mask = HfCell(masks, row, f"column {mask_column} of {name} in {place}")
        pairs.append(Pair(f"{name}_{row:06d}", image, mask))

    return tuple(pairs)


def _choose_columns(features: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Returns the names of the image column and the label column. Raises ValueError where they cannot be told."""
    # Names alone mislead: in sets for classification "label" is a number.
    candidates = [name for name, feature in features.items() if _holds_images(feature)]
    images = [name for name in IMAGE_COLUMNS if name in candidates]
    labels = [name for name in LABEL_COLUMNS if name in candidates]

    # Of two columns of images, one of which is known, the other holds the labels.
    if images and not labels and len(candidates) == 2:
        labels = [name for name in candidates if name != images[0]]

    if not images or not labels:
        columns = ", ".join(
            f"{name} ({type(feature).__name__})" for name, feature in features.items()
        )
        raise ValueError(
            f"The columns of {where} are {columns}, where one of images named image and one of masks named label are "
            "needed; rename them with rename_columns of datasets, masks as images, and save_to_disk."
        )
    return images[0], labels[0]


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):  # an encoded image whose column was not declared as one
        return set(feature) == {"bytes", "path"}
    # Compare type names; columns of bytes are what parquet files hold by themselves.
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in (
        "binary",
        "large_binary",
    )


def _select_encoded(table: Any, column: str) -> Any:
    """Returns the column alone, its images left as they are stored."""
    import datasets

    # Decoding is switched off, so that palettes and 16 bits are read as from files.
    alone = table.select_columns([column]).with_format(None)
    if isinstance(alone.features[column], datasets.Image):
        alone = alone.cast_column(column, datasets.Image(decode=False))

    return alone


def _read_names(folder: Path) -> tuple[str, ...]:
    """Returns the names in classes.txt, or in the id2label.json that many data sets on the hub have."""
    # A file that the user wrote is preferred to what came with the download.
    names = read_classes(folder).names
    path = folder / "id2label.json"
    if names or not path.is_file():
        return names

    try:
        entries = read_json(path, "a table of names").items()
        table = {int(number): str(name) for number, name in entries}
        # A hole in the numbers is filled, but not up to any number that somebody wrote there.
        if not all(0 <= number < MAX_NAMES for number in table):
            raise ValueError(f"numbers beyond 0..{MAX_NAMES - 1}")
    except ValueError as error:
        raise ValueError(
            f'{path} is not a table of names such as {{"0": "wall"}}; correct or remove it.'
        ) from error

    return tuple(table.get(number, "") for number in range(max(table, default=-1) + 1))
