"""Optimisers, and which of a network's parameters get which learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

OptimizerName = Literal["adamw", "sgd"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "sgd")


def parameter_groups(
    model: nn.Module, weight_decay: float, head_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Returns every parameter once, frozen ones too, in groups of keys params, weight_decay and lr_scale.

    Weights decay; biases and normalisations, which have one dimension, do not, as SegFormer was trained. A group's
    learning rate is the run's times its `lr_scale`: `head_lr` in `decode_head` (10 in the paper, arXiv 2105.15203),
    1 elsewhere. ValueError if `head_lr` is not 1 and the model has no such submodule.
    """
    # A network without `decode_head` can be trained too, but only at one rate.
    head: set[nn.Parameter] = set()
    if head_lr != 1:
        decode_head = getattr(model, "decode_head", None)
        if not isinstance(decode_head, nn.Module):
            name = type(model).__name__
            raise ValueError(
                f"`head_lr` needs a submodule `decode_head`, which {name} lacks; set it to 1."
            )
        head.update(decode_head.parameters())

    # One group for each pair of rate and decay, in the order of the parameters, which
    # the saved state of the optimiser relies on.
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        decay = weight_decay if parameter.dim() > 1 else 0.0
        scale = head_lr if parameter in head else 1.0
        group = groups.setdefault(
            (scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale}
        )
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(
    name: OptimizerName, groups: Sequence[dict[str, Any]], lr: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """Returns AdamW with `momentum` as its first beta, or SGD; each group starts at `lr` times its `lr_scale`."""
    # `lr` is overwritten in every step; `lr_scale` remains in the group for that.
    scaled = [group | {"lr": lr * group["lr_scale"]} for group in groups]
    if name == "sgd":
        return torch.optim.SGD(scaled, lr=lr, momentum=momentum)
    return torch.optim.AdamW(scaled, lr=lr, betas=(momentum, 0.999))
