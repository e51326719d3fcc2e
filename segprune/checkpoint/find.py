"""The weights of a SegFormer found in whatever a training script put around them.

A set of weights is a dict of tensors with the first layer of a SegFormer in it. It may lie at any depth, under any key,
and its keys may begin with the name of an attribute: `model.`, `module.`, `net.`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from segprune.checkpoint.dialects import FIRST_KEYS, name_some

# In this order: what is trained comes before its averages.
PREFERRED = ("state_dict", "model_state_dict", "model")
WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
MOST_DICTS, MOST_DEPTH = (
    100_000,
    8,
)  # optimizers have a dict per weight; deeper than that nothing is looked for
LORA = (
    "is a LoRA adapter, which is only what was added to a network; merge it with its base where it was made: "
    "model.merge_and_unload().save_pretrained(folder), and give that folder."
)


@dataclass(frozen=True)
class Weights:
    """One set of weights: the tensors by their names without prefix, and what else lies in the same dict.

    `name` says where it lies in the file, `around` are the keys of the dict that holds it.
    """

    name: str
    tensors: dict[str, Any]
    beside: dict[str, Any]
    around: frozenset[str]


def find_weights(data: Any, wanted: str | None) -> tuple[Weights, tuple[str, ...]]:
    """Returns the set of weights in a file's content, and a note if there are others.

    `wanted` is the name of one of several. Raises ValueError if there is none, or none of that name.
    """
    candidates: dict[str, Weights] = {}
    for path, state_dict, around in _walk(data):
        for weights in _split(path, state_dict, around):
            candidates.setdefault(weights.name, weights)

    names = list(candidates)
    if not names:
        raise ValueError(_describe_absence(data))
    if wanted is not None and wanted not in names:
        raise ValueError(
            f"`weights` {wanted} was given, but the file has weights under {', '.join(map(_spell, names))}; "
            "give one of those, or leave it out."
        )

    # Layers that peft has put its own into have other names.
    for name, candidate in candidates.items():
        if wanted in (None, name) and any(".lora_A." in key for key in candidate.tensors):
            raise ValueError(f"It {LORA}")

    # The usual key if it is there, else what comes first.
    usual = [name for name in PREFERRED if name in names]
    taken = wanted if wanted is not None else (usual or names)[0]
    others = [_spell(name) for name in names if name != taken]
    if wanted is not None or not others:
        return candidates[taken], ()
    note = (
        f"The file has several sets of weights: {_spell(taken)} was taken, not {', '.join(others)} "
        "(`weights` overrules, in segprune info and convert)."
    )
    return candidates[taken], (note,)


def _spell(name: str) -> str:
    return name or "its top"


def _walk(data: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any], frozenset[str]]]:
    """Yields the dicts with tensors in them, outer ones first: path, dict, and the keys of the one around it."""
    todo: list[tuple[tuple[str, ...], Any, frozenset[str]]] = [((), data, frozenset())]
    seen: set[int] = set()
    for path, value, around in todo:
        if isinstance(value, list | tuple):
            entries: dict[Any, Any] = dict(enumerate(value[:100]))
        elif isinstance(value, dict):
            entries = dict(dict.items(value))  # attributes may hide the methods
        elif isinstance(value, Mapping):
            entries = dict(value)
        else:
            continue
        if id(value) in seen or len(seen) > MOST_DICTS:
            continue
        seen.add(id(value))

        keys = frozenset(key for key in entries if isinstance(key, str))
        if len(path) < MOST_DEPTH:
            for key, inner in entries.items():
                if isinstance(inner, dict | Mapping | list | tuple):
                    todo.append(((*path, str(key)), inner, keys))
        named = {key: inner for key, inner in entries.items() if isinstance(key, str)}
        if any(isinstance(inner, Tensor) for inner in named.values()):
            yield path, named, around


def _split(
    path: tuple[str, ...], state_dict: dict[str, Any], around: frozenset[str]
) -> Iterator[Weights]:
    """Yields the networks in one dict: a student and its teacher have different prefixes."""
    state_dict = _without_wrappers(state_dict)
    for prefix in _find_prefixes(state_dict):
        tensors = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        beside = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
        name = ".".join((*path, *prefix.rstrip(".").split("."))).rstrip(".")
        yield Weights(name, tensors, beside, around)


def _without_wrappers(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns the dict without the parts of its keys that DataParallel, torch.compile and others put in."""
    renamed = {
        ".".join(part for part in key.split(".") if part not in WRAPPED): value
        for key, value in state_dict.items()
    }
    # Two names that become one are two networks.
    return renamed if len(renamed) == len(state_dict) else state_dict


def _find_prefixes(state_dict: Mapping[str, Any]) -> list[str]:
    """Returns what stands before the first layer of each network, up to a dot."""
    prefixes: list[str] = []
    for key in state_dict:
        # The longest name first, since a bare backbone's ends many others.
        ends = [end for end in FIRST_KEYS if key == end or key.endswith(f".{end}")]
        if ends:
            prefixes.append(key.removesuffix(ends[0]))
    return prefixes


def _describe_absence(data: Any) -> str:
    """Returns what the file has in place of a SegFormer's weights."""
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        return f"It holds {type(data).__name__} data, not a state dict; save one: torch.save(model.state_dict(), path)."

    dicts = [state_dict for _, state_dict, _ in _walk(data)]
    keys = max(dicts, key=len) if dicts else {str(key): None for key in data}
    if any(".lora_A." in key or ".lora_B." in key for key in keys):
        return f"It {LORA}"
    whole = [key for key, value in data.items() if "_modules" in getattr(value, "__dict__", {})]
    if whole:
        return (
            f"It holds a whole pickled network ({whole[0]}), which could run any code; save its weights alone: "
            "torch.save(model.state_dict(), path)."
        )
    return (
        "This is not a SegFormer: expected keys such as backbone.patch_embed1.proj.weight or "
        f"segformer.encoder.patch_embeddings.0.proj.weight, found {name_some(keys)}; give a SegFormer's checkpoint."
    )
