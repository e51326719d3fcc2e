"""What `--input` may be: a picture, a folder of pictures, a video file, the number of a camera."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from segprune.data import load_image
from segprune.data.transforms import Bytes
from segprune.inference import label_maps
from segprune.inference.label_maps import EvalMode

# fmt: off
PICTURES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)
VIDEOS = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".webm", ".wmv",
)
# fmt: on


@dataclass(frozen=True)
class Picture:
    """A file, its name below the folder it was found in, and that of what is written, which ends in .png."""

    path: Path
    name: str
    target: str


@dataclass(frozen=True)
class Loaded:
    """A picture [H, W, 3] and what the network gets of it."""

    image: Bytes
    ready: label_maps.Picture


def kind_of(source: str) -> str:
    """ "folder", "video", "camera" or "picture"; FileNotFoundError if it is none of them."""
    path = Path(source)
    if path.is_dir():
        return "folder"
    if path.is_file():
        return "video" if path.suffix.lower() in VIDEOS else "picture"
    if source.isascii() and source.isdigit():
        return "camera"
    raise FileNotFoundError(
        f"--input {source} does not exist; give a picture, a folder of pictures, a video or the number of a camera."
    )


def find_pictures(source: str, save_dir: str) -> tuple[list[Picture], int]:
    """The picture, or all below the folder in order of their names; and the number of other files that lie there.

    Hidden files and what lies in `save_dir` are left out. ValueError where there is no picture, and where one would
    be written over.
    """
    root, out = Path(source), Path(save_dir)
    if root.is_file():
        return [Picture(root, root.name, f"{root.stem}.png")], 0
    if out.resolve() == root.resolve():
        raise ValueError(f"--save_dir {out} is the folder of the pictures itself; give another one.")
    paths = list(_files_below(root, out.resolve()))
    found = [path for path in paths if path.suffix.lower() in PICTURES]
    if not found:
        raise ValueError(f"{root} holds no picture; give a folder with {', '.join(PICTURES)} files.")
    stems = Counter(_stem(root, path).casefold() for path in found)  # some systems tell no case apart
    pictures = [
        Picture(
            path,
            _printable(path.relative_to(root).as_posix()),
            # a.jpg and a.png beside each other become a.jpg.png and a.png.png
            f"{_stem(root, path) if stems[_stem(root, path).casefold()] == 1 else path.relative_to(root)}.png",
        )
        for path in found
    ]
    return pictures, len(paths) - len(found)


def check_not_overwritten(sources: list[Path], folder: Path, kinds: tuple[str, ...], targets: list[str]) -> None:
    """ValueError where a file to be read lies where one will be written, FOLDER/KIND/TARGET."""
    written = {(folder / kind / target).resolve() for kind in kinds for target in targets}
    for source in sources:
        if source.resolve() in written:
            raise ValueError(f"{source} would be written over; give another --save_dir.")


def load_picture(path: Path, how: EvalMode) -> Loaded:
    """A picture read upright and made ready; ValueError if it cannot be read."""
    try:
        image = load_image(path, upright=True)
    except ValueError as error:
        raise ValueError(str(error).replace(", or leave it out with --skip_bad", "")) from error  # no way for one alone
    except Exception as error:  # damaged files fail in every way there is
        raise ValueError(f"{path} cannot be read as an image ({error}); replace it.") from error
    return made_ready(image, how)


def made_ready(image: Bytes, how: EvalMode) -> Loaded:
    return Loaded(image, label_maps.prepare(image, how))


def _files_below(root: Path, left_out: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(d for d in folders if not d.startswith(".") and (here / d).resolve() != left_out)
        yield from (here / name for name in sorted(names) if not name.startswith("."))


def _stem(root: Path, path: Path) -> str:
    return str(path.relative_to(root).with_suffix(""))


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode()  # names on disk need not be text
