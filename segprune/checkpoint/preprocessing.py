"""What files of other code bases say of pixels and labels, read into a `Preprocessing`, and written again.

Sources: transformers' preprocessor_config.json and config.json; the configs that mmsegmentation and NVlabs keep as text
in `meta`; the buffers `mean` and `std` of training scripts around segmentation_models_pytorch. Text is never run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from segprune.spec import MOST_CHANNELS, NO_CLASS, RGB, Preprocessing, Spec

MOST_TEXT = 1 << 20  # characters of a config that is read; real ones have some ten thousand
_BUFFERS = (("mean", "std"), ("pixel_mean", "pixel_std"))
_UNIT = 255.0  # Hugging Face's and smp's numbers are those of pixels in 0..1


def from_huggingface(
    processor: Mapping[str, Any], config: Mapping[str, Any], spec: Spec
) -> Preprocessing:
    """Returns the spec's record with what preprocessor_config.json and config.json say. Raises ValueError for odd numbers.

    A missing entry, and one that is null, is transformers' default.
    """
    said = {name: value for name, value in processor.items() if value is not None}

    # Their pixels are rescaled before mean and deviation; here these are of the pixels as they are.
    changes: dict[str, Any] = {}
    if said:
        factor = (
            _number(said.get("rescale_factor", 1 / _UNIT))
            if said.get("do_rescale", True)
            else 1.0
        )
        unit = 1 / factor
        if not said.get("do_normalize", True):
            changes = {
                "mean": (0.0,) * spec.in_channels,
                "std": (unit,) * spec.in_channels,
            }
        elif spec.in_channels == RGB or {"image_mean", "image_std"} <= said.keys():
            changes = {
                name: _scaled(said[f"image_{name}"], unit, spec.in_channels)
                for name in ("mean", "std")
                if f"image_{name}" in said
            }

        reduced = said.get("do_reduce_labels", said.get("reduce_labels", False))
        changes |= {"label_offset": -1 if reduced else 0, "size": _read_size(said.get("size"))}

    ignored = config.get("semantic_loss_ignore_index")
    if ignored is not None:
        changes["ignore_index"] = _label(ignored)
    return replace(spec.preprocessing, **changes)


def to_huggingface(spec: Spec, size: tuple[int, int]) -> dict[str, Any]:
    """Returns what preprocessor_config.json says; images are resized to `size` (H, W).

    Mean and deviation are left out where they are not known for the network's channels.
    """
    preprocessing = spec.preprocessing
    numbers = {}
    if preprocessing.num_channels == spec.in_channels:
        numbers = {
            "image_mean": [round(mean / _UNIT, 9) for mean in preprocessing.mean],
            "image_std": [round(std / _UNIT, 9) for std in preprocessing.std],
        }
    return {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / _UNIT,
        "do_normalize": True,
        **numbers,
        # Transformers knows of no other offset, and each of ours has a note.
        "do_reduce_labels": preprocessing.label_offset == -1,
    }


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(
            f"preprocessor_config.json says rescale_factor {value!r}, where a number above 0 is allowed; correct it."
        )
    return float(value)


def _scaled(values: Any, unit: float, in_channels: int) -> tuple[Any, ...]:
    """Returns the numbers as those of pixels in 0..255; what are no numbers is left for the record to refuse.

    One number is that of every channel.
    """
    values = list(values) if isinstance(values, list | tuple) else [values]
    values = values * in_channels if len(values) == 1 else values
    # Rounded, so that 0.485 becomes the 123.675 that it was made from.
    return tuple(
        round(value * unit, 6) if type(value) in (int, float) else value for value in values
    )


def _label(value: Any) -> int:
    """Returns the label to ignore; masks hold 0..255, so any other value ignores nothing more."""
    return value if type(value) is int and 0 <= value <= NO_CLASS else NO_CLASS


def _read_size(size: Any) -> tuple[int, int] | None:
    """Returns H W of any of transformers' and mmsegmentation's forms, None where there is none."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    elif type(size) is int:
        size = (size, size)
    if not isinstance(size, list | tuple) or len(size) != 2:
        return None
    return tuple(size) if all(type(side) is int and side > 0 for side in size) else None


def read_meta(spec: Spec, meta: Mapping[str, Any]) -> Spec:
    """Returns the spec with what mmsegmentation's or NVlabs' `meta` says of pixels, labels and the last upsampling.

    Images are BGR there until they are told to be RGB. Raises ValueError for odd numbers.
    """
    in_channels = spec.in_channels
    text = meta.get("cfg", meta.get("config"))
    config = _parse_config(text) if isinstance(text, str) else text
    parts = [*_find_dicts(config), *_find_dicts(meta.get("dataset_meta"))]
    numerics = spec.numerics
    changes: dict[str, Any] = {}

    # mmsegmentation 1.x normalises in the model, 0.x and NVlabs in the pipeline.
    for part in parts:
        stated = part.get("data_preprocessor", part.get("img_norm_cfg"))
        if part.get("type") == "Normalize":
            stated = part
        if isinstance(stated, Mapping):
            # There, without a mean nothing is normalised.
            mean, std = stated.get("mean"), stated.get("std")
            rgb = stated.get(
                "bgr_to_rgb", stated.get("to_rgb", "data_preprocessor" not in part)
            )
            changes = {
                "mean": _scaled(0.0 if mean is None else mean, 1.0, in_channels),
                "std": _scaled(1.0 if std is None else std, 1.0, in_channels),
            }
            if in_channels != RGB:
                rgb = in_channels < RGB or not _exchanges_channels(parts)
            changes["channels"] = "rgb" if rgb else "bgr"
            break

    if any(part.get("reduce_zero_label") is True for part in parts):
        changes["label_offset"] = -1
    for part in parts:
        head = part.get("decode_head")
        if isinstance(head, Mapping):
            changes["ignore_index"] = _label(head.get("ignore_index"))
            align = head.get("align_corners") is True
            numerics = replace(numerics, align_corners=align)
        if "crop_size" in part:
            changes["size"] = _read_size(part["crop_size"])
    preprocessing = replace(spec.preprocessing, **changes)
    return replace(spec, preprocessing=preprocessing, numerics=numerics)


def _exchanges_channels(parts: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether files of more than three channels come as B G R and the rest, by what the pipeline loads with.

    mmcv's OpenCV and Pillow exchange the first and the third, its tifffile and mmsegmentation's GDAL do not; and the
    model turns images of three channels alone.
    """
    for part in parts:
        if part.get("type") == "LoadImageFromFile":
            return part.get("imdecode_backend", "cv2") != "tifffile"
    return False


def to_meta(spec: Spec, dialect: str) -> dict[str, str]:
    """Returns the entry of `meta` that says it, as the text of a config; only RGB is written."""
    preprocessing = spec.preprocessing
    numbers = f"mean={list(preprocessing.mean)}, std={list(preprocessing.std)}"
    # A file whose mean and deviation are not known says nothing of them.
    known = preprocessing.num_channels == spec.in_channels
    zero = preprocessing.label_offset == -1
    labels = f"dict(type='LoadAnnotations', reduce_zero_label={zero})"
    align = f"align_corners={spec.numerics.align_corners}"
    ignored = f"ignore_index={preprocessing.ignore_index}"
    head = f"model = dict(decode_head=dict({align}, {ignored}))"
    if dialect == "mmseg":
        pixels = (
            f"data_preprocessor = dict(type='SegDataPreProcessor', {numbers}, bgr_to_rgb=True)"
        )
        lines = (*((pixels,) if known else ()), head, f"train_pipeline = [{labels}]")
        return {"cfg": "".join(f"{line}\n" for line in lines)}
    pixels = f"dict(type='Normalize', {numbers}, to_rgb=True)"
    steps = ", ".join((labels, pixels) if known else (labels,))
    return {"config": f"{head}\ntrain_pipeline = [{steps}]\n"}


def _parse_config(text: str) -> dict[str, Any]:
    """Returns what a config in Python's words assigns, without running it; what is no plain data is left out."""
    if len(text) > MOST_TEXT:
        return {}
    try:
        body = ast.parse(text).body
        config: dict[str, Any] = {}
        for line in body:
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                config[line.targets[0].id] = _evaluate(line.value, config)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return config


def _evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Returns the value of plain data, in which `dict(...)` may stand for a dict; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return [_evaluate(element, names) for element in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _evaluate(node.operand, names)
        return -value if type(value) in (int, float) else None

    pairs: list[tuple[ast.expr | None, Any]] = []
    if isinstance(node, ast.Dict):
        pairs = list(zip(node.keys, node.values, strict=True))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "dict":
            pairs = [
                (None if word.arg is None else ast.Constant(word.arg), word.value)
                for word in node.keywords
            ]
    else:
        return None

    entries: dict[Any, Any] = {}
    for key, value in pairs:
        inner = _evaluate(value, names)
        # `**{...}` adds the entries of another dict.
        if key is not None and isinstance(key, ast.Constant):
            entries[key.value] = inner
        elif key is None and isinstance(inner, Mapping):
            entries |= inner
    return entries


def _find_dicts(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yields all dicts in it, from the outside in, each once."""
    queue, seen = [value], set()
    for inner in queue:
        if id(inner) in seen:
            continue
        seen.add(id(inner))

        if isinstance(inner, Mapping):
            yield inner
            queue.extend(inner.values())
        elif isinstance(inner, list | tuple):
            queue.extend(inner)


def take_buffers(
    state_dict: Mapping[str, Any],
) -> tuple[dict[str, Any], Preprocessing | None, tuple[str, ...]]:
    """Returns the state dict without the buffers of mean and deviation, what these say, and a note on them."""
    left = dict(state_dict)
    for names in _BUFFERS:
        buffers = [left.get(name) for name in names]
        values = [
            value
            for value in buffers
            if isinstance(value, Tensor) and 1 <= value.numel() <= MOST_CHANNELS
        ]
        if len(values) < len(names):
            continue
        # Others are refused by their names later, as all tensors without plain values are.
        plain = (
            value.layout == torch.strided and value.is_floating_point() and not value.is_meta
            for value in values
        )
        if not all(plain):
            continue

        # Whether pixels were in 0..1 or 0..255 is seen by the size of the numbers alone.
        # Float32 holds seven digits, so that 123.675 comes back as it was.
        mean, std = (
            [float(f"{number:.7g}") for number in left.pop(name).flatten().tolist()]
            for name in names
        )
        small = max(*mean, *std) <= 1.0
        unit = _UNIT if small else 1.0
        number = max(len(mean), len(std))
        said = Preprocessing(mean=_scaled(mean, unit, number), std=_scaled(std, unit, number))
        note = (
            f"Images are normalised by the file's own {names[0]} and {names[1]}, taken as of pixels in "
            f"{'0..1' if small else '0..255'} (`mean` and `std` overrule)."
        )
        return left, said, (note,)
    return left, None, ()
