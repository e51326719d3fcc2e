"""`segprune shapes DIR`: a generated data set in VOC layout."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Annotated

from typer import Argument, Option

from segprune.cli.console import console, progress_bar
from segprune.data import CLASS_NAMES, CONTEXT_CLASS_NAMES, write_shapes


@dataclass(frozen=True)
class ShapesFlags:
    folder: Annotated[
        str,
        Argument(metavar="DIR", help="New or empty folder; a set generated there is replaced."),
    ]
    num_train: Annotated[int, Option("--num_train", help="Training images.")] = 800
    num_val: Annotated[int, Option("--num_val", help="Validation images.")] = 200
    size: Annotated[tuple[int, int], Option("--size", metavar="H W", help="Pixels.")] = (
        128,
        128,
    )
    seed: Annotated[int, Option("--seed", help="The same seed gives the same files.")] = 11
    with_context: Annotated[
        bool,
        Option(
            "--with_context",
            help="14 classes, harder: an image with a ring in it has other classes, but for the ring.",
        ),
    ] = False


def run(flags: ShapesFlags) -> None:
    """Write a generated data set in VOC layout: 8 classes, JPEG images, palette PNG masks, train and val lists.

    Good for a first try without data of your own: b0 learns it from scratch within minutes on a CPU.
    """
    with progress_bar("drawing") as advance:
        root = write_shapes(
            flags.folder,
            flags.num_train,
            flags.num_val,
            flags.size,
            flags.seed,
            progress=advance,
            context=flags.with_context,
        )

    # Classes that only context tells apart come on top of the plain shapes.
    num_classes = len(CONTEXT_CLASS_NAMES if flags.with_context else CLASS_NAMES)
    console.print(f"{flags.num_train + flags.num_val} images, {num_classes} classes, in {root}")
    # The next command, ready to be copied.
    console.print(
        f"Train on them: segprune train --data {shlex.quote(flags.folder)} --phi b0 --num_classes {num_classes} "
        f"--input_shape {flags.size[0]} {flags.size[1]}",
        soft_wrap=True,
    )
