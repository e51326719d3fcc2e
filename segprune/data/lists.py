"""Two-column lists: a line names an image and its mask, relative to the list's folder.

The columns are separated by a tab, a comma, or blanks; names with blanks need one of the first two. A mask's pixel
value is the class, 255 is ignored. Given is the training list, with val.txt (or the list's name with val for
train) beside it, or the folder that holds both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from segprune.data.listing import ALIASES, aliases, class_names, read_lines, unique
from segprune.data.pixels import IMAGE_EXTENSIONS, palette_of
from segprune.data.samples import Pair, Source

LOOKED_FOR = "train.txt and val.txt with lines IMAGE MASK"
SUFFIXES = (".txt", ".csv", ".tsv", ".lst")
_HEADER = {"image", "img", "images", "image_path", "file_name", "filename"}


def find(path: Path) -> Path | None:
    """The list itself if `path` is a file; in a folder the first split's list whose first line names two pictures."""
    if path.is_file():
        return path
    for name in (alias for split in ALIASES for alias in ALIASES[split]):
        for suffix in SUFFIXES:
            if (path / (name + suffix)).is_file() and _names_two_pictures(path / (name + suffix)):
                return path / (name + suffix)
    return None


def source(path: Path) -> Source:
    try:
        first = next(_rows(path), None)
    except ValueError:  # told of where the split is read
        first = None
    palette = palette_of(os.path.join(path.parent, first[1]) if first else None)
    return Source("list", str(path), class_names(path.parent), palette, partial(_split, path))


def _split(path: Path, split: str) -> tuple[Pair, ...]:
    listed = _list_of(path, split)
    rows = list(_rows(listed))
    if not rows:
        raise ValueError(f"{listed} lists no picture; write an image and its mask on each line.")
    folder = os.path.join(listed.parent, "")
    images, masks = (
        [path if os.path.isabs(path) else folder + path for path in column] for column in zip(*rows, strict=True)
    )
    _check_present([*images, *masks], listed)
    names = _names([image for image, _ in rows])
    return tuple(Pair(*row) for row in zip(names, images, masks, strict=True))


def _list_of(path: Path, split: str) -> Path:
    """The given list if it is the split's, else the one beside it."""
    mine = next((known for known in ALIASES if path.stem in aliases(known)), None)
    if split == (mine or "train"):
        return path
    names = [path.stem.replace("train", split)] if "train" in path.stem else []
    beside = [path.with_name(name + path.suffix) for name in [*names, *aliases(split)]]
    found = next((candidate for candidate in beside if candidate.is_file() and candidate != path), None)
    if found is None:
        raise FileNotFoundError(
            f"{beside[0]} is missing, the list of the {split} split; write it with an image and its mask on each line"
            + (", about a tenth of the pictures, and take them off the other list." if split == "val" else ".")
        )
    return found


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """The two columns of each line; a heading as in CSV files is left out. ValueError names a line that has not two."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        columns = _columns(line)
        if number == 1 and columns[0].lower() in _HEADER:
            continue
        if len(columns) != 2:
            raise ValueError(
                f"Line {number} of {path} has {len(columns)} column{'s' * (len(columns) != 1)}, where an image and its "
                "mask are allowed; separate them by a blank, or by a tab or comma where names hold blanks."
            )
        yield columns[0], columns[1]


def _columns(line: str) -> list[str]:
    separator = next((mark for mark in "\t," if mark in line), None)
    return [column.strip().strip('"') for column in line.strip().split(separator)]


def _names_two_pictures(path: Path) -> bool:
    lines = [line for line in read_lines(path)[:2] if line.strip()]
    columns = [_columns(line) for line in lines]
    return any(
        len(two) == 2 and all(os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS for name in two) for two in columns
    )


def _check_present(paths: Sequence[str], listed: Path) -> None:
    """Lists each folder once instead of asking for each file."""
    split = [os.path.split(path) for path in paths]
    there = {folder: set(os.listdir(folder)) if os.path.isdir(folder) else set() for folder in {f for f, _ in split}}
    missing = [path for path, (folder, name) in zip(paths, split, strict=True) if name not in there[folder]]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing ({len(missing)} of {len(paths)} files in {listed} are); paths are relative to "
            "the list's folder: add the file, mend the path, or take the line off."
        )


def _names(images: Sequence[str]) -> list[str]:
    """The files' names without extension where all differ, else with their folders; never a way out of a folder."""
    stems = [os.path.splitext(image.replace("\\", "/"))[0] for image in images]
    names = [stem.rpartition("/")[2] for stem in stems]
    if len(set(names)) == len(names):
        return names
    return unique("/".join(part for part in stem.split("/") if part not in ("", ".", "..")) for stem in stems)
