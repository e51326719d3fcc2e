"""Which branches a network has, what each costs, and the spec of the network without some of them. Plain data."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from segprune.spec import BlockSpec, Spec, block_name
from segprune.stats import Unit, layers

Kind = Literal["attn", "mlp", "block"]
_OF_BLOCK = re.compile(r"(encoder\.stages\.\d+\.blocks\.\d+)\.(norm1|attn|norm2|mlp)\b")
_BRANCH_OF = {"norm1": "attn", "attn": "attn", "norm2": "mlp", "mlp": "mlp"}


@dataclass(frozen=True)
class Branch:
    """What can be removed: the attention or the FFN (`attn`, `mlp`) of a block, or a block that has both."""

    name: str
    kind: Kind
    stage: int
    block: int

    @property
    def singles(self) -> tuple[str, ...]:
        """The names of the one or two residual branches that it is made of."""
        return (f"{self.name}.attn", f"{self.name}.mlp") if self.kind == "block" else (self.name,)


def branches(spec: Spec) -> list[Branch]:
    """In order of execution, a block behind its two branches; every stage's last one is listed too."""
    found = []
    for i, stage in enumerate(spec.stages):
        for j, block in enumerate(stage.blocks):
            name = block_name(i, j)
            kinds: list[Kind] = []
            if block.has_attention:
                kinds.append("attn")
            if block.has_ffn:
                kinds.append("mlp")
            found += [Branch(f"{name}.{kind}", kind, i, j) for kind in kinds]
            if len(kinds) == 2:
                found.append(Branch(name, "block", i, j))
    return found


def singles(spec: Spec, names: Collection[str]) -> set[str]:
    """The names with a block's two branches in place of the block. ValueError for one that is no branch of `spec`."""
    known = {branch.name: branch for branch in branches(spec)}
    unknown = sorted(set(names) - known.keys())
    if unknown:
        raise ValueError(f"{unknown[0]} is no branch of this network; give names such as {next(iter(known))}.")
    return {single for name in names for single in known[name].singles}


def without(spec: Spec, names: Collection[str]) -> Spec:
    """The spec without these branches; a block that loses both goes, and those behind it move up.

    ValueError for a name that is no branch of `spec`, and where a stage would lose all its blocks.
    """
    gone = singles(spec, names)
    stages = []
    for i, stage in enumerate(spec.stages):
        left = [_left(block, block_name(i, j), gone) for j, block in enumerate(stage.blocks)]
        blocks = tuple(block for block in left if block.has_attention or block.has_ffn)
        if not blocks:
            raise ValueError(
                f"Stage {i + 1} would lose its last block; a stage keeps at least one with attention or FFN, "
                "so remove fewer."
            )
        stages.append(replace(stage, blocks=blocks))
    return replace(spec, stages=tuple(stages))


def _left(block: BlockSpec, name: str, gone: Collection[str]) -> BlockSpec:
    if f"{name}.attn" in gone:
        block = block.without_attention()
    return block.without_ffn() if f"{name}.mlp" in gone else block


def branch_costs(spec: Spec, unit: Unit, input_shape: tuple[int, int]) -> tuple[dict[str, int], int]:
    """Parameters or MACs (for one image H W) of every branch by name, its LayerNorm's with it; and of the network."""
    rows = layers(spec, input_shape)
    costs = dict.fromkeys((branch.name for branch in branches(spec)), 0)
    for row in rows:
        found = _OF_BLOCK.match(row.name)
        if found is not None:
            costs[f"{found[1]}.{_BRANCH_OF[found[2]]}"] += row.cost(unit)
            if found[1] in costs:
                costs[found[1]] += row.cost(unit)
    return costs, sum(row.cost(unit) for row in rows)
