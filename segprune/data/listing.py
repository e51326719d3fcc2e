"""Folders and lists read fast: names before paths, each folder listed once, no file opened.

A hundred thousand files are listed in about a second, so paths stay strings here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from segprune.data.pixels import IMAGE_EXTENSIONS
from segprune.data.samples import Pair

MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff")
MASK_ENDINGS = ("", "_mask", "_label", "_labels", "_gt", "_seg")  # after the image's name, the first that is there
ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def aliases(split: str) -> tuple[str, ...]:
    """What folders and lists of a split may be called."""
    return ALIASES.get(split, (split,))


def subfolder(folder: str | os.PathLike[str], names: Iterable[str]) -> str | None:
    """The first of the names that is a folder in `folder`, whatever its capitals; as a path."""
    if not os.path.isdir(folder):
        return None
    there = {entry.name.lower(): entry.path for entry in os.scandir(folder) if entry.is_dir()}
    return next((there[name] for name in names if name in there), None)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 text without their ends; ValueError for another encoding."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, the only encoding read; save it as UTF-8.") from error


def class_names(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """The lines of classes.txt in the folder, line k naming class k; () where there is none."""
    path = os.path.join(folder, "classes.txt")
    names = [line.strip() for line in read_lines(path)] if os.path.isfile(path) else []
    while names and not names[-1]:
        names.pop()
    return tuple(names)


def by_stem(folder: str | os.PathLike[str], extensions: Sequence[str], deep: bool = False) -> dict[str, str]:
    """The folder's files by name without extension, in no order; hidden files are left out.

    Where several share a name, the earliest extension's is taken. `deep` goes into the folders inside: keys are then
    relative paths with slashes.
    """
    rank = {extension.removeprefix("."): number for number, extension in enumerate(extensions)}
    found: dict[str, str] = {}
    ranks: dict[str, int] = {}
    for parent, names, prefix in _folders(os.fspath(folder), deep):
        start = os.path.join(parent, "")
        for name in sorted(names):
            stem, _, extension = name.rpartition(".")
            mine = rank.get(extension.lower())
            key = prefix + stem
            if mine is not None and not name.startswith(".") and mine < ranks.get(key, len(rank)):
                found[key], ranks[key] = start + name, mine
    return found


def _folders(top: str, deep: bool) -> Iterable[tuple[str, list[str], str]]:
    """(path, names of the files, prefix of their keys) of the folder and, if `deep`, of those inside."""
    if not os.path.isdir(top):
        return
    if not deep:
        yield top, os.listdir(top), ""
        return
    for parent, _, names in os.walk(top, followlinks=True):
        inside = os.path.relpath(parent, top).replace(os.sep, "/")
        yield parent, names, "" if inside == "." else f"{inside}/"


def first_file(folder: str | os.PathLike[str], extensions: Sequence[str] = MASK_EXTENSIONS) -> str | None:
    """The first file with such an extension, in the folder or in the first folder inside that has one."""
    if not os.path.isdir(folder):
        return None
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if os.path.splitext(entry.name)[1].lower() in extensions and not entry.name.startswith("."):
            return entry.path
    inside = (first_file(entry.path, extensions) for entry in entries if entry.is_dir(follow_symlinks=False))
    return next((path for path in inside if path is not None), None)


def unique(names: Iterable[str]) -> list[str]:
    """The names, a repeated one with its number behind it: a picture may stand in a list twice."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def pairs(
    image_folder: str,
    mask_folder: str,
    names: Sequence[str] | None = None,
    table: bytes | None = None,
    listed_in: str = "",
) -> tuple[Pair, ...]:
    """Images and masks of two folders (and those inside them) by matching names; `names` chooses and orders.

    Raises FileNotFoundError where one of a pair is missing, ValueError where there is none or masks are JPEG.
    """
    images = by_stem(image_folder, IMAGE_EXTENSIONS, deep=True)
    masks = by_stem(mask_folder, MASK_EXTENSIONS, deep=True)
    if not images:
        raise ValueError(
            f"{image_folder} holds no image ({', '.join(IMAGE_EXTENSIONS)}); put the split's images there."
        )
    if not masks and by_stem(mask_folder, (".jpg", ".jpeg"), deep=True):
        raise ValueError(f"{mask_folder} holds JPEG masks, and JPEG changes the labels; save the masks as PNG.")
    chosen = sorted(images) if names is None else list(names)
    partner = {name: _mask_name(name, masks) for name in chosen}
    check_present(chosen, images, os.path.join(image_folder, "{}.jpg"), "image", listed_in)
    check_present(chosen, partner, os.path.join(mask_folder, "{}.png"), "mask", listed_in)
    if names is None:
        _check_no_mask_alone(masks, set(partner.values()), image_folder)
    return tuple(
        Pair(own, images[name], masks[str(partner[name])], table)
        for own, name in zip(unique(chosen), chosen, strict=True)
    )


def _mask_name(image: str, masks: dict[str, str]) -> str | None:
    return next((image + ending for ending in MASK_ENDINGS if image + ending in masks), None)


def check_present(
    names: Sequence[str], found: dict[str, str] | dict[str, str | None], path: str, kind: str, listed_in: str
) -> None:
    """FileNotFoundError for names that were not found; `path` has a place for the name."""
    missing = [name for name in names if found.get(name) is None]
    if missing:
        of, remedy = (f" of {listed_in}", f"take its name off {listed_in}") if listed_in else ("", "remove its partner")
        raise FileNotFoundError(
            f"{kind.capitalize()} {path.format(missing[0])} is missing ({len(missing)} of "
            f"{len(names)} {kind}s{of} are); add it or {remedy}."
        )


def _check_no_mask_alone(masks: dict[str, str], used: set[str | None], image_folder: str) -> None:
    alone = [path for name, path in masks.items() if name not in used]
    if alone:
        raise FileNotFoundError(
            f"Mask {alone[0]} has no image of its name in {image_folder} ({len(alone)} of {len(masks)} masks have "
            "none); add it, remove the mask, or list the images to use in train.txt and val.txt."
        )
