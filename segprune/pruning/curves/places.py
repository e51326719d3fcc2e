"""Where narrowing a group is felt, and what passes there: activations forwards, effects on the logits backwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from segprune.model import Attention, Block, SegFormer, Stage, to_tokens
from segprune.pruning.groups import Group
from segprune.pruning.repair.basis import normalised

Kind = Literal["channels", "values", "stream", "products"]


@dataclass(frozen=True)
class Place:
    """One place at which a group is felt.

    channels: the channels at `positions` of what the linear layer reads. values: the same, where the channels lie by
    head. stream: the output of a LayerNorm, read by whatever follows. products: queries times keys of the attention
    called `layer`.
    """

    group: int
    kind: Kind
    layer: str
    positions: tuple[int, ...] = ()


def find_places(model: SegFormer, groups: Sequence[Group]) -> list[Place]:
    """Returns the places of all groups; ValueError for whole heads and for layers that are not SegFormer's."""
    places: list[Place] = []
    for g, group in enumerate(groups):
        if group.kind in ("ffn", "decoder", "branch", "v"):
            # One layer reads such a group. Its columns are
            # put in the order of the group's channels.
            (member,) = [member for member in group.members if member.side == "in"]
            positions = tuple(int(p) for p in member.positions[np.argsort(member.channels)])
            kind: Kind = "values" if group.kind == "v" else "channels"
            places.append(Place(g, kind, member.layer, positions))
        elif group.kind == "qk":
            # Queries and keys are felt through their products alone.
            places.append(Place(g, "products", group.name.removesuffix(".qk")))
        elif group.kind == "reduction":
            # The reduced map is read behind its LayerNorm, by keys and by values.
            places.append(Place(g, "stream", group.name.removesuffix("reduction") + "norm"))
        elif group.kind == "stage":
            # A stage's width is felt at every LayerNorm that reads its residual stream.
            prefix = group.name.removesuffix(".width")
            stage = model.get_submodule(prefix)
            assert isinstance(stage, Stage)
            places += [Place(g, "stream", f"{prefix}.{name}") for name in _stream_norms(stage)]
        else:
            raise ValueError(
                f"No curve can be measured for {group.name}, which is of kind {group.kind}; protect it."
            )
    return places


def _stream_norms(stage: Stage) -> Iterator[str]:
    """Every LayerNorm through which the residual stream is read."""
    for j, block in enumerate(stage.blocks):
        assert isinstance(block, Block)
        if block.norm1 is not None:
            yield f"blocks.{j}.norm1"
        if block.norm2 is not None:
            yield f"blocks.{j}.norm2"
    yield "norm"


@dataclass(frozen=True)
class Passing:
    """What passes a place: `x` (B N C) without gradient, and `y`, whose gradient tells what an error does there.

    For a stream `x` is normalised, before the LayerNorm's gain. For products `x` are the queries, `keys` is B M C.
    """

    x: Tensor
    y: Tensor
    keys: Tensor | None = None


@contextmanager
def watch(model: SegFormer, places: Sequence[Place]) -> Iterator[dict[Place, Passing]]:
    """Yields a dict that every forward pass fills anew."""
    passing: dict[Place, Passing] = {}
    queries: dict[str, Tensor] = {}

    def keep_queries(
        name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        queries[name] = output

    def keep(
        place: Place, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        x = inputs[0].detach()
        if place.kind == "products":
            # This is the keys' layer, which runs after the queries'.
            query = queries[place.layer]
            passing[place] = Passing(query.detach(), query, output.detach())
        elif isinstance(module, nn.LayerNorm):
            passing[place] = Passing(normalised(module, x), output)
        else:
            tokens = x if x.dim() == 3 else to_tokens(x)
            passing[place] = Passing(tokens[..., list(place.positions)], output)

    hooks = []
    try:
        for place in places:
            module = model.get_submodule(place.layer)

            # Of an attention its queries and its keys are watched: two layers.
            if isinstance(module, Attention):
                hooks.append(module.q.register_forward_hook(partial(keep_queries, place.layer)))
                module = module.k
            hooks.append(module.register_forward_hook(partial(keep, place)))
        yield passing
    finally:
        for hook in hooks:
            hook.remove()


def probe_logits(
    logits: Tensor, passing: dict[Place, Passing], generator: torch.Generator
) -> dict[Place, Tensor]:
    """Returns by place the gradient (B N C) of one random direction of the logits (B K H W), image by image.

    For a small error e at a place, (Σ gradient · e)² / 2 is on average over directions the Kullback-Leibler divergence
    per pixel that it causes: directions have the covariance diag(p) − p pᵀ, the divergence's second derivative.
    """
    # Per pixel √p · noise, less p times its sum, has the covariance diag(p) − p pᵀ.
    p = logits.detach().softmax(1)
    noise = torch.randn(p.shape, generator=generator).to(p)
    scaled = noise * p.sqrt()
    direction = scaled - p * scaled.sum(1, keepdim=True)

    # Over the root of the number of pixels, so that the square is per pixel.
    area = logits.shape[2] * logits.shape[3]
    total = (direction * logits).sum() / area**0.5
    gradients = torch.autograd.grad(
        total, [item.y for item in passing.values()], retain_graph=True
    )
    return {
        place: gradient if gradient.dim() == 3 else to_tokens(gradient)
        for place, gradient in zip(passing, gradients, strict=True)
    }
