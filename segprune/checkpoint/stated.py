"""What a file states beside its weights: attention heads, class names and colours.

Sources: transformers' config.json, NVlabs' `meta`, and mmsegmentation's `dataset_meta` in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from segprune.spec import NUM_STAGES

NUM_HEADS_KEY = "num_attention_heads"
META_KEY = (
    "segprune"  # in a bare state dict's `_metadata`, where torch keeps the versions of layers
)


def find_meta(data: Any) -> Mapping[str, Any]:
    """Returns what a file says beside its weights; empty where it says nothing."""
    meta = data.get("meta") if isinstance(data, Mapping) else None
    if not isinstance(meta, Mapping):
        versions = getattr(data, "_metadata", None)
        meta = versions.get(META_KEY) if isinstance(versions, Mapping) else None
    return meta if isinstance(meta, Mapping) else {}


def read_heads(stated: Mapping[str, Any]) -> list[int] | None:
    """Returns the number of heads of each stage, or None where they are not stated or do not divide the widths."""
    heads, widths = stated.get(NUM_HEADS_KEY), stated.get("hidden_sizes")
    if (
        not isinstance(heads, list)
        or not isinstance(widths, list)
        or not len(heads) == len(widths) == NUM_STAGES
    ):
        return None

    if not all(type(number) is int and number > 0 for number in (*heads, *widths)):
        return None

    # Heads that do not divide the widths are those of another network.
    divided = all(width % number == 0 for width, number in zip(widths, heads, strict=True))
    return heads if divided else None


def read_classes(stated: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """Returns `class_names` and `palette` (768 numbers), each if it is stated for every class.

    NVlabs' meta has CLASSES and PALETTE, mmseg's the same in its dataset_meta, of late in small letters.
    """
    inner = stated.get("dataset_meta")
    source = inner if isinstance(inner, Mapping) else stated
    entries = {str(key).lower(): value for key, value in source.items()}

    # Hugging Face lists names by number, the others in order.
    labels = entries.get("id2label")
    names = (
        _names_in_order(labels)
        if isinstance(labels, Mapping)
        else _as_list(entries.get("classes"))
    )
    if (
        not names
        or names == placeholders(num_classes)
        or len(names) != num_classes
        or not all(isinstance(name, str) for name in names)
    ):
        return {}
    classes: dict[str, Any] = {"class_names": [name.strip() for name in names]}

    palette = _flatten_palette(entries.get("palette"), num_classes)
    if palette is not None:
        classes["palette"] = palette
    return classes


def _names_in_order(labels: Mapping[Any, Any]) -> list[Any]:
    """Returns the names by number."""
    by_number = {
        str(number): name for number, name in labels.items()
    }  # a file may list them in another order
    return [by_number.get(str(k)) for k in range(len(labels))]


def placeholders(num_classes: int) -> list[str]:
    """Returns what transformers puts in where there are no names: LABEL_0 and so on."""
    return [f"LABEL_{k}" for k in range(num_classes)]


def names_or_placeholders(num_classes: int, names: Sequence[str] | None) -> list[str]:
    """Returns the names, or placeholders where there are none. Raises ValueError unless there is one per class."""
    if names is None:
        return placeholders(num_classes)
    if len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"There are {len(names)} class names where the network has {num_classes} classes; give one for each."
        )
    return list(names)


def describe_classes(
    dialect: str, num_classes: int, names: Sequence[str] | None, palette: Sequence[int]
) -> dict[str, Any]:
    """Returns the entries of NVlabs' or mmsegmentation's `meta` that name the classes and their colours.

    The code that loads the file needs both: where there are no names, placeholders stand for them. `palette` is 768
    numbers.
    """
    stated = names_or_placeholders(num_classes, names)
    # There are colours for 256 classes, and further ones begin anew.
    starts = [3 * (k % 256) for k in range(num_classes)]
    colours = [list(palette[start : start + 3]) for start in starts]
    if dialect == "mmseg":
        return {"dataset_meta": {"classes": stated, "palette": colours}}
    return {"CLASSES": stated, "PALETTE": colours}


def _flatten_palette(palette: Any, num_classes: int) -> list[int] | None:
    """Returns the colours as image files keep them, 256 times red, green and blue; None if one is missing or odd."""
    rows = [_as_list(row) for row in _as_list(palette)]
    if len(rows) != num_classes or num_classes > 256 or any(len(row) != 3 for row in rows):
        return None

    numbers = list(chain.from_iterable(rows))
    if not all(type(number) is int and 0 <= number <= 255 for number in numbers):
        return None

    # Colours without a class are black.
    return numbers + [0] * (3 * 256 - len(numbers))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []
