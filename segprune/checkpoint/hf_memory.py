"""Networks of transformers in memory: read like their folders, and ours put into a class that is called like theirs."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from segprune.checkpoint import build, from_state_dict
from segprune.checkpoint.dialects import detect
from segprune.checkpoint.hf_in import apply_config
from segprune.checkpoint.preprocessing import from_huggingface
from segprune.checkpoint.rename import to_ours
from segprune.checkpoint.stated import read_heads
from segprune.model import SegFormer
from segprune.shapes_only import without_weights
from segprune.spec import spec_to_dict


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the network inside the wrappers of torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if type(model).__name__ == "OptimizedModule":
            inner = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def is_theirs(model: nn.Module) -> bool:
    """Returns whether it is a SegFormer for segmentation, exactly as transformers or our class for it has it."""
    kind = type(model)
    stock = kind.__name__ == "SegformerForSemanticSegmentation"
    return (stock and kind.__module__.startswith("transformers.")) or _is_own_class(model)


def _is_own_class(model: nn.Module) -> bool:
    # By name, since a folder may bring its own copy of the class.
    return type(model).__name__ == "SegpruneForSemanticSegmentation"


def read_huggingface(model: nn.Module) -> SegFormer | None:
    """Returns the same network as ours, a copy in the same mode, dtype and place; None where it cannot be read as one.

    Frozen weights remain frozen.
    """
    if _is_own_class(model):
        inner: Any = model.network
        return inner if isinstance(inner, SegFormer) else None
    if not is_theirs(model):
        return None

    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    try:
        checkpoint = from_state_dict(model.state_dict(), heads=read_heads(config))
        spec, notes = apply_config(checkpoint.spec, config, backbone_only=False)
        # In memory there is no image processor, but the label to ignore is known.
        spec = replace(spec, preprocessing=from_huggingface({}, config, spec))
    except ValueError:
        return None  # such sizes, or replaced layers, are traced instead
    for note in notes:
        warnings.warn(note, stacklevel=4)

    first = next(model.parameters())
    ours = build(replace(checkpoint, spec=spec)).to(first).train(model.training)
    frozen = {name for name, tensor in model.named_parameters() if not tensor.requires_grad}
    for name in our_names(model, frozen) if frozen else ():
        ours.get_parameter(name).requires_grad_(False)
    return ours


def our_names(model: nn.Module, keys: Collection[str]) -> set[str]:
    """Returns the names of our tensors that hold something of theirs with these keys."""
    if _is_own_class(model):
        return {key.removeprefix("network.") for key in keys}

    # Marks take the way that the weights take: layers are renamed, joined and taken apart.
    marks = {}
    for key, tensor in model.state_dict().items():
        marks[key] = torch.full(tensor.shape, float(key in keys))
    ours = to_ours(marks, detect(marks.keys()))
    return {name for name, mark in ours.items() if mark.any()}


def to_huggingface(network: SegFormer, like: Any = None) -> nn.Module:
    """Returns it in a class of transformers' kind: called, trained and saved like theirs; `network` is inside.

    `like`: the config of the network that it came from, for the names of its classes.
    """
    # Transformers is needed here alone.
    from segprune.checkpoint.modeling_segprune import (
        SegpruneConfig,
        SegpruneForSemanticSegmentation,
    )

    stated = {}
    if like is not None:
        stated = {
            name: getattr(like, name)
            for name in ("id2label", "label2id", "semantic_loss_ignore_index")
        }
    config = SegpruneConfig(spec=spec_to_dict(network.spec), **stated)
    with without_weights():  # they are replaced at once
        model = SegpruneForSemanticSegmentation(config)
    model.network = network
    return model.train(network.training)
