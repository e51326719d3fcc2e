"""Checkpoints in and out: our own files, those of other tools, Hugging Face folders and hub names.

Our files keep the spec, so a pruned network loads as it is; foreign files get the spec of the variant whose shapes they
have and the numerics of their dialect. Loading is strict, the exceptions are named in rename.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segprune.checkpoint.foreign import read_foreign
from segprune.checkpoint.hf_in import (
    apply_config,
    download,
    is_hub_name,
    read_folder,
    read_processor,
    record_from_folder,
)
from segprune.checkpoint.ours import FORMAT, Checkpoint, read_record, record_from_metadata, save
from segprune.checkpoint.preprocessing import from_huggingface
from segprune.checkpoint.stated import read_classes, read_heads
from segprune.model import SegFormer
from segprune.shapes_only import without_weights
from segprune.spec import check_variant
from segprune.tensor_files import read_file

if TYPE_CHECKING:
    from segprune.checkpoint.write import Written

__all__ = [
    "FORMAT",
    "FORMATS",
    "Checkpoint",
    "build",
    "convert",
    "from_state_dict",
    "load",
    "read",
    "save",
]

FORMATS = ("hf", "nvlabs", "bubbliiiing", "mmseg")  # what `convert` writes


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dialect: str | None = None,
    variant: str | None = None,
    num_classes: int | None = None,
    weights: str | None = None,
    heads: Sequence[int] | None = None,
) -> SegFormer:
    """Returns the network in a file, in eval mode. The arguments and errors are those of `read`; notes are dropped."""
    checkpoint = read(
        path,
        dialect=dialect,
        variant=variant,
        num_classes=num_classes,
        weights=weights,
        heads=heads,
    )
    return build(checkpoint).to(device)


def read(
    path: str | os.PathLike[str],
    *,
    dialect: str | None = None,
    variant: str | None = None,
    num_classes: int | None = None,
    weights: str | None = None,
    heads: Sequence[int] | None = None,
    new_classes: int | None = None,
) -> Checkpoint:
    """Reads a file of torch.save, a .safetensors file, a Hugging Face folder, or a hub name ("org/name").

    A hub name is downloaded. `dialect` overrules what was assumed. `variant` and `num_classes` are refused if the file
    has others; `num_classes` is needed for the head that a bare backbone will get. `weights` names one of several sets
    of weights in a file, as the note on them does. `heads` are those of each stage of a network that is no b0 to b5,
    which its weights do not tell. `new_classes` is the number of classes of a bare backbone's head where `num_classes`
    is not given, to look at it. Raises ValueError and FileNotFoundError that say in one sentence
    what is wrong.
    """
    hub = is_hub_name(path)

    # A folder brings a config, a .safetensors file metadata; each is empty for the other.
    config: dict[str, Any] = {}
    processor: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    if hub or Path(path).is_dir():
        folder = download(str(path)) if hub else Path(path)
        data, config = read_folder(folder)
        processor = read_processor(folder)
    else:
        data, metadata = read_file(path)

    with _name_file(path):
        # Our own networks come in three wrappings; below, all are alike.
        if metadata.get("format") == FORMAT:
            data = record_from_metadata(data, metadata)
        ours = config.get("model_type") == FORMAT
        if ours:
            data = record_from_folder(data, config)

        # Weights do not show how many heads there are, so config.json is asked.
        if heads is None:
            heads = read_heads(config)
        checkpoint = from_state_dict(
            data,
            dialect=dialect,
            variant=variant,
            num_classes=num_classes,
            heads=heads,
            weights=weights,
            new_classes=new_classes,
        )
        if not config:
            return checkpoint

        # What stands beside the weights says how images and labels are read.
        preprocessing = from_huggingface(processor, config, checkpoint.spec)
        checkpoint = replace(
            checkpoint, spec=replace(checkpoint.spec, preprocessing=preprocessing)
        )
        if ours:
            return checkpoint

        # config.json must agree with the weights, and adds the rates of dropout.
        spec, notes = apply_config(
            checkpoint.spec, config, backbone_only=checkpoint.backbone_only
        )
        extra = {} if checkpoint.backbone_only else read_classes(config, spec.num_classes)
        return replace(checkpoint, spec=spec, notes=checkpoint.notes + notes, extra=extra)


@contextmanager
def _name_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the file's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_state_dict(
    state_dict: Mapping[str, Any],
    *,
    dialect: str | None = None,
    variant: str | None = None,
    num_classes: int | None = None,
    heads: Sequence[int] | None = None,
    weights: str | None = None,
    new_classes: int | None = None,
) -> Checkpoint:
    """Reads a dict in memory: a state dict, bare or in a training script's wrapper, or our file's content.

    Arguments and errors are those of `read`. `heads` per stage, which no weights show, let stages of a foreign file be
    narrower than its variant's.
    """
    if variant is not None:
        check_variant(variant)

    # Our files bring their spec. For others it is worked out from names and shapes.
    if isinstance(state_dict, Mapping) and state_dict.get("format") == FORMAT:
        checkpoint = read_record(state_dict, dialect)
    else:
        checkpoint = read_foreign(
            state_dict,
            dialect,
            new_classes if num_classes is None else num_classes,
            heads,
            weights,
        )

    # What was given must agree with the file.
    spec = checkpoint.spec
    if variant not in (None, spec.variant):
        raise ValueError(
            f"The file is a {spec.variant}, but `variant` {variant} was given; "
            f"leave `variant` out or give {spec.variant}."
        )
    if num_classes not in (None, spec.num_classes):
        raise ValueError(
            f"The file has {spec.num_classes} classes, but `num_classes` {num_classes} was given; "
            f"leave `num_classes` out or give {spec.num_classes}."
        )
    return checkpoint


def build(checkpoint: Checkpoint) -> SegFormer:
    """Returns the network on the CPU, in eval mode.

    A bare backbone gets a new decode head from torch's random numbers. Raises ValueError that names a tensor with NaN
    or infinity.
    """
    # Clones, so that training the network does not change the checkpoint.
    state = {name: tensor.clone() for name, tensor in checkpoint.state_dict.items()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} has NaN or infinite values, so the training diverged; give an earlier checkpoint."
            )

    # The new head needs random weights, so this network is initialised as a whole.
    if checkpoint.backbone_only:
        model = SegFormer(checkpoint.spec)
        model.encoder.load_state_dict(
            {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
        )
    else:
        with without_weights():
            model = SegFormer(checkpoint.spec)
        model.load_state_dict(state, assign=True)
    return model.eval()


def convert(
    model: SegFormer,
    target: str | os.PathLike[str],
    to: str,
    *,
    class_names: Sequence[str] | None = None,
    palette: Sequence[int] | None = None,
    input_shape: tuple[int, int] = (512, 512),
) -> Written:
    """Writes the network in another tool's format, reads it again and keeps it if the logits are the same.

    `to` is one of `FORMATS`. For "hf", `target` is a folder, and `input_shape` (H, W) is the size that its image
    processor resizes to; else it is a file. `class_names` and `palette` (768 numbers) are put into it where the format
    has a place for them. Raises ValueError for what the tool's classes cannot hold, and where the logits differ.
    """
    # Here, since a network loads without what reads images.
    from segprune.checkpoint.hf_out import write_folder
    from segprune.checkpoint.numerics import with_rgb
    from segprune.checkpoint.write import write_file

    if to not in FORMATS:
        raise ValueError(f"Unknown format {to!r}; choose one of {', '.join(FORMATS)}.")
    model = with_rgb(model)
    if to == "hf":
        return write_folder(model, target, class_names=class_names, input_shape=input_shape)
    return write_file(model, target, to, class_names=class_names, palette=palette)
