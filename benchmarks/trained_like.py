"""Random weights with the statistics of trained ones, for what can be measured without training."""

from __future__ import annotations

import torch
from torch import nn


def fill(model: nn.Module) -> nn.Module:
    """Every parameter and buffer, in place: channels of unequal strength, no zero biases, moved BatchNorms."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.dim() > 1:
                strength = (
                    torch.randn(tensor.shape[0]).mul_(0.5).exp_()
                )  # log-normal over the outputs
                tensor.normal_(std=tensor[0].numel() ** -0.5)
                tensor.mul_(strength.view(-1, *[1] * (tensor.dim() - 1)))
            elif tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5) if name.endswith("weight") else tensor.normal_(
                    std=0.3
                )
    return model
