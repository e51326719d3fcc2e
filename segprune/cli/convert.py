"""`segprune convert FILE TARGET --to hf`: a checkpoint in the format of another tool."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from typer import Argument, Option

from segprune import checkpoint
from segprune.checkpoint import FORMAT, FORMATS
from segprune.cli.console import console, show_notes
from segprune.cli.flags import (
    Dialect,
    Heads,
    InputFlags,
    ModelFile,
    Weights,
    refuse_without_effect,
)
from segprune.files import is_same_path
from segprune.stats import count

TARGETS = (*FORMATS, FORMAT)


@dataclass(frozen=True)
class ConvertFlags:
    model_path: ModelFile
    target: Annotated[
        str, Argument(metavar="TARGET", help="Folder (hf) or .pth, .pt, .bin file to write.")
    ]
    to: Annotated[str, Option("--to", help=f"Whose format: {', '.join(TARGETS)}.")]
    input_shape: Annotated[
        tuple[int, int],
        Option(
            "--input_shape",
            metavar="H W",
            help="For hf: the size its image processor resizes to; if not given, that of a folder it comes from.",
        ),
    ] = (512, 512)
    dialect: Dialect = None
    weights: Weights = None
    heads: Heads = None


def run(flags: ConvertFlags, inputs: InputFlags, given: frozenset[str]) -> None:
    """Write a checkpoint for Hugging Face's, NVlabs', bubbliiiing's or mmsegmentation's code, and compare it.

    Weights are rewritten so that the other tool's numerics give the same logits. What its classes cannot hold is
    written with code of its own into a Hugging Face folder, and refused elsewhere. What was written is read again, and
    kept if the logits are the same. A file for segprune itself keeps what --weights, --heads and --dialect said.
    """
    if flags.to not in TARGETS:
        raise ValueError(f"Unknown format {flags.to!r}; --to knows {', '.join(TARGETS)}.")
    refuse_without_effect(
        given, ("input_shape", flags.to != "hf", f"with --to {flags.to}, which keeps no size")
    )
    if is_same_path(flags.target, flags.model_path):
        raise ValueError(
            f"{flags.target} is the checkpoint itself; give another place to write to."
        )

    opened = inputs.apply(
        checkpoint.read(
            flags.model_path, dialect=flags.dialect, weights=flags.weights, heads=flags.heads
        )
    )
    # A file for another tool holds a whole network.
    if opened.backbone_only:
        raise ValueError(
            f"{flags.model_path} holds only a backbone; train it first with segprune train."
        )
    show_notes(opened.notes)

    # Our own file keeps what the flags said, and every command opens it without them.
    parameters = count(opened.spec, flags.input_shape).parameters
    network = f"{opened.spec.variant}, {parameters:,} parameters"
    if flags.to == FORMAT:
        checkpoint.save(checkpoint.build(opened), flags.target, extra=opened.extra)
        console.print(f"Written for {FORMAT}, {network}: {flags.target}", soft_wrap=True)
        return

    # The size of its own images is written back, unless another one is given.
    size = opened.spec.preprocessing.size
    if size is not None and flags.to == "hf" and "input_shape" not in given:
        flags = replace(flags, input_shape=size)

    # Write it, read it again and compare.
    written = checkpoint.convert(
        checkpoint.build(opened),
        flags.target,
        flags.to,
        class_names=opened.extra.get("class_names"),
        palette=opened.extra.get("palette"),
        input_shape=flags.input_shape,
    )
    show_notes(written.notes)

    readers = " and ".join(written.readers)
    console.print(
        f"Read again by {readers}: logits differ by {written.difference:.1e} of the largest at most."
    )
    console.print(f"Written for {flags.to}, {network}: {flags.target}", soft_wrap=True)
