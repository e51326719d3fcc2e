"""Training towards a plan: a group lasso on the channels that are to go, so that little is lost when they do.

"Learning Structured Sparsity in Deep Neural Networks" (arXiv 1608.03665), here only on the channels that a plan has
chosen and over all weights that read or write them, as in "DepGraph" (arXiv 2301.12900).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from segprune.pruning.groups import Group, Member
from segprune.pruning.plan import Plan
from segprune.pruning.trace import TRANSPOSED_CONVS

TINY = 1e-12  # under the root, whose slope at 0 has no bound


def group_lasso(groups: Sequence[Group], plan: Plan) -> Callable[[nn.Module], Tensor]:
    """A penalty on the network that the groups are of: the sum, over all channels that go, of their weights' norm.

    0 when the plan takes nothing. Its gradient pulls every channel with equal strength, down to 0.
    """
    chosen = []
    for group in groups:
        gone = np.ones(group.num_channels, dtype=bool)
        gone[list(plan.keep[group.name])] = False
        if gone.any():
            chosen.append((group, np.cumsum(gone) - 1, gone))

    def penalty(model: nn.Module) -> Tensor:
        total = next(model.parameters()).new_zeros(())
        for group, number, gone in chosen:
            squares = total.new_zeros(int(gone.sum()))
            for member in group.members:
                lost = gone[member.channels]
                positions = torch.from_numpy(member.positions[lost]).to(total.device)
                channels = torch.from_numpy(number[member.channels[lost]]).to(total.device)

                rows = _rows(model.get_submodule(member.layer), member)[positions]
                squares = squares.index_add(0, channels, rows.square().sum(1))
            total = total + (squares + TINY).sqrt().sum()
        return total

    return penalty


def _rows(module: nn.Module, member: Member) -> Tensor:
    """The layer's weights with the positions of the member's side in front, the rest flattened."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    transposed = isinstance(module, TRANSPOSED_CONVS)
    swapped = weight.dim() > 1 and (member.side == "in") != transposed
    return (weight.transpose(0, 1) if swapped else weight).reshape(weight.shape[int(swapped)], -1)
