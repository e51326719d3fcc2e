from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from segprune.model import SegFormer
from segprune.pruning.groups import Group
from segprune.pruning.plan import Plan
from segprune.pruning.repair.basis import Reads
from segprune.pruning.repair.head import repair_head
from segprune.pruning.repair.layers import Pairs
from segprune.pruning.repair.stages import repair_stage
from segprune.pruning.surgery import removed_positions

DAMPING = 1e-3


@torch.no_grad()
def repair(pruned: SegFormer, dense: SegFormer, groups: Iterable[Group], plan: Plan, batches: Iterable[Tensor], *, damping: float = DAMPING, progress: Callable[[int, int], None] | None = None) -> SegFormer:
    images = list(batches)
    removed = removed_positions(groups, plan)
    result = copy.deepcopy(pruned).eval()
    dense = dense.eval()
    maps, into = Pairs(images, images, []), Reads()
    every, how = [], []
    for i, (old, new) in enumerate(zip(dense.encoder.stages, result.encoder.stages, strict=True)):
        maps, into = repair_stage(f"encoder.stages.{i}", old, new, into, removed, maps, damping, lambda: None)
        every.append(maps)
        how.append(into)
    repair_head(dense.decode_head, result.decode_head, how, removed, every, damping)
    return result
