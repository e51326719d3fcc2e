"""Two-column lists: a line names an image and its mask, relative to the list's folder.

The columns are separated by a tab, a comma, or blanks; names with blanks need one of the first two. A mask's pixel
value is the class, 255 is ignored. The user gives the training list, with val.txt (or the list's name with val for
train) beside it, or the folder that holds both. Paths that exist nowhere as they stand, because the list was written
on another machine, are looked for below the list's folder and the two above it, by their endings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from segprune.data.classes import ClassTable, read_classes
from segprune.data.listing import ALIASES, list_aliases, number_repeats
from segprune.data.pixels import IMAGE_EXTENSIONS, read_palette
from segprune.data.samples import MissingSplitError, Pair, Source
from segprune.data.text import describe_encoding, read_lines, read_rows, split_columns

SIGNS = "train.txt and val.txt, or train_list.txt and val_list.txt, with lines IMAGE MASK"
SUFFIXES = (".txt", ".csv", ".tsv", ".lst")
_ENDINGS = ("", "_list")  # after a split's name
_NUM_TRIED = 20  # lines whose paths are looked for, until one file is there


def find_root(path: Path) -> Path | None:
    """Returns the list itself if `path` is a file; in a folder the first list of a split that names two images."""
    if path.is_file():
        return path

    # A train.txt may hold other things, so look whether a line names two images.
    for split in ALIASES:
        for name in _list_stems(split):
            for suffix in SUFFIXES:
                candidate = path / (name + suffix)
                if candidate.is_file() and _names_two_images(candidate):
                    return candidate

    return None


def _list_stems(split: str) -> list[str]:
    """Returns how the lists of a split are called, without their suffixes."""
    stems: list[str] = []
    for ending in _ENDINGS:
        stems.extend(alias + ending for alias in list_aliases(split))

    return stems


def _names_two_images(path: Path) -> bool:
    """Returns whether one of the first two lines does: the first may be a heading."""
    for line in read_lines(path)[:2]:
        # A third column in front may be a running number, as pandas writes.
        extensions = [os.path.splitext(name)[1].lower() for name in split_columns(line)]
        if len(extensions) in (2, 3) and all(
            extension in IMAGE_EXTENSIONS for extension in extensions[-2:]
        ):
            return True

    return False


def open_root(path: Path) -> Source:
    classes = read_classes(path.parent)
    note = ""
    first_mask = None
    # The masks are located here only for the palette and for the note.
    try:
        rows = _read_pairs(path)
        masks, note = locate([mask for _, mask in rows], path.parent)
        first_mask = masks[0] if masks else None
    except ValueError:  # raised again where the split is read
        pass

    return Source(
        "list",
        str(path),
        classes.names,
        classes.palette if classes.colours else read_palette(first_mask),
        partial(list_split, path, classes),
        own_numbering=not classes.colours,
        notes=(f"Paths in {path} exist nowhere as they stand; {note}.",) if note else (),
    )


def list_split(path: Path, classes: ClassTable, split: str) -> tuple[Pair, ...]:
    """Returns the split's pairs; `path` is any of the lists that lie beside each other."""
    listed = _find_list(path, split)
    rows = _read_pairs(listed)
    if not rows:
        raise ValueError(f"{listed} lists no image; write an image and its mask on each line.")

    # Images and masks may have moved differently, so each column is located by itself.
    images, _ = locate([image for image, _ in rows], listed.parent)
    masks, _ = locate([mask for _, mask in rows], listed.parent)
    check_files([*images, *masks], listed)

    names = _name_samples([image for image, _ in rows])
    return tuple(
        Pair(name, image, mask, None, classes.colours)
        for name, image, mask in zip(names, images, masks, strict=True)
    )


def _find_list(path: Path, split: str) -> Path:
    """Returns the given list if it is the split's, else the one beside it."""
    # Which split is the given list? One whose name says nothing is the training list.
    own_split = "train"
    words = re.split(r"[_\-. ]", path.stem)
    for known in ALIASES:
        if any(alias in words for alias in list_aliases(known)):
            own_split = known
    if split == own_split:
        return path

    # The other lists are called alike, or simply after their splits.
    names = _list_stems(split)
    if own_split in path.stem:
        names.insert(0, path.stem.replace(own_split, split))

    candidates = [path.with_name(name + path.suffix) for name in names]
    for candidate in candidates:
        if candidate.is_file() and candidate != path:
            return candidate

    # Only for val is there a way to do without the list.
    share = ""
    if split == "val":
        share = (
            ", about a tenth of the images, and take them off the other list, or train with `val_share` 0.1 or another "
            "`val_split`"
        )
    raise MissingSplitError(
        f"{candidates[0]} is missing, the list of the {split} split; write it with an image and its mask on each "
        f"line{share}."
    )


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    """Returns the two columns of each line. Raises ValueError that names a line with another number of columns."""
    pairs = []
    for number, columns in read_rows(path):
        # A name with a blank in it is the usual cause, and would pair the wrong files.
        if len(columns) != 2:
            raise ValueError(
                f"Line {number} of {path} has {len(columns)} column{'s' * (len(columns) != 1)}, where an image and its "
                "mask are allowed; separate them by a blank, or by a tab or comma where names hold blanks."
            )
        pairs.append((columns[0], columns[1]))

    return pairs


def locate(paths: Sequence[str], folder: Path) -> tuple[list[str], str]:
    """Returns where the files of a list in `folder` lie, and a remark if that is not where the list says.

    If a file is not there, its path's endings are looked for below the folder and the two above it, the longest
    first. What is true of the first file that turns up is taken to be true of all.
    """
    # Most lists are right as they stand, so try that first.
    plain = [os.path.join(folder, path) for path in paths]
    for path, full in zip(paths[:_NUM_TRIED], plain, strict=False):
        if os.path.isfile(full):
            return plain, ""

        # Drop one folder after another from the beginning, until the rest is there.
        parts = path.split("/")
        for start in range(len(parts)):
            ending = "/".join(parts[start:]).lstrip("/")
            for base in (folder, *folder.absolute().parents[:2]):
                if ending and os.path.isfile(base / ending):
                    # Moving all paths alike avoids a search for each of the files.
                    beginning = path.removesuffix(ending)
                    moved = [
                        os.path.join(base, other.removeprefix(beginning)) for other in paths
                    ]
                    return moved, f"{path} is read as {base / ending}, and so are the others"

    return plain, ""


def check_files(paths: Sequence[str], listed: Path) -> None:
    """Raises FileNotFoundError if one is missing. Lists each folder once instead of looking for each file."""
    there: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        # A folder that is not there counts as empty, so all of its files are missing.
        if folder not in there:
            there[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in there[folder]:
            missing.append(path)

    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing ({len(missing)} of {len(paths)} files in {listed} are{describe_encoding(listed)}"
            "); paths are relative to the list's folder: add the file, correct the path, or take the line off."
        )


def _name_samples(images: Sequence[str]) -> list[str]:
    """Returns the files' names without extension where all differ, else with their folders.

    Results are written under these names, so none leads out of a folder.
    """
    # Short names are nicer to read, but two folders may hold the same ones.
    stems = [os.path.splitext(image)[0] for image in images]
    names = [stem.rpartition("/")[2] for stem in stems]
    if len(set(names)) == len(names):
        return names

    inside = []
    for stem in stems:
        parts = [part for part in stem.split("/") if part not in ("", ".", "..")]
        inside.append("/".join(parts))

    return number_repeats(inside)
