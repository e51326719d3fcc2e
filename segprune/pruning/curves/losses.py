"""What least squares cannot give back at a place, for each width: a linear map of what passes there.

Queries with keys, values and streams keep leading directions, by the same truncations as the repair's (attention.py,
basis.py); hidden layers and the decode head keep channels, chosen by elimination. What is left out counts less what
those that stay tell of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from segprune.model import Attention, SegFormer
from segprune.pruning.curves.elimination import eliminate
from segprune.pruning.curves.places import Passing, Place
from segprune.pruning.groups import Group
from segprune.pruning.repair.attention import nearest_products
from segprune.pruning.repair.basis import leading_directions
from segprune.pruning.repair.moments import Moments

ROWS = 1024  # of one image that a place's moments are taken of; neighbours say much the same


@dataclass
class Statistics:
    """What is known of a place before its losses are worked out: moments of what passes, and of the gradient.

    For products these are second moments of queries and of keys, h d d, keys counted from their image's mean.
    """

    moments: Moments = field(default_factory=Moments)
    gradient: Tensor | None = None  # C C
    queries: Tensor | None = None
    keys: Tensor | None = None

    @torch.no_grad()
    def add(self, model: SegFormer, place: Place, item: Passing, gradient: Tensor) -> None:
        """Adds one image: `item` and `gradient` have B = 1."""
        if place.kind == "products":
            attention = model.get_submodule(place.layer)
            assert isinstance(attention, Attention)
            assert item.keys is not None

            # The image's tokens by head, h N d. Softmax
            # does not see what all keys have in common.
            q, k = (
                x[0].double().unflatten(1, (attention.num_heads, -1)).transpose(0, 1)
                for x in (item.x, item.keys)
            )
            k = k - k.mean(1, keepdim=True)
            self.queries = _plus(self.queries, q.mT @ q)
            self.keys = _plus(self.keys, k.mT @ k)
            return

        # An odd stride, for an even one would see the same columns of every row.
        x = item.x[0]
        x = x[:: max(1, len(x) // ROWS) | 1]
        self.moments.add(x, x[:, :0])

        # Second moment of the gradient, C C: which errors at this place the logits feel.
        g = gradient[0].double()
        self.gradient = _plus(self.gradient, g.T @ g)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


@dataclass(frozen=True)
class Losses:
    """`lost[i]` (widths × out × in) is what a layer no longer says at place i; `order` has the channels of groups whose
    channels are chosen, least needed first."""

    lost: list[Tensor]
    order: tuple[int, ...] | None = None


def work_out_losses(
    model: SegFormer,
    group: Group,
    places: Sequence[Place],
    statistics: Sequence[Statistics],
    widths: Sequence[int],
    damping: float,
) -> Losses:
    """Returns what one group loses at its places, for `widths` slots, ascending; in float32."""
    kind, first = places[0].kind, statistics[0]
    if kind == "channels":
        assert first.gradient is not None

        # Channels are eliminated one by one, with the gradient's second moment as the metric.
        weight = _columns(model, places[0])
        result = eliminate(
            first.moments.definite, weight, first.gradient, list(widths), damping
        )
        lost = torch.stack([result.lost[width] for width in widths])
        return Losses([lost.float()], tuple(result.order.tolist()))

    if kind == "products":
        assert first.queries is not None
        assert first.keys is not None

        # Queries and keys are truncated to fewer dimensions per head.
        maps = [_unmatched(first.queries, first.keys, width) for width in widths]
        return Losses([torch.stack(maps).float()])

    if kind == "values":
        # Values keep fewer directions per head, as the repair shortens them.
        weight, covariance = _columns(model, places[0]), first.moments.definite
        kept = [_short_values(weight, covariance, group.parts, width) for width in widths]
        return Losses([_unread(weight, covariance, kept, damping)])

    # A stream has one basis for all of its readers.
    # LayerNorm takes the mean, so one channel less counts.
    basis = leading_directions(
        torch.stack([item.moments.products for item in statistics]).sum(0)
    ).T
    full = torch.eye(group.slots).to(basis)
    kept = [full if width == group.slots else basis[: width - 1] for width in widths]
    lost_here = []
    for place, item in zip(places, statistics, strict=True):
        norm = model.get_submodule(place.layer)
        assert isinstance(norm, nn.LayerNorm)

        # The map to come near to is the LayerNorm's own gain, a diagonal matrix (C C).
        gain = norm.weight.detach().double().diag()
        lost_here.append(_unread(gain, item.moments.definite, kept, damping))
    return Losses(lost_here)


def _columns(model: SegFormer, place: Place) -> Tensor:
    layer = model.get_submodule(place.layer)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer.weight.detach().flatten(1)[:, list(place.positions)].double()


def _unread(
    weight: Tensor, covariance: Tensor, kept: Sequence[Tensor], damping: float
) -> Tensor:
    """For each of `kept` (k p), weight (q p) less what the best reader of kept @ x says of it."""
    # Least squares of weight @ x on rows @ x by the normal equations (k k), damped.
    ridge = damping * covariance.diagonal().mean() + torch.finfo(covariance.dtype).tiny
    maps = []
    for rows in kept:
        if len(rows) == rows.shape[1]:
            maps.append(torch.zeros_like(weight))
            continue
        cross = rows @ covariance  # k p
        damped = cross @ rows.T
        damped.diagonal().add_(ridge)
        reader = torch.cholesky_solve(cross @ weight.T, torch.linalg.cholesky(damped))  # k q
        maps.append(weight - reader.T @ rows)
    return torch.stack(maps).float()


def _short_values(weight: Tensor, covariance: Tensor, heads: int, rank: int) -> Tensor:
    """From full to short values (h·r h·d), as the repair shortens them."""
    dim = len(covariance) // heads
    if rank == dim:
        return torch.eye(heads * dim).to(covariance)

    # Heads are shortened one by one, so only the covariance within each of them counts.
    blocks = covariance.unflatten(0, (heads, dim)).unflatten(2, (heads, dim))  # h d h d
    blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # h d d

    # wᵀ w (d d) says how much each direction of a head's values matters to what reads it.
    products = weight.unflatten(1, (heads, dim)).transpose(0, 1)  # h q d
    _, second = nearest_products(products.mT @ products, blocks, rank)
    return torch.block_diag(*second.mT)


def _unmatched(queries: Tensor, keys: Tensor, rank: int) -> Tensor:
    """From queries to the change of queries (h·d h·d) that changes their products with keys as the truncation does."""
    heads, dim = queries.shape[:2]
    if rank == dim:
        return torch.zeros(heads * dim, heads * dim).to(queries)

    # Short products are qᵀ first secondᵀ k, so keys
    # meet the query second firstᵀ q. The rest is lost.
    first, second = nearest_products(queries, keys, rank)
    return torch.eye(heads * dim).to(queries) - torch.block_diag(*(second @ first.mT))
