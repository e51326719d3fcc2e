"""Plans without scores and networks cut by them, for the tests of surgery and repair."""

from __future__ import annotations

import copy

import numpy as np

from segprune.model import SegFormer
from segprune.pruning.groups import Group
from segprune.pruning.plan import Plan
from segprune.pruning.surgery import cut_channels, read_spec

STEM = "encoder.stages.0.patch_embed.proj"


def plan_of(groups: list[Group], share: float = 2 / 3) -> Plan:
    """In every part of every group other channels, equally many: the share of them."""
    rng = np.random.default_rng(0)
    keep = {}
    for group in groups:
        width = max(1, int(group.slots * share))
        parts = [
            part * group.slots + rng.permutation(group.slots)[:width]
            for part in range(group.parts)
        ]
        keep[group.name] = tuple(sorted(int(c) for c in np.concatenate(parts)))
    return Plan(keep)


def cut_copy(model: SegFormer, groups: list[Group], plan: Plan) -> SegFormer:
    model = copy.deepcopy(model)
    cut_channels(model, groups, plan)
    model.spec = read_spec(model)
    return model
