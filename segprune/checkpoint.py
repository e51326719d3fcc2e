"""Checkpoints in and out: our own files, those of other tools, Hugging Face folders and hub names.

Our file is {format, version, spec, state_dict, extra}: tensors and plain data, opened without running code. It keeps
the spec, so a pruned network loads as it is; foreign files get the spec of the variant whose shapes they have and
the numerics of their dialect. Loading is strict, the exceptions are named in segprune/convert.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segprune.convert import check_state, convert, expected_state
from segprune.dialects import detect, stated_classes
from segprune.files import (
    atomic_path,
    check_writable,
    load_record,
    read_file,
    save_record,
    save_tensors,
    write_json,
)
from segprune.huggingface import apply_config, download, is_hub_name, read_folder, stated_heads
from segprune.model import SegFormer
from segprune.spec import Spec, check_variant, spec_from_dict, spec_to_dict

__all__ = [
    "Checkpoint",
    "atomic_path",
    "build",
    "check_writable",
    "from_state_dict",
    "load",
    "load_record",
    "read",
    "save",
    "save_record",
    "write_json",
]

FORMAT, VERSION = "segprune", 1
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: float32 weights in our names on the CPU, and notes for whoever reads the output.

    Of a bare backbone (`backbone_only`) the weights are the encoder's alone. `extra` is plain data that
    `save` was given; of another tool's file the `class_names` and `palette` that it states.
    """

    spec: Spec
    state_dict: dict[str, Tensor]
    dialect: str
    notes: tuple[str, ...]
    backbone_only: bool
    extra: dict[str, Any]


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
        found = _from_ours(state_dict, dialect)
    else:
        found = _from_foreign(state_dict, dialect, num_classes, heads)
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


def save(model: SegFormer, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None) -> None:
    """Write weights and spec to a .pth, .pt or .safetensors file, whole or not at all; `load` reads it.

    `extra` is plain data as JSON has it, given back as `Checkpoint.extra`. ValueError for anything else.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"{path} ends in {path.suffix!r}; a checkpoint is saved as .pth, .pt or .safetensors.")
    if not isinstance(model, SegFormer):
        raise ValueError(
            f"segprune.save takes a SegFormer, got {type(model).__name__}; unwrap it first (.module, ._orig_mod), "
            "or save another network's state dict with torch.save."
        )
    state = {name: _on_its_own(tensor.detach().cpu()) for name, tensor in model.state_dict().items()}
    check_state(state, expected_state(model.spec), "its spec")
    head = {"format": FORMAT, "version": VERSION, "spec": spec_to_dict(model.spec), "extra": _plain(extra or {})}
    if path.suffix == ".safetensors":
        save_tensors(state, {k: v if k == "format" else json.dumps(v) for k, v in head.items()}, path)
    else:
        save_record(head | {"state_dict": state}, path)


def _on_its_own(tensor: Tensor) -> Tensor:
    """Contiguous, and no part of something larger, all of which would go into the file."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _plain(extra: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(dict(extra)))
    except TypeError as error:
        raise ValueError(f"extra is not plain data ({error}); give numbers, strings, lists and dicts.") from error


def _from_ours(data: Mapping[str, Any], dialect: str | None) -> Checkpoint:
    if dialect not in (None, "segprune"):
        raise ValueError(f"The file is segprune's own, but --dialect {dialect} was given; leave --dialect out.")
    version = data.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"It was written by a newer segprune (file version {version}, this one reads {VERSION}); "
            "upgrade with pip install --upgrade segprune."
        )
    if version != VERSION or not all(isinstance(data.get(key), Mapping) for key in ("spec", "state_dict", "extra")):
        raise ValueError("It is not a whole segprune file; write it again with segprune.save.")
    spec = spec_from_dict(data["spec"])
    state, notes = _float32(data["state_dict"])
    check_state(state, expected_state(spec), "its spec")
    return Checkpoint(spec, state, "segprune", notes, backbone_only=False, extra=dict(data["extra"]))


def _from_foreign(data: Any, dialect: str | None, num_classes: int | None, heads: Sequence[int] | None) -> Checkpoint:
    state_dict, wrapper = _unwrap(data)
    meta = data["meta"] if isinstance(data.get("meta"), Mapping) else {}
    if heads is None:
        heads = stated_heads(meta)  # of a pruned network in NVlabs' names: formats/names.py
    naming = detect(state_dict.keys(), wrapper, dialect)
    state_dict, notes = _float32(state_dict)
    spec, state = convert(state_dict, naming, num_classes=num_classes, heads=heads)
    notes = notes if naming.note is None else (naming.note, *notes)
    backbone_only = not naming.head
    if backbone_only:
        notes += (f"Only a backbone was found: the decode head for {spec.num_classes} classes is new and untrained.",)
    extra = {} if backbone_only else stated_classes(meta, spec.num_classes)
    return Checkpoint(spec, state, naming.dialect, notes, backbone_only, extra)


def _unwrap(data: Any) -> tuple[Mapping[str, Any], frozenset[str]]:
    """The state dict without DataParallel's prefixes, and the keys that stood around it."""
    wrapper: frozenset[str] = frozenset()
    if isinstance(data, Mapping):
        for name in WRAPPERS:
            if isinstance(data.get(name), Mapping):
                data, wrapper = data[name], frozenset(data)
                break
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise ValueError(
            f"It holds {type(data).__name__} data, not a state dict; save one: torch.save(model.state_dict(), path)."
        )
    while data and (found := [p for p in PREFIXES if all(key.startswith(p) for key in data)]):
        data = {key.removeprefix(found[0]): value for key, value in data.items()}
    return data, wrapper


def _float32(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors on the CPU in float32, and a note if they were in something else."""
    state, dtypes = {}, set()
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}, not a tensor; give a plain state dict.")
        tensor = value.detach().cpu()
        if tensor.is_floating_point():
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
            tensor = tensor.float()
        elif not name.endswith("num_batches_tracked"):
            raise ValueError(
                f"{name} holds {tensor.dtype}, not floating-point weights; give the network before quantisation."
            )
        state[name] = tensor
    others = sorted(dtypes - {"float32"})
    return state, (f"Weights in {', '.join(others)} were converted to float32.",) if others else ()


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
        data = _from_metadata(data, metadata, path)
    return data, None


def _from_metadata(
    tensors: dict[str, Tensor], metadata: dict[str, str], path: str | os.PathLike[str]
) -> dict[str, Any]:
    try:
        head = {key: json.loads(metadata[key]) for key in ("version", "spec", "extra")}
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: It is not a whole segprune file; write it again with segprune.save.") from error
    return head | {"format": FORMAT, "state_dict": tensors}
