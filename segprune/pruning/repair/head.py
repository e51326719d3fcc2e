"""The decode head solved anew: what is fused, together for all stages on the sum; BatchNorm; classifier.

Branches that are not folded come first, each by itself. A BatchNorm takes the mean shift, as in "Data-Free Quantization
Through Weight Equalization and Bias Correction" (arXiv 1906.04721), and its variance moves with that of what is fused,
the gain making up for it: the logits stay, and training goes on from statistics that are true.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from segprune.model import DecodeHead, to_tokens
from segprune.pruning.repair.basis import Reads
from segprune.pruning.repair.layers import Pairs, Removed, assign, fit_layer, flat, kept
from segprune.pruning.repair.moments import Moments, Rows, fit

POSITIONS = (
    2**15
)  # of all images' quarter-size maps are looked at; neighbours there say much the same
Maps = list[Tensor]  # one per stage, 1 C H W


def repair_head(
    dense: DecodeHead,
    pruned: DecodeHead,
    into: list[Reads],
    removed: Removed,
    maps: list[Pairs],
    damping: float,
) -> None:
    """Repairs in place; `maps` (one per stage, B C H W) are what both read, `into` how."""
    pairs = _Sampled(maps)
    stays = kept(removed, "decode_head.classifier", "in", dense.classifier)

    # What is fused: the stages' products themselves where the head is folded, else what a layer makes of branches.
    weights = [
        how.columns(branch.weight).double()
        for how, branch in zip(into, _layers(dense.branches), strict=True)
    ]
    if dense.fuse is None and dense.fuses is None:
        weight = torch.cat(weights, dim=1)
    else:
        _repair_branches(dense, pruned, weights, removed, maps, damping)
        weight = _fuse_columns(dense, removed)

    # All stages together on their sum; the BatchNorm takes the mean that is missing, and the change of variance.
    moments, variance = _observed(_fused_rows(dense, pruned, stays, pairs))
    weight, bias = moments.solve(weight[stays], damping)
    _assign_fused(pruned, weight)
    _move_statistics(dense.norm, pruned.norm, stays, bias, variance, _spread(weight, moments))

    # The classifier, for the dense logits.
    rows = (
        (pairs.rows(pruned.act(pruned.norm(pruned.fused(new)))), pairs.rows(dense(old)))
        for old, new in pairs
    )
    fit_layer(pruned.classifier, rows, dense.classifier.weight[:, stays], damping)


class _Sampled:
    """The images one by one, and some of the positions of their maps at quarter size."""

    def __init__(self, maps: list[Pairs]) -> None:
        self.maps = maps
        total = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in maps[0].dense)
        self.stride = math.ceil(total / POSITIONS)

    def __iter__(self) -> Iterator[tuple[Maps, Maps]]:
        # One image at a time: maps at quarter size, side by side for all stages, are large.
        for batch in range(len(self.maps[0].dense)):
            for i in range(len(self.maps[0].dense[batch])):
                yield (
                    [pairs.dense[batch][i : i + 1] for pairs in self.maps],
                    [pairs.pruned[batch][i : i + 1] for pairs in self.maps],
                )

    def rows(self, maps: Tensor) -> Tensor:
        # A stride that shares a factor with the width would never see some columns.
        stride, width = self.stride, maps.shape[3]
        while math.gcd(stride, width) > 1:
            stride += 1
        return to_tokens(maps).flatten(0, 1)[::stride]  # n C


def _layers(products: nn.ModuleList) -> list[nn.Linear]:
    return [product for product in products if isinstance(product, nn.Linear)]


def _fuse_columns(dense: DecodeHead, removed: Removed) -> Tensor:
    """Returns what fuses the branches, D by all their channels that are kept, in the order of `_read`."""
    if dense.fuses is None:
        assert dense.fuse is not None
        return dense.fuse.weight.flatten(1)[
            :, kept(removed, "decode_head.fuse", "in", dense.fuse)
        ].double()

    # A branch's channels that were removed have no columns any more.
    columns = []
    for i, fuse in enumerate(_layers(dense.fuses)):
        columns.append(fuse.weight[:, kept(removed, f"decode_head.fuses.{i}", "in", fuse)])
    return torch.cat(columns, dim=1).double()


def _read(head: DecodeHead, maps: Maps) -> Tensor:
    """Returns what is fused, upsampled and side by side."""
    # Folded heads fuse the stages' maps themselves, others what their branches put out. The
    # published head concatenates the deepest stage first.
    if head.fuse is not None or head.fuses is not None:
        maps = [head.hidden(i, x) for i, x in enumerate(maps)]
    resized = [DecodeHead._resize(x, maps[0].shape[2:]) for x in maps]
    return torch.cat(resized if head.fuse is None else resized[::-1], dim=1)


def _fused_rows(dense: DecodeHead, pruned: DecodeHead, stays: Tensor, pairs: _Sampled) -> Rows:
    """Yields what the pruned head fuses, with the dense sum's channels that are kept."""
    for old, new in pairs:
        yield pairs.rows(_read(pruned, new)), pairs.rows(dense.fused(old))[:, stays]


def _observed(rows: Rows) -> tuple[Moments, Tensor]:
    """Returns the moments of rows of what is read and what is wanted, and the variance of the latter."""
    # Variance is the mean square less the squared mean, channel by channel.
    moments = Moments()
    squares: list[Tensor] = []
    for x, y in rows:
        moments.add(x, y)
        squares.append(y.double().square().sum(0))

    return moments, torch.stack(squares).sum(0) / moments.count - moments.means[1].square()


def _spread(weight: Tensor, moments: Moments) -> Tensor:
    """Returns the variance of what the product puts out."""
    # The diagonal of W C W^T, with C (p p) the covariance of what the product reads.
    return (weight @ moments.covariances[0] * weight).sum(1)


@torch.no_grad()
def _assign_fused(pruned: DecodeHead, weight: Tensor) -> None:
    if pruned.fuse is not None:
        pruned.fuse.weight.copy_(weight.view_as(pruned.fuse.weight))
        return

    # Solved as one matrix for all stages side by side; each stage takes its own columns.
    products = _layers(pruned.summed_products())
    widths = [product.in_features for product in products]
    for product, columns in zip(products, weight.split(widths, dim=1), strict=True):
        product.weight.copy_(columns)


@torch.no_grad()
def _repair_branches(
    dense: DecodeHead,
    pruned: DecodeHead,
    weights: list[Tensor],
    removed: Removed,
    maps: list[Pairs],
    damping: float,
) -> None:
    """Repairs each branch for what the dense one puts out.

    Where a BatchNorm follows, that takes the bias and the change of variance.
    """
    zipped = zip(_layers(dense.branches), _layers(pruned.branches), weights, maps, strict=True)
    for i, (old, new, weight, pairs) in enumerate(zipped):
        # Targets are the dense branch's outputs before any norm, at the channels that are
        # kept (n D').
        stays = kept(removed, f"decode_head.branches.{i}", "out", old)
        rows = (
            (flat(to_tokens(x)), flat(old(to_tokens(x_dense))[..., stays]))
            for x_dense, x in pairs
        )
        if dense.branch_norms is None or pruned.branch_norms is None:
            assign(new, *fit(rows, weight[stays], damping))
            continue

        # A branch before a BatchNorm has no bias: the norm's mean takes the one that was
        # solved.
        moments, variance = _observed(rows)
        solved, bias = moments.solve(weight[stays], damping)
        new.weight.copy_(solved)

        norm, new_norm = dense.branch_norms[i], pruned.branch_norms[i]
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(new_norm, nn.BatchNorm2d)
        _move_statistics(norm, new_norm, stays, bias, variance, _spread(solved, moments))


@torch.no_grad()
def _move_statistics(
    dense: nn.BatchNorm2d,
    pruned: nn.BatchNorm2d,
    stays: Tensor,
    bias: Tensor,
    before: Tensor,
    after: Tensor,
) -> None:
    """Sets the BatchNorm so that the logits stay: its mean takes what the pruned sum lacks, its variance follows.

    `bias` is what the pruned sum lacks, `before` and `after` the variances of the dense and of the pruned sum.
    """
    # The training images' variance is not seen again; it is scaled by the ratio that these
    # images show. A channel without any variance here keeps the dense one.
    old, new = dict(dense.named_buffers()), dict(pruned.named_buffers())
    variance = old["running_var"][stays].double()
    moved = torch.where(before > 0.0, variance * after / before.clamp_min(1e-300), variance)

    # BatchNorm subtracts its mean, so that a lower mean adds what the sum lacks.
    new["running_mean"].copy_(old["running_mean"][stays].double() - bias)
    new["running_var"].copy_(moved)

    # The gain makes up for the other variance.
    pruned.weight.copy_(
        dense.weight[stays].double() * ((moved + dense.eps) / (variance + dense.eps)).sqrt()
    )
    pruned.bias.copy_(dense.bias[stays])
