"""Criteria that ask what a loss says to the channel's weights. Unlabelled images do: see `own_decisions`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segprune.pruning.groups import Group, Member
from segprune.pruning.importance.settings import Loss, Scores, Settings, channel_dim, per_channel
from segprune.pruning.trace import NORMS, eval_mode, is_depthwise, run, tensors_in


def taylor(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """By how much the loss would change, to first order, without the channel: |sum of weight · gradient|, per batch.

    "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771). The sum goes over all layers of the group.
    """

    def measure(weight: Tensor, gradient: Tensor) -> Tensor:
        return weight * gradient

    return _accumulated(model, groups, settings, settings.data, measure, np.abs)


def fisher(model: nn.Module, groups: Sequence[Group], settings: Settings) -> dict[str, Scores]:
    """Half the sum of squared weight · squared gradient, image by image: the loss to second order.

    The Hessian's diagonal is taken to be the Fisher information's: "Faster gaze prediction with dense networks and
    Fisher pruning" (arXiv 1801.05787).
    """

    def measure(weight: Tensor, gradient: Tensor) -> Tensor:
        return 0.5 * weight.square() * gradient.square()

    images = [one for batch in settings.data for one in _split(batch)]
    return _accumulated(model, groups, settings, images, measure, lambda values: values)


def own_decisions(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of the network's logits (B K …) with its own highest class as the label: no labels are needed."""
    logits = tensors_in(run(model, batch))[0].float()
    return F.cross_entropy(logits, logits.detach().argmax(1))


def _split(batch: Any) -> Iterator[Any]:
    """One sample at a time: of a tensor, or of a tuple, list or dict of tensors alike."""
    if isinstance(batch, Tensor):
        yield from batch.split(1)
    elif isinstance(batch, dict):
        for values in zip(*(_split(value) for value in batch.values()), strict=True):
            yield dict(zip(batch, values, strict=True))
    else:
        for values in zip(*(_split(value) for value in batch), strict=True):
            yield type(batch)(values)


def _accumulated(
    model: nn.Module,
    groups: Sequence[Group],
    settings: Settings,
    batches: list[Any],
    measure: Callable[[Tensor, Tensor], Tensor],
    finish: Callable[[Scores], Scores],
) -> dict[str, Scores]:
    """Mean over the batches of finish(sum of measure(weight, gradient) over all that belongs to a channel)."""
    touched = dict.fromkeys(member.layer for group in groups for member in group.members)
    parameters = [p for name in touched for p in model.get_submodule(name).parameters(recurse=False)]
    totals = {group.name: np.zeros(group.num_channels) for group in groups}
    loss = settings.loss or own_decisions
    for batch in batches:
        found = {
            id(parameter): measure(parameter.detach().double(), gradient.double())
            for parameter, gradient in zip(parameters, _gradients(model, loss, batch, parameters), strict=True)
            if gradient is not None
        }
        for group in groups:
            parts = (_member_sums(model.get_submodule(m.layer), m, group, found) for m in group.members)
            totals[group.name] += finish(np.sum(list(parts), axis=0)) / len(batches)
    return totals


def _gradients(model: nn.Module, loss: Loss, batch: Any, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    """Evaluation mode, frozen parameters too; nobody's .grad is touched."""
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with eval_mode(model), torch.enable_grad():
            return torch.autograd.grad(loss(model, batch), parameters, allow_unused=True)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _member_sums(module: nn.Module, member: Member, group: Group, found: dict[int, Tensor]) -> Scores:
    """Over the weights at the member's positions, and biases where the channel is put out."""
    own = member.side == "out"
    total = np.zeros(group.num_channels)
    for name, parameter in module.named_parameters(recurse=False):
        values = found.get(id(parameter))
        if values is None or (name == "bias" and not own):
            continue
        one_sided = parameter.dim() == 1 or isinstance(module, NORMS) or is_depthwise(module)
        dim = 0 if one_sided else channel_dim(module, member)
        sums = values.movedim(dim, 0).flatten(1).sum(1) if values.dim() > 1 else values
        total += per_channel(group, member, sums[torch.from_numpy(member.positions).to(sums.device)])
    return total
