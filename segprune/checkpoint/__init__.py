"""Checkpoints in and out: our own files, those of other tools, Hugging Face folders and hub names.

Our files keep the spec, so a pruned network loads as it is; foreign files get the spec of the variant whose shapes they
have and the numerics of their dialect. Loading is strict, the exceptions are named in rename.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segprune.checkpoint.dialects import stated_classes
from segprune.checkpoint.foreign import from_foreign
from segprune.checkpoint.hf_in import apply_config, download, is_hub_name, read_folder, stated_heads
from segprune.checkpoint.ours import FORMAT, VERSION, Checkpoint, from_record, record_from_metadata, save
from segprune.files import read_file
from segprune.model import SegFormer
from segprune.spec import check_variant

if TYPE_CHECKING:
    from segprune.checkpoint.write import Written

__all__ = ["FORMATS", "Checkpoint", "build", "convert", "from_state_dict", "load", "read", "save"]

FORMATS = ("hf", "nvlabs", "bubbliiiing", "mmseg")  # that `convert` writes


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dialect: str | None = None,
    variant: str | None = None,
    num_classes: int | None = None,
) -> SegFormer:
    """The network in a file, in eval mode; see `read` for what may be given. Notes are not shown: see `read`."""
    return build(read(path, dialect=dialect, variant=variant, num_classes=num_classes)).to(device)


def read(
    path: str | os.PathLike[str],
    *,
    dialect: str | None = None,
    variant: str | None = None,
    num_classes: int | None = None,
) -> Checkpoint:
    """A .pth, .pt, .bin or .safetensors file, a Hugging Face folder, or a hub name ("org/name"), which is downloaded.

    `dialect` overrules what was assumed. `variant` and `num_classes` are refused if the file has others;
    `num_classes` is needed for the head that a bare backbone will get. ValueError and FileNotFoundError say in one
    sentence what is wrong.
    """
    data, config = _read_any(path)
    try:
        heads = None if config is None else stated_heads(config)
        found = from_state_dict(data, dialect=dialect, variant=variant, num_classes=num_classes, heads=heads)
        if config is None:
            return found
        spec, notes = apply_config(found.spec, config, backbone_only=found.backbone_only)
        extra = {} if found.backbone_only else stated_classes(config, spec.num_classes)
        return replace(found, spec=spec, notes=found.notes + notes, extra=extra)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_state_dict(
    state_dict: Mapping[str, Any],
    *,
    dialect: str | None = None,
    variant: str | None = None,
    num_classes: int | None = None,
    heads: Sequence[int] | None = None,
) -> Checkpoint:
    """As `read`, of a dict in memory: a state dict, bare or in a training script's wrapper, or our file's content.

    `heads` per stage, which no weights show, let stages of a foreign file be narrower than its variant's.
    """
    if variant is not None:
        check_variant(variant)
    if isinstance(state_dict, Mapping) and state_dict.get("format") == FORMAT:
        found = from_record(state_dict, dialect)
    else:
        found = from_foreign(state_dict, dialect, num_classes, heads)
    spec = found.spec
    if variant not in (None, spec.variant):
        raise ValueError(
            f"The file is a {spec.variant}, but --phi {variant} was given; leave --phi out or give {spec.variant}."
        )
    if num_classes not in (None, spec.num_classes):
        raise ValueError(
            f"The file has {spec.num_classes} classes, but --num_classes {num_classes} was given; "
            f"leave --num_classes out or give {spec.num_classes}."
        )
    return found


def build(checkpoint: Checkpoint) -> SegFormer:
    """The network on the CPU, in eval mode; a bare backbone gets a new decode head from torch's random numbers.

    ValueError names a tensor with NaN or infinity.
    """
    state = {name: tensor.clone() for name, tensor in checkpoint.state_dict.items()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} has NaN or infinite values, so the training diverged; give an earlier checkpoint."
            )
    if checkpoint.backbone_only:
        model = SegFormer(checkpoint.spec)
        model.encoder.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in state.items()})
    else:
        with torch.device("meta"):  # b5's random weights take seconds, only to be overwritten
            model = SegFormer(checkpoint.spec)
        model.load_state_dict(state, assign=True)
    return model.eval()


def convert(
    model: SegFormer,
    target: str | os.PathLike[str],
    to: str,
    *,
    class_names: Sequence[str] | None = None,
    input_shape: tuple[int, int] = (512, 512),
) -> Written:
    """Writes the network in another tool's format, reads it again and keeps it if the logits are the same.

    `to` is one of `FORMATS`; hf: a folder, which may hold a network of any widths, its classes' names and the size
    that its image processor resizes to; else a file of that code base's. Raises ValueError for what the tool cannot
    hold, and where the logits differ.
    """
    from segprune.checkpoint.hf_out import write_folder  # here, since a network loads without pictures
    from segprune.checkpoint.write import write_file

    if to not in FORMATS:
        raise ValueError(f"Unknown format {to!r}; choose one of {', '.join(FORMATS)}.")
    if to == "hf":
        return write_folder(model, target, class_names=class_names, input_shape=input_shape)
    return write_file(model, target, to)


def _read_any(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any] | None]:
    """The content, and config.json if it is a folder of Hugging Face's own classes."""
    if is_hub_name(path) or Path(path).is_dir():
        data, config = read_folder(download(str(path)) if is_hub_name(path) else Path(path))
        if config.get("model_type") != FORMAT:
            return data, config
        extra = stated_classes(config, len(config.get("id2label") or ()))
        state = {name.removeprefix("network."): tensor for name, tensor in data.items()}
        return {
            "format": FORMAT,
            "version": VERSION,
            "spec": config.get("spec"),
            "state_dict": state,
            "extra": extra,
        }, None
    data, metadata = read_file(path)
    if metadata.get("format") == FORMAT:
        data = record_from_metadata(data, metadata, path)
    return data, None
