"""`segprune shapes DIR`: a generated data set in VOC layout."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Annotated

from typer import Argument, Option

from segprune.cli.console import console, progress_bar
from segprune.data import CLASS_NAMES, CONTEXT_CLASS_NAMES, write_shapes


@dataclass(frozen=True)
class ShapesConfig:
    folder: Annotated[str, Argument(metavar="DIR", help="New or empty folder; a set generated there is replaced.")]
    num_train: Annotated[int, Option("--num_train", help="Training images.")] = 800
    num_val: Annotated[int, Option("--num_val", help="Validation images.")] = 200
    size: Annotated[tuple[int, int], Option("--size", metavar="H W", help="Pixels.")] = (128, 128)
    seed: Annotated[int, Option("--seed", help="The same seed gives the same files.")] = 11
    with_context: Annotated[
        bool,
        Option("--with_context", help="14 classes: all but the ring are others when a ring is in the image. Harder."),
    ] = False


def run(config: ShapesConfig, given: frozenset[str]) -> None:
    """Write a generated data set in VOC layout: 8 classes, JPEG images, palette PNG masks, train and val lists.

    Good for a first try without data of your own: b0 learns it from scratch within minutes on a CPU.
    """
    with progress_bar("drawing") as advance:
        root = write_shapes(
            config.folder,
            config.num_train,
            config.num_val,
            config.size,
            config.seed,
            progress=advance,
            context=config.with_context,
        )

    num_classes = len(CONTEXT_CLASS_NAMES if config.with_context else CLASS_NAMES)
    console.print(f"{config.num_train + config.num_val} images, {num_classes} classes, in {root}")
    console.print(
        f"Train on them: segprune train --data {shlex.quote(config.folder)} --phi b0 --num_classes {num_classes} "
        f"--input_shape {config.size[0]} {config.size[1]}",
        soft_wrap=True,
    )
