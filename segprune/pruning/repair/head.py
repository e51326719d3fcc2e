"""The decode head re-solved: what is fused, together for all stages on the sum; BatchNorm; classifier.

Branches that are not folded come first, each by itself. BatchNorm takes the mean shift, as in "Data-Free Quantization
Through Weight Equalization and Bias Correction" (arXiv 1906.04721), and its variance moves with that of what is fused,
the gain making up for it: the logits stay, and training goes on from statistics that are true.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from segprune.model import DecodeHead, to_map, to_tokens
from segprune.pruning.repair.basis import Reads
from segprune.pruning.repair.layers import Pairs, Removed, assign, fit_layer, flat, kept
from segprune.pruning.repair.moments import Moments, fit

POSITIONS = 2**15  # of all images' quarter-size maps are looked at; neighbours there say much the same
Maps = list[Tensor]  # one per stage, 1 C H W


def repair_head(
    dense: DecodeHead, pruned: DecodeHead, into: list[Reads], removed: Removed, maps: list[Pairs], damping: float
) -> None:
    """In place; `maps` (one per stage, B C H W) are what both read, `into` how."""
    pairs = _Sampled(maps)
    stays = kept(removed, "decode_head.classifier", "in", dense.classifier)
    weights = [how.columns(branch.weight).double() for how, branch in zip(into, _branches(dense), strict=True)]
    if pruned.fuse is None or dense.fuse is None:
        weight = torch.cat(weights, dim=1)[stays]
    else:
        _repair_branches(dense, pruned, weights, removed, maps, damping)
        weight = dense.fuse.weight.flatten(1)[stays][:, kept(removed, "decode_head.fuse", "in", dense.fuse)].double()
    moments, variance = _moments(dense, pruned, stays, pairs)
    weight, bias = moments.solve(weight, damping)
    _assign_fused(pruned, weight)
    _move_statistics(dense.norm, pruned.norm, stays, bias, variance, (weight @ moments.covariances[0] * weight).sum(1))
    rows = (
        (pairs.rows(pruned.act(pruned.norm(_fused(pruned, new)))), pairs.rows(_logits(dense, old)))
        for old, new in pairs
    )
    fit_layer(pruned.classifier, rows, dense.classifier.weight[:, stays], damping)


class _Sampled:
    """The images one by one, and of their maps at quarter size every so manieth position."""

    def __init__(self, maps: list[Pairs]) -> None:
        self.maps = maps
        total = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in maps[0].dense)
        self.stride = math.ceil(total / POSITIONS)

    def __iter__(self) -> Iterator[tuple[Maps, Maps]]:
        for batch in range(len(self.maps[0].dense)):
            for i in range(len(self.maps[0].dense[batch])):
                yield (
                    [pairs.dense[batch][i : i + 1] for pairs in self.maps],
                    [pairs.pruned[batch][i : i + 1] for pairs in self.maps],
                )

    def rows(self, maps: Tensor) -> Tensor:
        stride, width = self.stride, maps.shape[3]
        while math.gcd(stride, width) > 1:
            stride += 1  # else whole columns would never be seen
        return flat(to_tokens(maps))[::stride]


def _branches(head: DecodeHead) -> list[nn.Linear]:
    return [branch for branch in head.branches if isinstance(branch, nn.Linear)]


def _resized(maps: Maps) -> Maps:
    return [DecodeHead._resize(x, maps[0].shape[2:]) for x in maps]


def _branched(head: DecodeHead, maps: Maps) -> Maps:
    return _resized([to_map(b(to_tokens(x)), *x.shape[2:]) for b, x in zip(_branches(head), maps, strict=True)])


def _fused(head: DecodeHead, maps: Maps) -> Tensor:
    branched = _branched(head, maps)
    if head.fuse is None:
        return branched[0] + branched[1] + branched[2] + branched[3]
    fused: Tensor = head.fuse(torch.cat(branched[::-1], dim=1))
    return fused


def _logits(head: DecodeHead, maps: Maps) -> Tensor:
    logits: Tensor = head.classifier(head.act(head.norm(_fused(head, maps))))
    return logits


def _moments(dense: DecodeHead, pruned: DecodeHead, stays: Tensor, pairs: _Sampled) -> tuple[Moments, Tensor]:
    """Of what is fused, upsampled and side by side, with the dense sum's channels that stay; and these' variance."""
    moments = Moments()
    squares = torch.zeros(len(stays), dtype=torch.float64, device=stays.device)
    for old, new in pairs:
        parts = _resized(new) if pruned.fuse is None else _branched(pruned, new)[::-1]
        wanted = pairs.rows(_fused(dense, old))[:, stays]
        moments.add(pairs.rows(torch.cat(parts, dim=1)), wanted)
        squares += wanted.double().square().sum(0)
    return moments, squares / moments.count - moments.means[1].square()


@torch.no_grad()
def _assign_fused(pruned: DecodeHead, weight: Tensor) -> None:
    if pruned.fuse is not None:
        pruned.fuse.weight.copy_(weight.view_as(pruned.fuse.weight))
        return
    widths = [branch.in_features for branch in _branches(pruned)]
    for branch, columns in zip(_branches(pruned), weight.split(widths, dim=1), strict=True):
        branch.weight.copy_(columns)


def _repair_branches(
    dense: DecodeHead, pruned: DecodeHead, weights: list[Tensor], removed: Removed, maps: list[Pairs], damping: float
) -> None:
    zipped = zip(_branches(dense), _branches(pruned), weights, maps, strict=True)
    for i, (old, new, weight, pairs) in enumerate(zipped):
        stays = kept(removed, f"decode_head.branches.{i}", "out", old)
        rows = ((flat(to_tokens(x)), flat(old(to_tokens(x_dense))[..., stays])) for x_dense, x in pairs)
        assign(new, *fit(rows, weight[stays], damping))


@torch.no_grad()
def _move_statistics(
    dense: nn.BatchNorm2d, pruned: nn.BatchNorm2d, stays: Tensor, bias: Tensor, before: Tensor, after: Tensor
) -> None:
    """`bias` is what the pruned sum lacks, `before` and `after` the variances of the dense and of the pruned sum."""
    old, new = dict(dense.named_buffers()), dict(pruned.named_buffers())
    variance = old["running_var"][stays].double()
    moved = torch.where(before > 0.0, variance * after / before.clamp_min(1e-300), variance)
    new["running_mean"].copy_(old["running_mean"][stays].double() - bias)
    new["running_var"].copy_(moved)
    pruned.weight.copy_(dense.weight[stays].double() * ((moved + dense.eps) / (variance + dense.eps)).sqrt())
    pruned.bias.copy_(dense.bias[stays])
