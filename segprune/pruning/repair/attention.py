"""Attention solved anew: reduction, queries with keys, values with the output product.

Queries and keys matter only through their products, values only through what the output product makes of them. So
instead of dropping dimensions, each head's queries and keys (values and output product) are fitted at full width
and then replaced by the narrower pair whose product is nearest for the activations that came: a singular value
decomposition in the metric of their second moments, truncated. For one layer this is "SVD-LLM" (arXiv 2403.07378);
for the product of two, balanced truncation (Moore 1981). Softmax does not see what it adds to all keys of a query
alike, so keys count from their image's mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segprune.model import Attention, to_tokens
from segprune.pruning.repair.basis import (
    UNSEEN,
    Basis,
    Reads,
    fit_norm,
    normalised,
    principal,
    second_moment,
    signs_of_columns,
)
from segprune.pruning.repair.layers import (
    Pairs,
    Removed,
    assign,
    conv_rows,
    fit_layer,
    flat,
    kept,
)
from segprune.pruning.repair.moments import Moments, fit

Affine = tuple[Tensor, Tensor]  # weight out in, bias out; float64


def repair_attention(
    name: str,
    dense: Attention,
    pruned: Attention,
    into: Reads,
    out: Basis,
    removed: Removed,
    inputs: Pairs,
    targets: list[Tensor],
    damping: float,
) -> None:
    """Repairs attention called `name` in place.

    `inputs` are what both read (B N C, behind a LayerNorm that is read by `into`); `targets` are what the pruned one
    should put out, B N D' in the coordinates `out`.
    """
    # The map that keys and values read, which the reduction makes smaller.
    source, from_source = _repair_reduction(dense, pruned, into, inputs, damping)

    # Where the pruned one reads a coarser map, what it gets there is held to the averages of the dense map.
    if pruned.kv_reduction > 1:
        source = source.pooled(pruned.kv_reduction)

    # Each product at full width first, for what the pruned network gives it to read.
    rows = {inner: _head_rows(name, dense, removed, inner) for inner in ("q", "k", "v")}
    query = _fit_full(dense.q, rows["q"], into, inputs, damping)
    key = _fit_full(dense.k, rows["k"], from_source, source, damping)
    value = _fit_full(dense.v, rows["v"], from_source, source, damping)

    # Queries and keys matter through their products alone: keep the pair whose products are nearest.
    if len(query[0]) > pruned.q.out_features:
        query, key = _shorten_products(query, _centred(key, source), inputs, source, pruned)
    assign(pruned.q, *query)
    assign(pruned.k, *key)

    # What the heads put out with these values, beside what the output product should make of it.
    shorten = len(value[0]) > pruned.v.out_features
    if shorten:
        value = _centred(value, source)

    # The softmax is taken with the new queries and keys, so that values are weighed as they
    # will be in the pruned network.
    moments = Moments()
    for x, y, target in zip(inputs.pruned, source.pruned, targets, strict=True):
        moments.add(flat(_attend(pruned, x, y, value)), flat(target))

    # Values matter through what the output product makes of them: keep the directions that it uses most.
    columns = out.rows(dense.proj.weight).double()[:, rows["v"]]
    if shorten:
        from_short, to_short = _shorten_values(columns, moments, pruned)
        moments, columns = moments.through(to_short), columns @ from_short
        value = to_short @ value[0], to_short @ value[1]

    # The output product is solved last, and takes what is still wrong with the rest.
    assign(pruned.v, *value)
    assign(pruned.proj, *moments.solve(columns, damping))


def _head_rows(name: str, dense: Attention, removed: Removed, inner: str) -> Tensor:
    """Returns the rows of the dense layer `inner` (q, k or v) that belong to heads of which something is kept."""
    layer = dense.get_submodule(inner)
    assert isinstance(layer, nn.Linear)

    stays = torch.zeros(layer.out_features, dtype=torch.bool, device=layer.weight.device)
    stays[kept(removed, f"{name}.{inner}", "out", layer)] = True

    # One row per head: if none of its positions is kept, the head was removed as a whole.
    by_head = stays.view(dense.num_heads, -1)
    return by_head.any(1, keepdim=True).expand_as(by_head).flatten().nonzero().flatten()


def _repair_reduction(
    dense: Attention, pruned: Attention, into: Reads, inputs: Pairs, damping: float
) -> tuple[Pairs, Reads]:
    """Solves the reduction's two layers anew. Returns what keys and values read, dense and pruned (B M C), and how."""
    if dense.sr is None or pruned.sr is None:
        return inputs, into
    assert dense.norm is not None
    assert pruned.norm is not None

    # A narrower reduction keeps its leading directions.
    maps = inputs.as_maps()
    reduced = [to_tokens(dense.sr(x)) for x in maps.dense]
    basis = Basis()
    if pruned.sr.out_channels < dense.sr.out_channels:
        basis = principal(
            second_moment(normalised(dense.norm, x) for x in reduced), pruned.sr.out_channels
        )

    # The convolution's dense weights, in the new coordinates of its inputs and its outputs,
    # are what the fit is pulled towards where the images say nothing.
    weight = basis.rows(into.columns(dense.sr.weight))
    targets = [basis.project(x) for x in reduced]
    fit_layer(pruned.sr, conv_rows(pruned.sr, maps.pruned, targets), weight, damping)

    # Then the LayerNorm behind it, on what the convolution puts out now.
    written = [pruned.sr(x) for x in maps.pruned]
    sizes = [(x.shape[2], x.shape[3]) for x in written]
    source = Pairs(reduced, [to_tokens(x) for x in written], sizes)
    how = fit_norm(dense.norm, pruned.norm, basis, source, damping)
    return source.through(dense.norm, pruned.norm), how


def _fit_full(
    layer: nn.Linear, rows: Tensor, into: Reads, inputs: Pairs, damping: float
) -> Affine:
    """Returns the dense layer's `rows`, fitted to what the pruned network gives to read; none is removed."""
    pairs = ((flat(x), flat(layer(x_dense)[..., rows])) for x_dense, x in inputs)
    return fit(pairs, into.columns(layer.weight)[rows], damping)


def _centred(layer: Affine, source: Pairs) -> Affine:
    """Returns the layer with mean zero: softmax sees no constant in keys, and the output product's bias takes that of
    values.

    Otherwise directions with hardly any variance, once scaled up, would have enormous biases.
    """
    # The mean of what the layer reads; the bias −W · mean takes it off the outputs.
    total = sum(len(flat(y)) for y in source.pruned)
    mean = torch.stack([flat(y).double().sum(0) for y in source.pruned]).sum(0) / total
    return layer[0], -layer[0] @ mean


def _shorten_products(
    query: Affine, key: Affine, inputs: Pairs, source: Pairs, pruned: Attention
) -> tuple[Affine, Affine]:
    """Returns queries and keys of as many dimensions as the pruned layers have, their products as near as can be."""
    heads = pruned.num_heads

    # Second moments per head (h d d); keys count from their image's mean, since softmax
    # ignores what all keys share.
    queries = second_moment(_split(_affine(x, query), heads) for x in inputs.pruned)
    keys = second_moment(_from_mean(_split(_affine(y, key), heads)) for y in source.pruned)
    first, second = nearest_products(queries, keys, pruned.q.out_features // heads)

    # One r d matrix per head on the diagonal (h·r h·d): heads do not mix.
    for_query, for_key = torch.block_diag(*first.mT), torch.block_diag(*second.mT)
    return (for_query @ query[0], for_query @ query[1]), (for_key @ key[0], for_key @ key[1])


def _shorten_values(columns: Tensor, moments: Moments, pruned: Attention) -> Affine:
    """Returns short to full values and back (h·d h·r and h·r h·d), best for what `columns` (D' h·d) make of them."""
    heads = pruned.num_heads
    dim = columns.shape[1] // heads

    # Head by head: the second moment of the values, and the output product's share of them.
    covariance = (
        moments.covariances[0].unflatten(0, (heads, dim)).unflatten(2, (heads, dim))
    )  # h d h d
    covariance = covariance.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # h d d
    products = columns.unflatten(1, (heads, dim)).transpose(0, 1)  # h D' d
    first, second = nearest_products(
        products.mT @ products, covariance, pruned.v.out_features // heads
    )

    # Full values are about A · (B^T · values): B^T moves into `v`, A into the output product.
    return torch.block_diag(*first), torch.block_diag(*second.mT)


def nearest_products(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B (h d r) such that a^T A B^T b is nearest to a^T b, for a, b with second moments left, right (h d d)."""
    # With left = L L^T and right = R R^T, the mean square of a^T (A B^T − I) b is the
    # squared Frobenius norm of L^T A B^T R − L^T R. So the truncated SVD of L^T R = U S V^T
    # is the best of that rank (Eckart–Young).
    a, b = _root(left), _root(right)
    u, s, vh = torch.linalg.svd(a.mT @ b)
    u, s, v = u[..., :rank], s[..., :rank], vh.mT[..., :rank]

    # A = R V S^-1/2 and B = L U S^-1/2 give L^T A B^T R = U S V^T, each side scaled alike.
    # Where s is nothing but rounding, 1/sqrt(s) would be huge: those directions become zero.
    inverse = torch.where(
        s > s.amax(-1, keepdim=True) * 1e-10, s.clamp_min(1e-300).rsqrt(), 0.0
    )[..., None, :]
    first, second = b @ v * inverse, a @ u * inverse

    # A pair's sign is the driver's choice: the product does not depend on it, and the weights should not either.
    sign = signs_of_columns(first)
    return first * sign, second * sign


def _root(moment: Tensor) -> Tensor:
    """L with L L^T = moment, and a little in directions that the images do not show: else rounding would rank them."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]
    moment = moment + torch.diag_embed(UNSEEN * mean.expand(moment.shape[:-1]))

    # V Λ V^T = (V Λ^1/2) (V Λ^1/2)^T; rounding may leave eigenvalues a little below zero.
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp_min(0.0).sqrt()[..., None, :]


def _affine(x: Tensor, layer: Affine) -> Tensor:
    return F.linear(x, layer[0].to(x.dtype), layer[1].to(x.dtype))


def _split(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)  # B N h·d -> B h N d


def _from_mean(x: Tensor) -> Tensor:
    return x - x.mean(-2, keepdim=True)


def _attend(pruned: Attention, x: Tensor, source: Tensor, value: Affine) -> Tensor:
    """The heads' outputs B N h·d before the output product, with these values in place of the layer's."""
    # B h N d each. The scale is the trained one, and not that of the narrower heads.
    q, k, v = (
        _split(t, pruned.num_heads)
        for t in (pruned.q(x), pruned.k(source), _affine(source, value))
    )
    return (
        F.scaled_dot_product_attention(q, k, v, scale=pruned.qk_scale)
        .transpose(1, 2)
        .flatten(2)
    )
