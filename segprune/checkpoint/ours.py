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

from segprune.checkpoint.dialects import name_some
from segprune.files import parse_json
from segprune.model import SegFormer
from segprune.shapes_only import without_weights
from segprune.spec import Spec, spec_from_dict, spec_to_dict
from segprune.tensor_files import save_record, save_tensors

FORMAT, VERSION = "segprune", 1
MAX_EXTRA = 100_000  # values in the extra of a file
NOT_WHOLE = "It is not a whole segprune file; write it again with segprune.save."


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


def save(
    model: SegFormer, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None
) -> None:
    """Writes weights and spec to a .pth, .pt or .safetensors file, whole or not at all; `load` reads it.

    `extra` is plain data as JSON has it, given back as `Checkpoint.extra`. Raises ValueError for anything else.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(
            f"{path} ends in {path.suffix!r}; a checkpoint is saved as .pth, .pt or .safetensors."
        )
    if not isinstance(model, SegFormer):
        raise ValueError(
            f"segprune.save takes a SegFormer, got {type(model).__name__}; unwrap it first (.module, ._orig_mod), "
            "or save another network's state dict with torch.save."
        )

    # A network that was cut without its spec being changed would not load again.
    state = {
        name: _copy_if_shared(tensor.detach().cpu())
        for name, tensor in model.state_dict().items()
    }
    check_state(state, expected_state(model.spec), "its spec")

    # The metadata of a .safetensors file is text.
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "spec": spec_to_dict(model.spec),
        "extra": check_extra(_to_plain(extra or {})),
    }
    if path.suffix == ".safetensors":
        metadata = {
            key: value if key == "format" else json.dumps(value) for key, value in head.items()
        }
        save_tensors(state, metadata, path)
    else:
        save_record(head | {"state_dict": state}, path)


def _copy_if_shared(tensor: Tensor) -> Tensor:
    """Returns it contiguous and no part of a larger one, all of which would be written to the file."""
    # A view keeps all of its storage alive, and torch.save would write all of it.
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _to_plain(extra: Mapping[str, Any]) -> Any:
    try:
        # There and back, so that tuples are lists at once, and not only after loading.
        return json.loads(json.dumps(dict(extra)))
    except TypeError as error:
        raise ValueError(
            f"`extra` is not plain data ({error}); give numbers, strings, lists and dicts."
        ) from error


def read_record(data: Mapping[str, Any], dialect: str | None) -> Checkpoint:
    """Returns what a file's content holds; `dialect` may only say that it is ours."""
    if dialect not in (None, "segprune"):
        raise ValueError(
            f"The file is segprune's own, but `dialect` {dialect} was given; leave `dialect` out."
        )

    # A newer file may mean other things by the same keys.
    version = data.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"It was written by a newer segprune (file version {version}, this one reads {VERSION}); "
            "upgrade with pip install --upgrade segprune."
        )
    if version != VERSION or not all(
        isinstance(data.get(key), Mapping) for key in ("spec", "state_dict", "extra")
    ):
        raise ValueError(NOT_WHOLE)

    # The spec and the extra are checked by themselves, then the weights against the spec.
    spec = spec_from_dict(data["spec"])
    extra = check_extra(data["extra"])
    state, notes = to_float32(data["state_dict"])
    check_state(state, expected_state(spec), "its spec")
    return Checkpoint(spec, state, "segprune", notes, backbone_only=False, extra=extra)


def check_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a file's `extra`. Raises ValueError unless it is plain data of a bounded size, and what is used is sound.

    Lists that hold one list many times are small in a .pth file and without end once they are written as JSON.
    """
    numbers = 0
    below: list[Any] = [extra]
    while below:
        numbers += 1
        value = below.pop()
        if isinstance(value, dict) and all(type(key) is str for key in value):
            below += value.values()
        elif isinstance(value, list | tuple):
            below += value
        elif value is not None and type(value) not in (bool, int, float, str):
            raise ValueError(f"Its `extra` holds a {type(value).__name__}. {NOT_WHOLE}")
        if len(below) + numbers > MAX_EXTRA:
            raise ValueError(f"Its `extra` holds more than {MAX_EXTRA} values. {NOT_WHOLE}")

    names, palette = extra.get("class_names", []), extra.get("palette", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("It has class names that are no list of texts; save it again without.")
    colours = palette if isinstance(palette, list) else [None]
    if len(colours) not in (0, 768) or not all(
        type(number) is int and 0 <= number <= 255 for number in colours
    ):
        raise ValueError(
            "It has a palette that is not 768 numbers in 0..255; save it again with a whole one, or without."
        )
    for name in ("lr", "finetuned_lr"):
        rate = extra.get(name, 1.0)
        if type(rate) not in (int, float) or not 0 < rate < float("inf"):
            raise ValueError(
                f"It has a learning rate {name} that is no number above 0. {NOT_WHOLE}"
            )
    return dict(extra)


def record_from_metadata(
    tensors: dict[str, Tensor], metadata: dict[str, str]
) -> dict[str, Any]:
    """Returns a .safetensors file's content in the form of the others."""
    try:
        head = {key: parse_json(metadata[key]) for key in ("version", "spec", "extra")}
    except (KeyError, ValueError) as error:
        raise ValueError(NOT_WHOLE) from error
    return head | {"format": FORMAT, "state_dict": tensors}


def to_float32(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the tensors on the CPU in float32, and a note if they were in something else."""
    state, dtypes = {}, set()
    check_storages(state_dict)
    for name, value in state_dict.items():
        # The only whole numbers in a SegFormer count
        # batches; others are those of a quantised network.
        tensor = value.detach().cpu()
        if tensor.is_floating_point():
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
            tensor = tensor.float()
        elif tensor.dtype != torch.int64 or not name.endswith("num_batches_tracked"):
            raise ValueError(
                f"{name} holds {tensor.dtype}, not floating-point weights; give the network before quantisation."
            )
        state[name] = tensor

    others = sorted(dtypes - {"float32"})
    notes = (f"Weights in {', '.join(others)} were converted to float32.",) if others else ()
    return state, notes


def check_storages(state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError unless all are tensors that take no more memory than what they were saved with.

    A tensor of strides 0, or one storage behind a thousand names, is a small file that fills any memory when copied.
    """
    storages: dict[int, int] = {}
    total = 0
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} is a {type(value).__name__}, not a tensor; give a plain state dict."
            )
        if value.is_meta or value.layout != torch.strided:
            raise ValueError(
                f"{name} is a tensor on the meta device or a sparse one, which has no value for each weight; "
                "save the network again with plain tensors."
            )
        storage = value.untyped_storage()
        if value.nbytes > storage.nbytes():
            raise ValueError(
                f"{name} has the shape {spell_row(value.shape)} but only {storage.nbytes()} bytes; "
                "save the network again with tensors that are stored whole."
            )
        storages[storage.data_ptr()] = storage.nbytes()
        total += value.nbytes

    # Some layers may share weights under two names; more is no network.
    if total > 2 * sum(storages.values()):
        raise ValueError(
            f"Its tensors take {total} bytes but were saved with {sum(storages.values())}; "
            "save the network again with tensors that are stored whole."
        )


def expected_state(spec: Spec, *, encoder_only: bool = False) -> dict[str, Tensor]:
    """Returns the state dict of `SegFormer(spec)` on the meta device: names and shapes without weights."""
    with without_weights():
        state = SegFormer(spec).state_dict()
    return {
        key: tensor
        for key, tensor in state.items()
        if not encoder_only or key.startswith("encoder.")
    }


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    """Raises ValueError that names the first keys that are missing, unknown or of another shape.

    `name` says in the message whose shapes are expected.
    """
    # Names before shapes: with a name missing there is no shape to compare.
    check_keys(
        [key for key in expected if key not in state],
        [key for key in state if key not in expected],
    )

    wrong = [key for key in expected if state[key].shape != expected[key].shape]
    if wrong:
        shapes = f"{spell_row(state[wrong[0]].shape)} where {name} has {spell_row(expected[wrong[0]].shape)}"
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise ValueError(
            f"{wrong[0]} has the shape {shapes}{more}; give a checkpoint of an unchanged network."
        )


def check_keys(missing: Sequence[str], unknown: Sequence[str]) -> None:
    problems = []
    if missing:
        problems.append(f"lacks {name_some(missing)}")
    if unknown:
        problems.append(f"has the unknown {name_some(unknown)}")
    if problems:
        raise ValueError(
            f"The file {' and '.join(problems)}; give a whole state dict of an unchanged SegFormer."
        )


def spell_row(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
