"""Which branches a network has, what each costs, and the spec of the network without some of them. Plain data."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from segprune.spec import Spec, block_name
from segprune.stats import Unit, layers

Kind = Literal["attn", "mlp", "block"]
# Splits a layer's name into its block and the part of it; a LayerNorm belongs to the branch
# that reads it.
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
        return (
            (f"{self.name}.attn", f"{self.name}.mlp") if self.kind == "block" else (self.name,)
        )


def branches(spec: Spec) -> list[Branch]:
    """Lists branches in order of execution, a block behind its two branches; every stage's last one is listed too."""
    listed = []
    for i, stage in enumerate(spec.stages):
        for j, block in enumerate(stage.blocks):
            name = block_name(i, j)
            if block.has_attention:
                listed.append(Branch(f"{name}.attn", "attn", i, j))
            if block.has_ffn:
                listed.append(Branch(f"{name}.mlp", "mlp", i, j))
            if block.has_attention and block.has_ffn:
                listed.append(Branch(name, "block", i, j))
    return listed


def singles(spec: Spec, names: Collection[str]) -> set[str]:
    """Returns the names with a block's two branches in place of the block.

    Raises ValueError for a name that is no branch of `spec`.
    """
    known = {branch.name: branch for branch in branches(spec)}
    unknown = sorted(set(names) - known.keys())
    if unknown:
        raise ValueError(
            f"{unknown[0]} is no branch of this network; give names such as {next(iter(known))}."
        )

    # A block stands for its two branches, so that later code has to know branches alone.
    every: set[str] = set()
    for name in names:
        every.update(known[name].singles)
    return every


def without(spec: Spec, names: Collection[str]) -> Spec:
    """Returns the spec without these branches; a block that loses both disappears, and those behind it move up.

    Raises ValueError for a name that is no branch of `spec`, and where a stage would lose all its blocks.
    """
    removed = singles(spec, names)
    stages = []
    for i, stage in enumerate(spec.stages):
        blocks = []
        for j, block in enumerate(stage.blocks):
            # Names count blocks as they were; those behind a removed one move up only in
            # the result.
            if f"{block_name(i, j)}.attn" in removed:
                block = block.without_attention()
            if f"{block_name(i, j)}.mlp" in removed:
                block = block.without_ffn()
            if block.has_attention or block.has_ffn:
                blocks.append(block)

        if not blocks:
            raise ValueError(
                f"Stage {i + 1} would lose its last block; a stage keeps at least one with attention or FFN, "
                "so remove fewer."
            )
        stages.append(replace(stage, blocks=tuple(blocks)))
    return replace(spec, stages=tuple(stages))


def branch_costs(
    spec: Spec, unit: Unit, input_shape: tuple[int, int]
) -> tuple[dict[str, int], int]:
    """Returns the parameters or MACs of every branch by name, its LayerNorm's with it; and of the network.

    MACs are for one image of (H, W) pixels.
    """
    rows = layers(spec, input_shape)
    costs = dict.fromkeys((branch.name for branch in branches(spec)), 0)
    for row in rows:
        # Patch embeddings, closing norms and the head belong to no branch.
        in_block = _OF_BLOCK.match(row.name)
        if in_block is None:
            continue

        # A layer counts for its branch, and for the block if that can be removed as a whole.
        block, part = in_block[1], in_block[2]
        costs[f"{block}.{_BRANCH_OF[part]}"] += row.cost(unit)
        if block in costs:
            costs[block] += row.cost(unit)
    return costs, sum(row.cost(unit) for row in rows)
