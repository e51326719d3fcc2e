"""torch-pruning's plain global L1 on a SegFormer: the baseline of the benchmarks.

Used as its own examples use it: `BasePruner` with `MagnitudeImportance(p=1)` over all groups, heads given, the
classifier protected. Its unit is a share of channels, so the share that removes the wanted share of parameters is
found by bisection.
"""

from __future__ import annotations

import copy

import torch
import torch_pruning
from torch import nn

from segprune.model import Attention, SegFormer


def prune_channels(model: SegFormer, ratio: float, example_inputs: torch.Tensor) -> nn.Module:
    """A copy of `model` without the share `ratio` of its channels, ranked globally by plain L1."""
    model = copy.deepcopy(model)
    heads = {
        layer: attention.num_heads
        for attention in model.modules()
        if isinstance(attention, Attention)
        for layer in (attention.q, attention.k, attention.v)
    }
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[model.decode_head.classifier],
        num_heads=heads,
    )
    pruner.step()
    return model


def prune_parameters(
    model: SegFormer, rate: float, example_inputs: torch.Tensor, *, tolerance: float = 0.005
) -> nn.Module:
    """The plain global L1 that removes the share `rate` of the parameters, as near as its steps allow."""
    whole = sum(p.numel() for p in model.parameters())
    low, high, best = 0.0, 1.0, None
    for _ in range(14):
        ratio = (low + high) / 2
        pruned = prune_channels(model, ratio, example_inputs)
        removed = 1 - sum(p.numel() for p in pruned.parameters()) / whole
        if best is None or abs(removed - rate) < abs(best[0] - rate):
            best = (removed, pruned)
        if abs(removed - rate) < tolerance:
            break
        low, high = (ratio, high) if removed < rate else (low, ratio)
    assert best is not None
    return best[1]
