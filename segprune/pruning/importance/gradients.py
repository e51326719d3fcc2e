"""Gradient-based criteria. No labels needed: the network's own predictions serve as labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segprune.pruning.groups import Group, Member
from segprune.pruning.importance.settings import Scores, Settings, channel_dim, sum_per_channel
from segprune.pruning.trace import NORMS, eval_mode, is_depthwise, run, tensors_in


def taylor(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """By how much the loss would change, to first order, without the channel: |sum of weight · gradient|, per batch.

    "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771). The sum goes over all layers of the group.
    """

    def measure(weight: Tensor, gradient: Tensor) -> Tensor:
        return weight * gradient

    return _average_batches(model, groups, settings.images, measure, np.abs)


def fisher(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """Half the sum of squared weight · squared gradient, image by image: the loss to second order.

    The Hessian's diagonal is taken to be the Fisher information's: "Faster gaze prediction with dense networks and
    Fisher pruning" (arXiv 1801.05787).
    """

    def measure(weight: Tensor, gradient: Tensor) -> Tensor:
        return 0.5 * weight.square() * gradient.square()

    # Squares of an averaged gradient are not an average of squares: one image at a time.
    images: list[Any] = []
    for batch in settings.images:
        images += _split(batch)
    return _average_batches(model, groups, images, measure, lambda values: values)


def self_labelled_loss(model: nn.Module, batch: Any) -> Tensor:
    """Returns the cross-entropy of the logits (B K …) with the network's own highest class as the label."""
    logits = tensors_in(run(model, batch))[0].float()
    return F.cross_entropy(logits, logits.detach().argmax(1))


def _split(batch: Any) -> Iterator[Any]:
    """Yields one sample at a time: of a tensor, or of a tuple, list or dict of tensors alike."""
    if isinstance(batch, Tensor):
        yield from batch.split(1)
    elif isinstance(batch, dict):
        for values in zip(*(_split(value) for value in batch.values()), strict=True):
            yield dict(zip(batch, values, strict=True))
    else:
        for values in zip(*(_split(value) for value in batch), strict=True):
            yield type(batch)(values)


def _average_batches(
    model: nn.Module,
    groups: Sequence[Group],
    batches: list[Any],
    measure: Callable[[Tensor, Tensor], Tensor],
    finish: Callable[[Scores], Scores],
) -> dict[str, Scores]:
    """Returns the mean over the batches of finish(sum of measure(weight, gradient) over all of a channel)."""
    # A dict as an ordered set: a layer in several groups is listed once.
    touched: dict[str, None] = {}
    for group in groups:
        touched |= dict.fromkeys(member.layer for member in group.members)
    parameters: list[nn.Parameter] = []
    for name in touched:
        parameters += model.get_submodule(name).parameters(recurse=False)

    totals = {group.name: np.zeros(group.num_channels) for group in groups}
    for batch in batches:
        # By identity, since layers may share a parameter. A parameter without gradient was
        # not used.
        measured = {}
        for parameter, gradient in zip(
            parameters, _gradients(model, batch, parameters), strict=True
        ):
            if gradient is not None:
                measured[id(parameter)] = measure(
                    parameter.detach().double(), gradient.double()
                )

        # Summed over all layers of a channel before `finish`, since taylor lets opposite
        # signs cancel.
        for group in groups:
            total = np.zeros(group.num_channels)
            for member in group.members:
                total += _sum_member(model.get_submodule(member.layer), member, group, measured)
            totals[group.name] += finish(total) / len(batches)
    return totals


def _gradients(
    model: nn.Module, batch: Any, parameters: list[nn.Parameter]
) -> tuple[Tensor | None, ...]:
    """Returns gradients in evaluation mode, frozen parameters' too; nobody's .grad is touched."""
    # Frozen layers are scored like all others; autograd.grad leaves every .grad as it is.
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with eval_mode(model), torch.enable_grad():
            return torch.autograd.grad(
                self_labelled_loss(model, batch), parameters, allow_unused=True
            )
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _sum_member(
    module: nn.Module, member: Member, group: Group, measured: dict[int, Tensor]
) -> Scores:
    """Sums over the weights at the member's positions, and over biases where the channel is put out."""
    total = np.zeros(group.num_channels)
    for name, parameter in module.named_parameters(recurse=False):
        values = measured.get(id(parameter))
        if values is None or (name == "bias" and member.side == "in"):
            continue

        # One value per channel: biases, normalisations, depth-wise filters.
        one_sided = parameter.dim() == 1 or isinstance(module, NORMS) or is_depthwise(module)
        dim = 0 if one_sided else channel_dim(module, member)
        sums = values.movedim(dim, 0).flatten(1).sum(1) if values.dim() > 1 else values
        total += sum_per_channel(
            group, member, sums[torch.from_numpy(member.positions).to(sums.device)]
        )
    return total
