"""`segprune convert FILE --to hf DIR`: a checkpoint in the format of another tool."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from segprune import checkpoint
from segprune.checkpoint import FORMATS
from segprune.cli.console import console, show_notes
from segprune.stats import count


@dataclass(frozen=True)
class ConvertConfig:
    model_path: Annotated[
        str, Argument(metavar="FILE", help=".pth, .pt, .safetensors, a Hugging Face folder or hub name.")
    ]
    target: Annotated[str, Argument(metavar="TARGET", help="Folder (hf) or .pth, .pt, .bin file to write.")]
    to: Annotated[str, Option("--to", help=f"Whose format: {', '.join(FORMATS)}.")]
    input_shape: Annotated[
        tuple[int, int], Option("--input_shape", metavar="H W", help="Of hf: the size its image processor resizes to.")
    ] = (512, 512)
    dialect: Annotated[str | None, Option("--dialect", help="Overrules the dialect that is recognised.")] = None


def run(config: ConvertConfig, given: frozenset[str]) -> None:
    """Write a checkpoint for Hugging Face's, NVlabs', bubbliiiing's or mmsegmentation's code, and compare it.

    Weights are rewritten so that the other tool's numerics give the same logits. What its classes cannot hold goes
    into a Hugging Face folder with code of its own, and is refused elsewhere. What was written is read again, and
    kept if the logits are the same.
    """
    if config.to not in FORMATS:
        raise ValueError(f"Unknown format {config.to!r}; --to knows {', '.join(FORMATS)}.")
    if "input_shape" in given and config.to != "hf":
        raise ValueError(f"--input_shape has no effect with --to {config.to}, which keeps no size; leave it out.")
    if Path(config.target).resolve() == Path(config.model_path).resolve():
        raise ValueError(f"{config.target} is the checkpoint itself; give another place to write to.")
    found = checkpoint.read(config.model_path, dialect=config.dialect)
    if found.backbone_only:
        raise ValueError(f"{config.model_path} holds only a backbone; train it first with segprune train.")
    model = checkpoint.build(found)
    show_notes(found.notes)
    written = checkpoint.convert(
        model, config.target, config.to, class_names=found.extra.get("class_names"), input_shape=config.input_shape
    )
    show_notes(written.notes)
    readers = " and ".join(written.readers)
    console.print(f"Read again by {readers}: logits differ by {written.difference:.1e} of the largest at most.")
    size = count(found.spec, config.input_shape).parameters
    console.print(
        f"Written for {config.to}, {found.spec.variant}, {size:,} parameters: {config.target}", soft_wrap=True
    )
