"""The criterion that weighs weights by what they are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segprune.pruning.groups import Group, Member
from segprune.pruning.importance.settings import (
    Scores,
    Settings,
    average_layers,
    sum_per_channel,
    weighted_members,
)
from segprune.pruning.trace import TRANSPOSED_CONVS, eval_mode, is_depthwise, run


def wanda(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """Sums of |weight| · norm of the input channel that it multiplies, per layer, rows and columns alike.

    "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695), summed over channels.
    """
    # A layer may be in several groups, once by its inputs and once by its outputs; one pass
    # over the images serves all of them.
    layers: dict[str, nn.Module] = {}
    for group in groups:
        layers |= {member.layer: module for member, module in weighted_members(model, group)}
    norms = _input_norms(model, layers, settings.images)

    scores = {}
    for group in groups:
        sums = []
        for member, module in weighted_members(model, group):
            sums.append(
                sum_per_channel(group, member, _sums(module, member, norms[member.layer]))
            )
        scores[group.name] = average_layers(group, sums)
    return scores


def _sums(module: nn.Module, member: Member, norms: Tensor) -> Tensor:
    """Returns the sum of products at each of the member's positions."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().double().abs()
    if isinstance(module, TRANSPOSED_CONVS):
        # Its weight is in out [kernel]; from here on it is out in [kernel].
        weight = weight.transpose(0, 1)

    if is_depthwise(module):
        products = weight.flatten(1).sum(1) * norms
    else:
        # Each |weight|, summed over the kernel, times its input's norm; then summed over
        # the inputs for an output channel, and over the outputs for an input channel.
        products = (weight.flatten(2).sum(2) if weight.dim() > 2 else weight) * norms  # out in
        products = products.sum(int(member.side == "out"))
    return products[torch.from_numpy(member.positions).to(products.device)]


def _input_norms(
    model: nn.Module, layers: dict[str, nn.Module], data: list[Any]
) -> dict[str, Tensor]:
    """Returns per input channel of each layer the Euclidean norm over all images and positions."""
    squares: dict[str, Tensor] = {}

    def watcher(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double()

            # Channels last: a linear layer has them there, a convolution behind the batch.
            x = x if isinstance(module, nn.Linear) else x.movedim(1, -1)
            new = x.square().flatten(0, -2).sum(0)
            squares[name] = squares[name] + new if name in squares else new

        return watch

    hooks = [module.register_forward_pre_hook(watcher(name)) for name, module in layers.items()]
    try:
        with eval_mode(model), torch.no_grad():
            for batch in data:
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: values.sqrt() for name, values in squares.items()}
