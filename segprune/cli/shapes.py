"""`segprune shapes DIR`: a generated data set in VOC layout."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Annotated

from typer import Argument, Option

from segprune.cli.common import console, progress_bar
from segprune.data import CLASS_NAMES, write_shapes


@dataclass(frozen=True)
class ShapesConfig:
    folder: Annotated[str, Argument(metavar="DIR", help="New or empty folder; a set generated there is replaced.")]
    num_train: Annotated[int, Option("--num_train", help="Training pictures.")] = 800
    num_val: Annotated[int, Option("--num_val", help="Validation pictures.")] = 200
    size: Annotated[tuple[int, int], Option("--size", metavar="H W", help="Pixels.")] = (128, 128)
    seed: Annotated[int, Option("--seed", help="The same seed gives the same files.")] = 11


def run(config: ShapesConfig, given: frozenset[str]) -> None:
    """Write a generated data set in VOC layout: 8 classes, JPEG images, palette PNG masks, train and val lists.

    Good for a first try without data of your own: b0 learns it from scratch within minutes on a CPU.
    """
    with progress_bar("drawing") as advance:
        root = write_shapes(config.folder, config.num_train, config.num_val, config.size, config.seed, progress=advance)
    console.print(f"{config.num_train + config.num_val} pictures, {len(CLASS_NAMES)} classes, in {root}")
    console.print(
        f"Train on them: segprune train --data {shlex.quote(config.folder)} --phi b0 --num_classes {len(CLASS_NAMES)} "
        f"--input_shape {config.size[0]} {config.size[1]}",
        soft_wrap=True,
    )
