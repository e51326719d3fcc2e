"""A stage solved anew in order of execution: patch embedding, blocks, closing LayerNorm.

Layers that write to the residual stream aim at what the dense stream is and the pruned one is not yet, so that each
takes back what the layers before it got wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from segprune.model import Block, Mlp, Stage, to_map, to_tokens
from segprune.pruning.repair.attention import repair_attention
from segprune.pruning.repair.basis import (
    Basis,
    Reads,
    fit_lines,
    fit_norm,
    normalised,
    principal,
    second_moment,
)
from segprune.pruning.repair.layers import Pairs, Removed, conv_rows, fit_layer, flat, kept


def repair_stage(
    name: str,
    dense: Stage,
    pruned: Stage,
    into: Reads,
    removed: Removed,
    maps: Pairs,
    damping: float,
    step: Callable[[], None],
) -> tuple[Pairs, Reads]:
    """Repairs in place, from the maps B C H W that both read. Returns what both put out, and how it is to be read."""
    # What the dense convolution writes, B N D, before its LayerNorm: the first target.
    embedded, sizes = [], []
    for x in maps.dense:
        y = dense.patch_embed.proj(x)
        sizes.append((y.shape[2], y.shape[3]))
        embedded.append(to_tokens(y))

    # A narrower stream keeps its leading directions, as all LayerNorms of the stage together see it.
    basis = Basis()
    if pruned.norm.normalized_shape < dense.norm.normalized_shape:
        starts = [dense.patch_embed.norm(x) for x in embedded]
        basis = principal(
            second_moment(_normalised_stream(dense, starts, sizes)),
            pruned.norm.normalized_shape[0],
        )

    # In order of execution: each part is solved on what the repaired ones before it put out.
    tokens = _repair_embedding(
        dense, pruned, into, basis, maps.pruned, embedded, sizes, damping
    )
    for j, (old, new) in enumerate(zip(dense.list_blocks(), pruned.list_blocks(), strict=True)):
        tokens = _repair_block(f"{name}.blocks.{j}", old, new, basis, removed, tokens, damping)
        step()

    # The closing LayerNorm's gain moves into what reads the maps: the next stage and the head.
    reads = fit_norm(dense.norm, pruned.norm, basis, tokens, damping)
    return tokens.through(dense.norm, pruned.norm).as_maps(), reads


def _normalised_stream(
    dense: Stage, tokens: list[Tensor], sizes: list[tuple[int, int]]
) -> Iterator[Tensor]:
    """Yields the dense stream B N D as each of its LayerNorms sees it."""
    # A dense forward pass, batch by batch, that stops before each LayerNorm.
    for x, size in zip(tokens, sizes, strict=True):
        for block in dense.list_blocks():
            for _, norm, branch in block.list_branches():
                yield normalised(norm, x)
                x = x + branch(norm(x), *size)
        yield normalised(dense.norm, x)


def _repair_embedding(
    dense: Stage,
    pruned: Stage,
    into: Reads,
    basis: Basis,
    maps: list[Tensor],
    embedded: list[Tensor],
    sizes: list[tuple[int, int]],
    damping: float,
) -> Pairs:
    """Repairs the convolution and its LayerNorm, whose output starts the residual stream B N D."""
    # A stage as wide as before: the convolution aims at the dense one's outputs, and the
    # LayerNorm's gain is pulled towards the dense gain.
    proj, norm = dense.patch_embed.proj, dense.patch_embed.norm
    gain = norm.weight.double()
    weight, targets = into.columns(proj.weight), embedded
    prior: Tensor | None = gain

    if basis.matrix is not None:
        # The stream is gain · normalised, so the coordinates are taken of gain · (x − its mean).
        scaled = basis.matrix * gain
        # Subtracting each row's mean from the matrix (D' D) does the same as subtracting
        # x's mean.
        turn = Basis(scaled - scaled.mean(1, keepdim=True))
        weight, targets, prior = turn.rows(weight), [turn.project(x) for x in embedded], None

    fit_layer(
        pruned.patch_embed.proj,
        conv_rows(pruned.patch_embed.proj, maps, targets),
        weight,
        damping,
    )

    # Then the LayerNorm, for what the dense one puts out.
    written = [to_tokens(pruned.patch_embed.proj(x)) for x in maps]
    starts = [norm(x) for x in embedded]
    pairs = ((x, basis.project(start)) for x, start in zip(written, starts, strict=True))
    fit_lines(pruned.patch_embed.norm, pairs, prior, damping)
    return Pairs(starts, [pruned.patch_embed.norm(x) for x in written], sizes)


def _repair_block(
    name: str,
    dense: Block,
    pruned: Block,
    basis: Basis,
    removed: Removed,
    tokens: Pairs,
    damping: float,
) -> Pairs:
    """Repairs in place, and returns the stream behind the block. Both blocks have the same branches."""
    if dense.norm1 is not None and dense.attn is not None:
        assert pruned.norm1 is not None
        assert pruned.attn is not None

        # The LayerNorm first, then what the branch is to add, then its layers, and at last
        # the stream behind it, which includes what they still get wrong.
        into = fit_norm(dense.norm1, pruned.norm1, basis, tokens, damping)
        inputs = tokens.through(dense.norm1, pruned.norm1)
        after, targets = _aim(dense.attn, basis, inputs, tokens)
        repair_attention(
            f"{name}.attn",
            dense.attn,
            pruned.attn,
            into,
            basis,
            removed,
            inputs,
            targets,
            damping,
        )
        tokens = Pairs(
            after, _add(pruned.attn, inputs.pruned, tokens.pruned, tokens.sizes), tokens.sizes
        )

    if dense.norm2 is not None and dense.mlp is not None:
        assert pruned.norm2 is not None
        assert pruned.mlp is not None

        # The FFN aims at what the dense stream is behind both branches: it also corrects
        # attention.
        into = fit_norm(dense.norm2, pruned.norm2, basis, tokens, damping)
        inputs = tokens.through(dense.norm2, pruned.norm2)
        after, targets = _aim(dense.mlp, basis, inputs, tokens)
        _repair_mlp(
            f"{name}.mlp", dense.mlp, pruned.mlp, into, basis, removed, inputs, targets, damping
        )
        tokens = Pairs(
            after, _add(pruned.mlp, inputs.pruned, tokens.pruned, tokens.sizes), tokens.sizes
        )

    return tokens


def _aim(
    branch: Callable[..., Tensor], basis: Basis, inputs: Pairs, tokens: Pairs
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the dense stream behind the branch, and what the pruned stream lacks of it."""
    after = _add(branch, inputs.dense, tokens.dense, tokens.sizes)
    return after, [basis.project(x) - old for x, old in zip(after, tokens.pruned, strict=True)]


def _add(
    branch: Callable[..., Tensor],
    inputs: list[Tensor],
    tokens: list[Tensor],
    sizes: list[tuple[int, int]],
) -> list[Tensor]:
    return [old + branch(x, *size) for x, old, size in zip(inputs, tokens, sizes, strict=True)]


def _repair_mlp(
    name: str,
    dense: Mlp,
    pruned: Mlp,
    into: Reads,
    out: Basis,
    removed: Removed,
    inputs: Pairs,
    targets: list[Tensor],
    damping: float,
) -> None:
    # fc1, for the kept hidden channels before the depth-wise convolution, which is left as it was cut.
    hidden = kept(removed, f"{name}.fc1", "out", dense.fc1)
    rows = ((flat(x), flat(dense.fc1(x_dense)[..., hidden])) for x_dense, x in inputs)
    fit_layer(pruned.fc1, rows, into.columns(dense.fc1.weight)[hidden], damping)

    # fc2, for what the pruned stream lacks.
    columns = out.rows(dense.fc2.weight)
    rows = (
        (flat(pruned.act(to_tokens(pruned.dwconv(to_map(pruned.fc1(x), *size))))), flat(target))
        for x, target, size in zip(inputs.pruned, targets, inputs.sizes, strict=True)
    )
    fit_layer(pruned.fc2, rows, columns[:, hidden], damping)
