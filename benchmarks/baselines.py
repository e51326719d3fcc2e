"""torch-pruning on a SegFormer: the baselines of the benchmarks.

Used as its own examples use it: `BasePruner` over all groups, heads given, the classifier protected. Its unit is a
share of channels, so the share that removes the wanted share of parameters or MACs is found by bisection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from segprune.model import Attention, SegFormer

Baseline = Literal["global L1", "isomorphic L1", "Taylor"]
Batches = Sequence[tuple[Tensor, Tensor]]


def prune_channels(
    model: SegFormer,
    ratio: float,
    example_inputs: Tensor,
    baseline: Baseline = "global L1",
    batches: Batches = (),
) -> nn.Module:
    """A copy of `model` without the share `ratio` of its channels; `batches` of images and labels are for Taylor."""
    model = copy.deepcopy(model)
    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    if baseline == "Taylor":
        importance = torch_pruning.importance.TaylorImportance()
        for images, labels in batches:
            F.cross_entropy(model(images), labels, ignore_index=255).backward()
    heads = {
        layer: attention.num_heads
        for attention in model.modules()
        if isinstance(attention, Attention)
        for layer in (attention.q, attention.k, attention.v)
    }
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs,
        importance=importance,
        global_pruning=True,
        isomorphic=baseline == "isomorphic L1",
        pruning_ratio=ratio,
        ignored_layers=[model.decode_head.classifier],
        num_heads=heads,
    )
    pruner.step()
    model.zero_grad()
    return model


def prune_to(
    model: SegFormer,
    rate: float,
    example_inputs: Tensor,
    *,
    of: Literal["params", "macs"] = "params",
    whole: float | None = None,
    baseline: Baseline = "global L1",
    batches: Batches = (),
    tolerance: float = 0.005,
) -> nn.Module:
    """What removes the share `rate` of `whole` (default: the model's), as near as steps of channels allow."""
    size: Callable[[nn.Module], float] = (
        num_parameters if of == "params" else lambda m: num_macs(m, example_inputs)
    )
    whole = size(model) if whole is None else whole
    low, high, best = 0.0, 1.0, None
    for _ in range(14):
        ratio = (low + high) / 2
        pruned = prune_channels(model, ratio, example_inputs, baseline, batches)
        removed = 1 - size(pruned) / whole
        if best is None or abs(removed - rate) < abs(best[0] - rate):
            best = (removed, pruned)
        if abs(removed - rate) < tolerance:
            break
        low, high = (ratio, high) if removed < rate else (low, ratio)
    assert best is not None
    return best[1]


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def num_macs(model: nn.Module, example_inputs: Tensor) -> float:
    """Counted by torch, since a spec does not describe what torch-pruning leaves."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).eval().to("meta")(example_inputs.to("meta"))
    return counter.get_total_flops() / 2
