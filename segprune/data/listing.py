"""Folders and lists read fast: names before paths, each folder listed once, no image opened.

A hundred thousand files are listed in about a second, so paths stay strings here. `walk_folder` is the only way in
which segprune walks folders, so that data sets, inputs of predictions and calibration images see the same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from segprune.data.pixels import ARRAY, IMAGE_EXTENSIONS, Colour
from segprune.data.samples import Pair

MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif")
# After the image's name; the first that exists is taken.
MASK_ENDINGS = (
    "",
    "_mask",
    "_label",
    "_labels",
    "_gt",
    "_GT",
    "_seg",
    "_segmentation",
    "_L",
    "-mask",
)
ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}

# Written by Windows, macOS and network drives into users' folders; in lower case.
SYSTEM_NAMES = {
    "thumbs.db",
    "desktop.ini",
    "__macosx",
    "@eadir",
    "@recycle",
    "#recycle",
    "$recycle.bin",
    "lost+found",
    "system volume information",
}


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder of that name belongs to a tool or a system and not to the user's data.

    Begins with a dot (.ipynb_checkpoints, macOS' ._a.jpg) or is one of `SYSTEM_NAMES`.
    """
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def walk_folder(
    top: str | os.PathLike[str], *, deep: bool = True, skip: str | os.PathLike[str] = ""
) -> Iterator[tuple[str, list[str]]]:
    """Yields (path, sorted names of its files) of the folder and, if `deep`, of those inside, in order of their names.

    Leaves out what is hidden and the folder `skip`. Follows links to folders but ends where one leads back into a
    folder that it lies in. Yields nothing where there is no folder.
    """
    # Compare true paths, since a link can lead to the skipped folder under another name.
    skipped = os.path.realpath(skip) if skip else ""
    yield from _walk(os.fspath(top), deep, skipped, ())


def list_files(top: str | os.PathLike[str], *, skip: str | os.PathLike[str] = "") -> list[str]:
    """Returns the paths of all files that `walk_folder` sees."""
    paths: list[str] = []
    for folder, names in walk_folder(top, skip=skip):
        paths.extend(os.path.join(folder, name) for name in names)

    return paths


def choose_images(paths: Iterable[str]) -> list[str]:
    """Returns the images among the files; arrays (.npy), which may hold anything, only where there are no others."""
    images: list[str] = []
    arrays: list[str] = []
    for path in paths:
        extension = os.path.splitext(path)[1].lower()
        if extension in IMAGE_EXTENSIONS:
            (arrays if extension == ARRAY else images).append(path)

    return images or arrays


def _walk(
    folder: str, deep: bool, skipped: str, above: tuple[str, ...]
) -> Iterator[tuple[str, list[str]]]:
    """`above` are the true paths of the folders on the way here."""
    # A link back to a folder above would be followed without end.
    real = os.path.realpath(folder)
    if real == skipped or real in above or not os.path.isdir(folder):
        return

    # An entry says what it is without another look at the disk, unless it is a link.
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_hidden(entry.name):
                (folders if _is_folder(entry) else files).append(entry.name)

    yield folder, sorted(files)

    if deep:
        for name in sorted(folders):
            yield from _walk(os.path.join(folder, name), deep, skipped, (*above, real))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Follows links; one that leads nowhere or to itself is no folder."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def list_aliases(split: str) -> tuple[str, ...]:
    """Returns what folders and lists of a split may be called."""
    return ALIASES.get(split, (split,))


def find_subfolder(folder: str | os.PathLike[str], names: Iterable[str]) -> str | None:
    """Returns the path of the first of the names that is a folder in `folder`, whatever its capitals."""
    if not os.path.isdir(folder):
        return None

    # Compare in lower case: people write Images and Masks as often as images and masks.
    with os.scandir(folder) as entries:
        there = {entry.name.lower(): entry.path for entry in entries if _is_folder(entry)}

    # The order of the names decides, not that of the folder.
    return next((there[name] for name in names if name in there), None)


def list_by_stem(
    folder: str | os.PathLike[str], extensions: Sequence[str], deep: bool = False
) -> dict[str, str]:
    """Returns the paths of the folder's files by their names without extension.

    Where several share a name, the earliest extension's is taken. With `deep`, files in folders inside are listed as
    well: their keys are relative paths with slashes.
    """
    top = os.fspath(folder)
    rank = {extension.removeprefix("."): number for number, extension in enumerate(extensions)}
    paths: dict[str, str] = {}
    ranks: dict[str, int] = {}

    for parent, names in walk_folder(top, deep=deep):
        # Keys use slashes on every system, since lists are written with them.
        start = os.path.join(parent, "")
        prefix = start.removeprefix(os.path.join(top, "")).replace(os.sep, "/")

        # Of several files of one name the one with the earliest extension stays.
        for name in names:
            stem, _, extension = name.rpartition(".")
            key = prefix + stem
            # Extensions are compared in lower case: cameras write .JPG.
            own_rank = rank.get(extension.lower())
            if own_rank is not None and own_rank < ranks.get(key, len(rank)):
                paths[key] = start + name
                ranks[key] = own_rank

    return paths


def find_first_file(
    folder: str | os.PathLike[str], extensions: Sequence[str] = MASK_EXTENSIONS
) -> str | None:
    """Returns the first file with such an extension, in the folder or in the first folder inside that has one."""
    for parent, names in walk_folder(folder):
        for name in names:
            if os.path.splitext(name)[1].lower() in extensions:
                return os.path.join(parent, name)

    return None


def number_repeats(names: Iterable[str]) -> list[str]:
    """Returns the names, a repeated one with its number behind it: an image may stand in a list twice."""
    # Results are saved under these names, so two samples must not share one.
    seen: dict[str, int] = {}
    numbered = []

    for name in names:
        seen[name] = seen.get(name, 0) + 1
        numbered.append(name if seen[name] == 1 else f"{name} ({seen[name]})")

    return numbered


def pair_folders(
    image_folder: str,
    mask_folder: str,
    names: Sequence[str] | None = None,
    table: bytes | None = None,
    listed_in: str = "",
    colours: tuple[Colour, ...] = (),
) -> tuple[Pair, ...]:
    """Pairs the images and masks of two folders, and of those inside them, by their names.

    `names` chooses and orders the images; `listed_in` is the list that they stand in. Raises FileNotFoundError where
    one of a pair is missing, ValueError where there is no image or masks are JPEG.
    """
    # Folders inside are listed too, and their names belong to the keys.
    images = list_by_stem(image_folder, IMAGE_EXTENSIONS, deep=True)
    masks = list_by_stem(mask_folder, MASK_EXTENSIONS, deep=True)
    if not images:
        raise ValueError(
            f"{image_folder} holds no image ({', '.join(IMAGE_EXTENSIONS)}); put the split's images there."
        )
    # JPEG smears labels at edges into values of other classes, so it is refused.
    if not masks and list_by_stem(mask_folder, (".jpg", ".jpeg"), deep=True):
        raise ValueError(
            f"{mask_folder} holds JPEG masks, and JPEG changes the labels; save the masks as PNG."
        )

    # A mask has its image's name, possibly with an ending.
    chosen = sorted(images) if names is None else list(names)
    mask_paths = {}
    for name in chosen:
        ending = next((ending for ending in MASK_ENDINGS if name + ending in masks), None)
        if ending is not None:
            mask_paths[name] = masks[name + ending]

    check_present(chosen, images, os.path.join(image_folder, "{}.jpg"), "image", listed_in)
    check_present(chosen, mask_paths, os.path.join(mask_folder, "{}.png"), "mask", listed_in)
    # Without a list, a mask without an image is more likely a wrong name than intended.
    if names is None:
        _check_all_used(masks.values(), set(mask_paths.values()), image_folder)

    # A list may repeat an image on purpose, to give it more weight.
    own_names = number_repeats(chosen)
    return tuple(
        Pair(own, images[name], mask_paths[name], table, colours)
        for own, name in zip(own_names, chosen, strict=True)
    )


def pair_side_by_side(folder: str, colours: tuple[Colour, ...] = ()) -> tuple[Pair, ...]:
    """Pairs NAME.jpg and NAME_mask.png of one folder, with any of the endings. () where there is no such pair.

    Raises FileNotFoundError for an image without a mask, where others have one.
    """
    images = list_by_stem(folder, IMAGE_EXTENSIONS)
    masks = list_by_stem(folder, MASK_EXTENSIONS)

    # Masks are images too: a file is an image if it is no other's mask.
    mask_names = {}
    for name in images:
        for ending in MASK_ENDINGS[1:]:
            if name + ending in masks:
                mask_names[name] = name + ending
    if not mask_names:
        return ()

    names = sorted(images.keys() - set(mask_names.values()))
    paths = {name: masks[mask] for name, mask in mask_names.items()}
    check_present(names, paths, os.path.join(folder, "{}_mask.png"), "mask", "")
    return tuple(Pair(name, images[name], paths[name], None, colours) for name in names)


def check_present(
    names: Sequence[str],
    paths: Mapping[str, str],
    place: str,
    kind: str,
    listed_in: str,
    remark: str = "",
) -> None:
    """Raises FileNotFoundError for names without a path; `place` is where one belongs, with `{}` for the name."""
    missing = [name for name in names if name not in paths]
    if not missing:
        return

    # The remedy depends on who named the file: its partner, or a list.
    of_list, remedy = "", "remove its partner"
    if listed_in:
        of_list, remedy = f" of {listed_in}", f"take its name off {listed_in}"
    raise FileNotFoundError(
        f"{kind.capitalize()} {place.format(missing[0])} is missing ({len(missing)} of {len(names)} {kind}s{of_list} "
        f"are{remark}); add it or {remedy}."
    )


def _check_all_used(masks: Iterable[str], used: set[str], image_folder: str) -> None:
    masks = list(masks)
    unused = [path for path in masks if path not in used]
    if unused:
        raise FileNotFoundError(
            f"Mask {unused[0]} has no image of its name in {image_folder} ({len(unused)} of {len(masks)} masks have "
            "none); add it, remove the mask, or list the images to use in train.txt and val.txt."
        )
