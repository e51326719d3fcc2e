"""State dicts of other code bases: unwrapped, their naming detected once, renamed strictly.

A foreign network gets the spec of the variant whose shapes it has and the numerics of its dialect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from segprune.checkpoint.dialects import detect
from segprune.checkpoint.ours import Checkpoint, to_float32
from segprune.checkpoint.preprocessing import read_meta, take_buffers
from segprune.checkpoint.rename import translate
from segprune.checkpoint.stated import read_classes, read_heads

WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def read_foreign(
    data: Any, dialect: str | None, num_classes: int | None, heads: Sequence[int] | None
) -> Checkpoint:
    """Returns what a file's content holds; the arguments are those of `from_state_dict`."""
    state_dict, wrapper = unwrap(data)

    # The names decide first: layers and numerics follow from whose they are.
    naming = detect(state_dict.keys(), wrapper, dialect)
    state_dict, preprocessing, said = take_buffers(state_dict)
    state_dict, notes = to_float32(state_dict)
    notes += said
    if naming.note is not None:
        notes = (naming.note, *notes)

    # The meta of NVlabs' and mmsegmentation's files: classes,
    # pixels and, where `convert` wrote a pruned network, heads.
    meta = data["meta"] if isinstance(data.get("meta"), Mapping) else {}
    if heads is None:
        heads = read_heads(meta)

    spec, state = translate(state_dict, naming, num_classes=num_classes, heads=heads)
    spec = read_meta(spec, meta)
    if preprocessing is not None:
        spec = replace(spec, preprocessing=preprocessing)

    if naming.head:
        extra = read_classes(meta, spec.num_classes)
        return Checkpoint(spec, state, naming.dialect, notes, backbone_only=False, extra=extra)

    notes += (
        f"Only a backbone was found: the decode head for {spec.num_classes} classes is new and untrained.",
    )
    return Checkpoint(spec, state, naming.dialect, notes, backbone_only=True, extra={})


def unwrap(data: Any) -> tuple[Mapping[str, Any], frozenset[str]]:
    """Returns the state dict without the prefixes of wrapped modules, and the keys that stood around it."""
    wrapper: frozenset[str] = frozenset()
    if isinstance(data, Mapping):
        # Training scripts save the weights beside optimizer, epoch and other things.
        for name in WRAPPERS:
            if isinstance(data.get(name), Mapping):
                data, wrapper = data[name], frozenset(data)
                break
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise ValueError(
            f"It holds {type(data).__name__} data, not a state dict; save one: torch.save(model.state_dict(), path)."
        )

    # A network may have been wrapped more than once.
    while prefix := _common_prefix(data):
        data = {key.removeprefix(prefix): value for key, value in data.items()}
    return data, wrapper


def _common_prefix(state_dict: Mapping[str, Any]) -> str:
    if state_dict:
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in state_dict):
                return prefix
    return ""
