"""Two-column lists: a line names an image and its mask, relative to the list's folder.

The columns are separated by a tab, a comma, or blanks; names with blanks need one of the first two. A mask's pixel
value is the class, 255 is ignored. The user gives the training list, with val.txt (or the list's name with val for
train) beside it, or the folder that holds both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from segprune.data.listing import ALIASES, list_aliases, number_repeats, read_class_names, read_lines
from segprune.data.pixels import IMAGE_EXTENSIONS, read_palette
from segprune.data.samples import Pair, Source

SIGNS = "train.txt and val.txt with lines IMAGE MASK"
SUFFIXES = (".txt", ".csv", ".tsv", ".lst")
_HEADINGS = {"image", "img", "images", "image_path", "file_name", "filename"}


def find_root(path: Path) -> Path | None:
    """Returns the list itself if `path` is a file; in a folder the first list of a split that names two images."""
    if path.is_file():
        return path

    for split in ALIASES:
        for name in list_aliases(split):
            for suffix in SUFFIXES:
                candidate = path / (name + suffix)
                if candidate.is_file() and _names_two_images(candidate):
                    return candidate

    return None


def _names_two_images(path: Path) -> bool:
    """Returns whether one of the first two lines does: the first may be a heading."""
    for line in read_lines(path)[:2]:
        extensions = [os.path.splitext(name)[1].lower() for name in _split_columns(line)]
        if len(extensions) == 2 and all(extension in IMAGE_EXTENSIONS for extension in extensions):
            return True

    return False


def open_root(path: Path) -> Source:
    try:
        first = next(_read_rows(path), None)
    except ValueError:  # raised again where the split is read
        first = None

    palette = read_palette(os.path.join(path.parent, first[1]) if first else None)
    return Source("list", str(path), read_class_names(path.parent), palette, partial(_list_split, path))


def _list_split(path: Path, split: str) -> tuple[Pair, ...]:
    listed = _find_list(path, split)
    rows = list(_read_rows(listed))
    if not rows:
        raise ValueError(f"{listed} lists no image; write an image and its mask on each line.")

    # `join` leaves absolute paths as they are.
    images = [os.path.join(listed.parent, image) for image, _ in rows]
    masks = [os.path.join(listed.parent, mask) for _, mask in rows]
    _check_present([*images, *masks], listed)

    names = _name_samples([image for image, _ in rows])
    return tuple(Pair(*row) for row in zip(names, images, masks, strict=True))


def _find_list(path: Path, split: str) -> Path:
    """Returns the given list if it is the split's, else the one beside it."""
    own_split = "train"
    for known in ALIASES:
        if path.stem in list_aliases(known):
            own_split = known
    if split == own_split:
        return path

    names = list(list_aliases(split))
    if "train" in path.stem:
        names.insert(0, path.stem.replace("train", split))

    candidates = [path.with_name(name + path.suffix) for name in names]
    for candidate in candidates:
        if candidate.is_file() and candidate != path:
            return candidate

    share = ", about a tenth of the images, and take them off the other list" if split == "val" else ""
    raise FileNotFoundError(
        f"{candidates[0]} is missing, the list of the {split} split; write it with an image and its mask on each "
        f"line{share}."
    )


def _read_rows(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the two columns of each line, without a heading. Raises ValueError that names a line of another number."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue

        columns = _split_columns(line)
        if number == 1 and columns[0].lower() in _HEADINGS:
            continue
        if len(columns) != 2:
            raise ValueError(
                f"Line {number} of {path} has {len(columns)} column{'s' * (len(columns) != 1)}, where an image and its "
                "mask are allowed; separate them by a blank, or by a tab or comma where names hold blanks."
            )

        yield columns[0], columns[1]


def _split_columns(line: str) -> list[str]:
    separator = next((mark for mark in "\t," if mark in line), None)
    return [column.strip().strip('"') for column in line.strip().split(separator)]


def _check_present(paths: Sequence[str], listed: Path) -> None:
    """Raises FileNotFoundError if one is missing. Lists each folder once instead of looking for each file."""
    there: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in there:
            there[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in there[folder]:
            missing.append(path)

    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing ({len(missing)} of {len(paths)} files in {listed} are); paths are relative to "
            "the list's folder: add the file, correct the path, or take the line off."
        )


def _name_samples(images: Sequence[str]) -> list[str]:
    """Returns the files' names without extension where all differ, else with their folders.

    Results are written under these names, so none leads out of a folder.
    """
    stems = [os.path.splitext(image.replace("\\", "/"))[0] for image in images]
    names = [stem.rpartition("/")[2] for stem in stems]
    if len(set(names)) == len(names):
        return names

    inside = []
    for stem in stems:
        parts = [part for part in stem.split("/") if part not in ("", ".", "..")]
        inside.append("/".join(parts))

    return number_repeats(inside)
