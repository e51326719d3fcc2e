"""Optimisers, and which of a network's parameters get which learning rate and weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

OptimizerName = Literal["adamw", "sgd"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "sgd")


def parameter_groups(
    model: nn.Module, weight_decay: float, head_lr_factor: float = 1.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Every parameter of `model` once, frozen ones too, in groups of keys params, weight_decay and lr_scale.

    Weights decay; biases and normalisations, all that has one dimension, do not, as SegFormer was trained. The rate
    of a group is the run's times its `lr_scale`: `head_lr_factor` in `decode_head`, 10 in the paper (arXiv
    2105.15203). With `layer_decay` the rate of the encoder shrinks by that factor with every block that lies between
    a parameter and the decode head, and once more for the last block (arXiv 2106.08254); what stands before a
    stage's blocks counts with its first, what stands behind with its last. ValueError where the model lacks the
    submodule that a factor is for.
    """
    if not 0 < head_lr_factor < math.inf:
        raise ValueError(f"head_lr_factor is {head_lr_factor}; it must be above 0, and 1 treats all layers alike.")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}; it must be above 0, and at most 1, which decays nothing.")
    scales: dict[nn.Parameter, float] = {}
    if layer_decay != 1:
        depths = list(_depths(model))
        last = max((depth for _, depth in depths), default=0)
        scales.update((parameter, layer_decay ** (last + 1 - depth)) for parameter, depth in depths)
    if head_lr_factor != 1:
        head = _submodule(model, "decode_head", "head_lr_factor", "1")
        scales.update(dict.fromkeys(head.parameters(), head_lr_factor))
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        decay, scale = weight_decay if parameter.dim() > 1 else 0.0, scales.get(parameter, 1.0)
        group = groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def _submodule(model: nn.Module, name: str, option: str, without: str) -> nn.Module:
    module = getattr(model, name, None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{option} needs a submodule `{name}`, which {type(model).__name__} lacks; set it to {without}."
        )
    return module


def _depths(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """The encoder's parameters and their depth; the blocks of all stages count on from 1."""
    stages = getattr(_submodule(model, "encoder", "layer_decay", "1"), "stages", None)
    if not isinstance(stages, nn.ModuleList) or not all(hasattr(stage, "blocks") for stage in stages):
        name = type(model).__name__
        raise ValueError(f"layer_decay needs `encoder.stages` with `blocks`, which {name} lacks; set it to 1.")
    depth = 0
    for stage in stages:
        depth += 1  # of the stage's first block, and so on
        for name, module in stage.named_children():
            layers = module.children() if name == "blocks" else [module]
            for depth, layer in enumerate(layers, start=depth):  # noqa: B020 - the last block's depth stays
                yield from ((parameter, depth) for parameter in layer.parameters())


def check_optimizer(name: str) -> None:
    if name not in OPTIMIZERS:
        raise ValueError(f"Optimizer {name!r} is unknown; choose one of {', '.join(OPTIMIZERS)}.")


def make_optimizer(
    name: OptimizerName, groups: Sequence[dict[str, Any]], lr: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """AdamW with `momentum` as its first beta, or SGD; each group starts at `lr` times its `lr_scale`."""
    check_optimizer(name)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; it must be from 0 to below 1.")
    scaled = [group | {"lr": lr * group["lr_scale"]} for group in groups]
    if name == "sgd":
        return torch.optim.SGD(scaled, lr=lr, momentum=momentum)
    return torch.optim.AdamW(scaled, lr=lr, betas=(momentum, 0.999))
