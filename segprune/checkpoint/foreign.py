"""State dicts of other code bases: unwrapped, their naming detected once, renamed strictly.

A foreign network gets the spec of the variant whose shapes it has and the numerics of its dialect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from segprune.checkpoint.dialects import detect, stated_classes
from segprune.checkpoint.hf_in import stated_heads
from segprune.checkpoint.ours import Checkpoint, to_float32
from segprune.checkpoint.rename import translate

WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def from_foreign(data: Any, dialect: str | None, num_classes: int | None, heads: Sequence[int] | None) -> Checkpoint:
    state_dict, wrapper = _unwrap(data)
    meta = data["meta"] if isinstance(data.get("meta"), Mapping) else {}
    if heads is None:
        heads = stated_heads(meta)  # of a pruned network in NVlabs' names: formats/names.py
    naming = detect(state_dict.keys(), wrapper, dialect)
    state_dict, notes = to_float32(state_dict)
    spec, state = translate(state_dict, naming, num_classes=num_classes, heads=heads)
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
