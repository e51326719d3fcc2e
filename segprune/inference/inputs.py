"""What can be predicted on: an image, a folder of images, a video file, or the number of a camera."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segprune.data import load_image
from segprune.data.listing import choose_images, list_files
from segprune.data.pixels import IMAGE_EXTENSIONS
from segprune.data.transforms import Bytes
from segprune.files import is_same_path
from segprune.inference.label_maps import EvalMode, Prepared, prepare
from segprune.spec import RGB

Kind = Literal["image", "folder", "video", "camera"]

# fmt: off
VIDEOS = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".webm", ".wmv",
)
# fmt: on


@dataclass(frozen=True)
class ImageFile:
    """An image's path, its name below the folder that was searched, and the name of what is written, a .png."""

    path: Path
    name: str
    target: str


@dataclass(frozen=True)
class LoadedImage:
    """An image [H, W, C] uint8, and what the network gets of it."""

    image: Bytes
    prepared: Prepared


def recognise_input(source: str) -> Kind:
    """Returns what `source` is: a path first, then a camera's number. FileNotFoundError if it is nothing known."""
    path = Path(source)
    if path.is_dir():
        return "folder"
    if path.is_file():
        return "video" if path.suffix.lower() in VIDEOS else "image"
    if source.isascii() and source.isdigit():
        return "camera"
    raise FileNotFoundError(
        f"{source} does not exist; give an image, a folder of images, a video or the number of a camera."
    )


def find_images(source: str, save_dir: str) -> tuple[list[ImageFile], int]:
    """Returns the image, or all images below a folder by name, and how many other files lie there.

    Hidden files and those below `save_dir` are left out. ValueError for a folder without images, and where
    `save_dir` is the folder itself.
    """
    root, out = Path(source), Path(save_dir)
    # A single file is taken whatever its ending is; an error comes when it is read.
    if root.is_file():
        return [ImageFile(root, root.name, f"{root.stem}.png")], 0
    if is_same_path(out, root):
        raise ValueError(
            f"`save_dir` {out} is the folder of the images itself; give another one."
        )

    # What an earlier run wrote below `save_dir` is no input of this one.
    paths = list_files(root, skip=out)
    images = [Path(path) for path in choose_images(paths)]
    if not images:
        raise ValueError(
            f"{root} holds no image; give a folder with {', '.join(IMAGE_EXTENSIONS)} files."
        )

    return _name_targets(root, images), len(paths) - len(images)


def _name_targets(root: Path, paths: Sequence[Path]) -> list[ImageFile]:
    """Names the file to write for each image: a.png for a.jpg, but a.jpg.png where there is an a.png beside it."""
    # Every result ends in .png, so a.jpg and a.png would be written to one file.
    stems = [str(path.relative_to(root).with_suffix("")) for path in paths]
    num_alike = Counter(stem.casefold() for stem in stems)  # some file systems ignore case

    images = []
    for path, stem in zip(paths, stems, strict=True):
        below_root = path.relative_to(root)
        target = stem if num_alike[stem.casefold()] == 1 else str(below_root)
        images.append(ImageFile(path, _printable(below_root.as_posix()), f"{target}.png"))
    return images


def check_sources_kept(
    sources: Sequence[Path], save_dir: Path, kinds: Sequence[str], targets: Sequence[str]
) -> None:
    """Raises ValueError if a file that is read is one that will be written, SAVE_DIR/KIND/TARGET."""
    # Compare what links lead to: two names may be one file.
    written: set[str] = set()
    for kind in kinds:
        written.update(os.path.realpath(save_dir / kind / target) for target in targets)

    for source in sources:
        if os.path.realpath(source) in written:
            raise ValueError(f"{source} would be overwritten; give another `save_dir`.")


def read_image(path: Path, how: EvalMode, channels: int = RGB) -> LoadedImage:
    """Reads an image of so many channels upright and prepares it; ValueError if it cannot be read."""
    try:
        image = load_image(path, upright=True, channels=channels)
    except ValueError as error:
        # Whether an image may be left out is for the caller to say.
        raise ValueError(re.sub(r", or leave it out with [^.;]+", "", str(error))) from error
    except Exception as error:  # damaged files make decoders fail in every possible way
        raise ValueError(f"{path} cannot be read as an image ({error}); replace it.") from error
    return LoadedImage(image, prepare(image, how))


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode()  # names on disk need not be text
