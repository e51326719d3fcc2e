"""Our own files: {format, version, spec, state_dict, extra}, tensors and plain data, opened without running code.

The spec in it lets a pruned network load as it is. Loading is strict.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segprune.checkpoint.dialects import listed
from segprune.files import save_record, save_tensors
from segprune.model import SegFormer
from segprune.spec import Spec, spec_from_dict, spec_to_dict

FORMAT, VERSION = "segprune", 1


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


def from_record(data: Mapping[str, Any], dialect: str | None) -> Checkpoint:
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
    state, notes = to_float32(data["state_dict"])
    check_state(state, expected_state(spec), "its spec")
    return Checkpoint(spec, state, "segprune", notes, backbone_only=False, extra=dict(data["extra"]))


def record_from_metadata(
    tensors: dict[str, Tensor], metadata: dict[str, str], path: str | os.PathLike[str]
) -> dict[str, Any]:
    try:
        head = {key: json.loads(metadata[key]) for key in ("version", "spec", "extra")}
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: It is not a whole segprune file; write it again with segprune.save.") from error
    return head | {"format": FORMAT, "state_dict": tensors}


def to_float32(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
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


def expected_state(spec: Spec, *, encoder_only: bool = False) -> dict[str, Tensor]:
    """The state dict of `SegFormer(spec)` on the meta device: names and shapes without weights."""
    with torch.device("meta"):
        model = SegFormer(spec)
    return {k: v for k, v in model.state_dict().items() if not encoder_only or k.startswith("encoder.")}


def check_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    """ValueError that names the first keys that are missing, too many or of another shape than the network `name`'s."""
    check_keys([key for key in expected if key not in found], [key for key in found if key not in expected])
    wrong = [key for key in expected if found[key].shape != expected[key].shape]
    if wrong:
        shapes = f"{row(found[wrong[0]].shape)} where {name} has {row(expected[wrong[0]].shape)}"
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]} has the shape {shapes}{more}; give a checkpoint of an unchanged network.")


def check_keys(missing: Sequence[str], unknown: Sequence[str]) -> None:
    problems = [f"lacks {listed(missing)}"] if missing else []
    problems += [f"has the unknown {listed(unknown)}"] if unknown else []
    if problems:
        raise ValueError(f"The file {' and '.join(problems)}; give a whole state dict of an unchanged SegFormer.")


def row(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
