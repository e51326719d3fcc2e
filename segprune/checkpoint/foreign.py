"""State dicts of other code bases: unwrapped, their naming detected once, renamed strictly.

A foreign network gets the spec of the variant whose shapes it has and the numerics of its dialect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from segprune.checkpoint.dialects import COUNTERS, Naming, detect, name_some, split_beside
from segprune.checkpoint.find import find_weights
from segprune.checkpoint.ours import Checkpoint, to_float32
from segprune.checkpoint.plain import make_plain
from segprune.checkpoint.preprocessing import read_meta, take_buffers
from segprune.checkpoint.rename import CLASSIFIER, translate
from segprune.checkpoint.stated import find_meta, read_classes, read_heads


def read_foreign(
    data: Any,
    dialect: str | None,
    num_classes: int | None,
    heads: Sequence[int] | None,
    wanted: str | None = None,
) -> Checkpoint:
    """Returns what a file's content holds; the arguments are those of `from_state_dict`, `wanted` its `weights`."""
    weights, notes = find_weights(data, wanted)

    # The names decide first: layers and numerics follow from whose they are.
    naming = detect(weights.tensors.keys(), weights.around, dialect)
    if naming.note is not None:
        notes += (naming.note,)

    # Mean and deviation lie among the tensors or beside them.
    tensors, inner, said = take_buffers(weights.tensors)
    outside, outer, said_outside = take_buffers(weights.beside)
    preprocessing = inner or outer
    state_dict, beside = split_beside(tensors, naming)
    notes += said + said_outside + _note_beside((*beside, *outside))

    # One plain tensor for each weight.
    state_dict, said = make_plain(state_dict)
    state_dict, converted = to_float32(state_dict)
    notes += said + converted

    # The meta of NVlabs' and mmsegmentation's files: classes,
    # pixels and, where `convert` wrote a pruned network, heads.
    meta = find_meta(data)
    if heads is None:
        heads = read_heads(meta)

    spec, state = translate(state_dict, naming, num_classes=num_classes, heads=heads)
    spec = read_meta(spec, meta)
    if naming.head and _is_one_logit(state_dict, naming):
        notes += (
            "Its one logit, for a sigmoid, was read as two classes, 0 and 1, of the logits 0 and z: exact at the "
            "threshold 0.5; for another one, t, subtract log(t / (1 - t)) from the second bias.",
        )
    if preprocessing is not None:
        # A single number is that of every channel.
        if preprocessing.num_channels == 1:
            preprocessing = replace(
                preprocessing,
                mean=preprocessing.mean * spec.in_channels,
                std=preprocessing.std * spec.in_channels,
            )
        spec = replace(spec, preprocessing=preprocessing)

    if naming.head:
        extra = read_classes(meta, spec.num_classes)
        return Checkpoint(spec, state, naming.dialect, notes, backbone_only=False, extra=extra)

    notes += (
        f"Only a backbone was found: the decode head for {spec.num_classes} classes is new and untrained.",
    )
    return Checkpoint(spec, state, naming.dialect, notes, backbone_only=True, extra={})


def _is_one_logit(state_dict: Mapping[str, Tensor], naming: Naming) -> bool:
    return len(state_dict[f"{naming.head[CLASSIFIER]}.weight"]) == 1


def _note_beside(keys: Sequence[str]) -> tuple[str, ...]:
    """Returns a note on the tensors that lie beside the network, by how their names begin."""
    if not keys:
        return ()
    stems = list(dict.fromkeys(map(_spell_place, keys)))
    return (
        f"Left out as no part of the network: {name_some(stems)} ({len(keys)} of the file's tensors).",
    )


def _spell_place(key: str) -> str:
    """Returns the name of a counter, of a part of the decode head, or of the module beside the network."""
    parts = key.split(".")
    if parts[-1] in COUNTERS:
        return parts[-1]
    return ".".join(parts[:2] if parts[0] == "decode_head" else parts[:1])
