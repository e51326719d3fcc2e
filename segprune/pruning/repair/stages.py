"""A stage re-solved in order of execution: patch embedding, blocks, closing LayerNorm.

Layers that write to the residual stream aim at what the dense stream is and the pruned one is not yet, so that each
takes back what the layers before it got wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor, nn

from segprune.model import Attention, Mlp, Stage, to_map, to_tokens
from segprune.pruning.depth.branches import blocks_of, parts_of
from segprune.pruning.repair.attention import repair_attention
from segprune.pruning.repair.basis import Basis, Reads, fit_lines, fit_norm, normalised, principal, second_moment
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
    """In place, from the maps B C H W that both read. Returns what both put out, and how it is to be read."""
    embedded, sizes = [], []
    for x in maps.dense:
        y = dense.patch_embed.proj(x)
        sizes.append((y.shape[2], y.shape[3]))
        embedded.append(to_tokens(y))
    basis = Basis()
    if pruned.norm.normalized_shape < dense.norm.normalized_shape:
        starts = [dense.patch_embed.norm(x) for x in embedded]
        basis = principal(second_moment(_normalised_stream(dense, starts, sizes)), pruned.norm.normalized_shape[0])
    parts = _parts(name, dense, pruned)
    behind = _run(takewhile(_is_gone, parts), [dense.patch_embed.norm(x) for x in embedded], sizes)
    tokens = _repair_embedding(dense, pruned, into, basis, maps.pruned, embedded, behind, sizes, damping)
    tokens = _repair_branches(parts, basis, removed, tokens, damping, step)
    reads = fit_norm(dense.norm, pruned.norm, basis, tokens, damping)
    return tokens.through(dense.norm, pruned.norm).as_maps(), reads


def _normalised_stream(dense: Stage, tokens: list[Tensor], sizes: list[tuple[int, int]]) -> Iterator[Tensor]:
    """The dense stream B N D as each of its LayerNorms sees it."""
    for x, size in zip(tokens, sizes, strict=True):
        for block in blocks_of(dense):
            for _, norm, branch in parts_of(block):
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
    behind: list[Tensor],
    sizes: list[tuple[int, int]],
    damping: float,
) -> Pairs:
    """The convolution and its LayerNorm, whose output starts the residual stream B N D.

    It aims at the dense stream `behind` it, or behind the branches that were removed right after it.
    """
    proj, norm = dense.patch_embed.proj, dense.patch_embed.norm
    weight, targets, gain = into.columns(proj.weight), embedded, norm.weight.double()
    prior: Tensor | None = gain
    if basis.matrix is not None:
        # the stream is gain · normalised, so the coordinates are taken of gain · (x − its mean)
        scaled = basis.matrix * gain
        turn = Basis(scaled - scaled.mean(1, keepdim=True))
        weight, targets, prior = turn.rows(weight), [turn.project(x) for x in embedded], None
    fit_layer(pruned.patch_embed.proj, conv_rows(pruned.patch_embed.proj, maps, targets), weight, damping)
    written = [to_tokens(pruned.patch_embed.proj(x)) for x in maps]
    pairs = ((x, basis.project(start)) for x, start in zip(written, behind, strict=True))
    fit_lines(pruned.patch_embed.norm, pairs, prior, damping)
    return Pairs(behind, [pruned.patch_embed.norm(x) for x in written], sizes)


@dataclass(frozen=True)
class _Part:
    """An attention or an FFN in both networks, each behind its LayerNorm; of one that was removed, `new` is None."""

    name: str
    block: int
    old: tuple[nn.LayerNorm, Attention | Mlp]
    new: tuple[nn.LayerNorm, Attention | Mlp] | None


def _is_gone(part: _Part) -> bool:
    return part.new is None


def _parts(name: str, dense: Stage, pruned: Stage) -> list[_Part]:
    """As they run in the dense stage; the pruned one has as many blocks, some of them perhaps empty."""
    parts = []
    for j, (old, new) in enumerate(zip(blocks_of(dense), blocks_of(pruned), strict=True)):
        left = {kind: (norm, branch) for kind, norm, branch in parts_of(new)}
        parts += [
            _Part(f"{name}.blocks.{j}.{kind}", j, (norm, branch), left.get(kind))
            for kind, norm, branch in parts_of(old)
        ]
    return parts


def _repair_branches(
    parts: list[_Part], basis: Basis, removed: Removed, tokens: Pairs, damping: float, step: Callable[[], None]
) -> Pairs:
    """In place; the stream behind the last block comes back.

    Each branch aims at the dense stream as the next one that remains finds it, so that it does what those removed
    behind it did.
    """
    for i, part in enumerate(parts):
        if part.new is not None:
            after = _run([part, *takewhile(_is_gone, parts[i + 1 :])], tokens.dense, tokens.sizes)
            targets = [basis.project(x) - old for x, old in zip(after, tokens.pruned, strict=True)]
            (old_norm, old), (norm, new) = part.old, part.new
            into = fit_norm(old_norm, norm, basis, tokens, damping)
            inputs = tokens.through(old_norm, norm)
            if isinstance(old, Attention) and isinstance(new, Attention):
                repair_attention(part.name, old, new, into, basis, removed, inputs, targets, damping)
            elif isinstance(old, Mlp) and isinstance(new, Mlp):
                _repair_mlp(part.name, old, new, into, basis, removed, inputs, targets, damping)
            tokens = Pairs(after, _add(new, inputs.pruned, tokens.pruned, tokens.sizes), tokens.sizes)
        if i + 1 == len(parts) or parts[i + 1].block != part.block:
            step()
    return tokens


def _run(parts: Iterable[_Part], tokens: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
    """The dense stream behind these branches."""
    for norm, branch in (part.old for part in parts):
        tokens = _add(branch, [norm(x) for x in tokens], tokens, sizes)
    return tokens


def _add(
    branch: Callable[..., Tensor], inputs: list[Tensor], tokens: list[Tensor], sizes: list[tuple[int, int]]
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
    hidden = kept(removed, f"{name}.fc1", "out", dense.fc1)
    rows = ((flat(x), flat(dense.fc1(x_dense)[..., hidden])) for x_dense, x in inputs)
    fit_layer(pruned.fc1, rows, into.columns(dense.fc1.weight)[hidden], damping)
    columns = out.rows(dense.fc2.weight)
    rows = (
        (flat(pruned.act(to_tokens(pruned.dwconv(to_map(pruned.fc1(x), *size))))), flat(target))
        for x, target, size in zip(inputs.pruned, targets, inputs.sizes, strict=True)
    )
    fit_layer(pruned.fc2, rows, columns[:, hidden], damping)
