"""The decode head re-solved: all stages' products together on their sum, BatchNorm, classifier."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from segprune.model import DecodeHead, to_map, to_tokens
from segprune.pruning.repair.basis import Reads
from segprune.pruning.repair.layers import Pairs, Removed, assign, fit_layer, flat, kept
from segprune.pruning.repair.moments import Moments


def repair_head(
    dense: DecodeHead, pruned: DecodeHead, into: list[Reads], removed: Removed, maps: list[Pairs], damping: float
) -> None:
    """In place; `maps` (one per stage, B C H W) are what both read."""
    stays = kept(removed, "decode_head.classifier", "in", dense.classifier)
    weights = [how.columns(branch.weight) for how, branch in zip(into, dense.branches, strict=True)]
    if dense.fuse is None:
        weight = torch.cat([w.double() for w in weights], dim=1)[stays]
        moments, variance = _fit_sum(dense, maps, stays, lambda one: torch.cat(_resized(one), dim=1))
        weight, bias = moments.solve(weight, damping)
        with torch.no_grad():
            for branch, columns in zip(pruned.branches, weight.split([b.in_features for b in pruned.branches], 1), strict=True):
                branch.weight.copy_(columns)
    else:
        raise NotImplementedError
    _move_statistics(dense.norm, pruned.norm, stays, bias, (weight @ moments.covariances[0] * weight).sum(1), variance)
    rows = (
        (flat(to_tokens(pruned.act(pruned.norm(_fused(pruned, new))))), flat(to_tokens(_logits(dense, old))))
        for old, new in _image_by_image(maps)
    )
    fit_layer(pruned.classifier, rows, dense.classifier.weight[:, stays], damping)


def _image_by_image(maps: list[Pairs]):
    for b in range(len(maps[0].dense)):
        for i in range(len(maps[0].dense[b])):
            yield [m.dense[b][i : i + 1] for m in maps], [m.pruned[b][i : i + 1] for m in maps]


def _resized(maps: list[Tensor]) -> list[Tensor]:
    return [DecodeHead._resize(x, maps[0].shape[2:]) for x in maps]


def _branched(head: DecodeHead, maps: list[Tensor]) -> list[Tensor]:
    return _resized([to_map(b(to_tokens(x)), *x.shape[2:]) for b, x in zip(head.branches, maps, strict=True)])


def _fused(head: DecodeHead, maps: list[Tensor]) -> Tensor:
    branched = _branched(head, maps)
    if head.fuse is None:
        return torch.stack(branched).sum(0)
    return head.fuse(torch.cat(branched[::-1], dim=1))


def _logits(head: DecodeHead, maps: list[Tensor]) -> Tensor:
    return head.classifier(head.act(head.norm(_fused(head, maps))))


def _fit_sum(dense: DecodeHead, maps: list[Pairs], stays: Tensor, reads: Callable[[list[Tensor]], Tensor]) -> tuple[Moments, Tensor]:
    moments = Moments()
    squares = 0
    for old, new in _image_by_image(maps):
        y = flat(to_tokens(_fused(dense, old)))[:, stays]
        moments.add(flat(to_tokens(reads(new))), y)
        squares = squares + y.double().square().sum(0)
    return moments, squares / moments.count - moments.means[1] ** 2


@torch.no_grad()
def _move_statistics(dense: nn.BatchNorm2d, pruned: nn.BatchNorm2d, stays: Tensor, bias: Tensor, new: Tensor, old: Tensor) -> None:
    mean, variance = dense.running_mean[stays].double(), dense.running_var[stays].double()
    moved = torch.where(old > 0, variance * new / old, variance)
    pruned.running_mean.copy_(mean - bias)
    pruned.running_var.copy_(moved)
    pruned.weight.copy_(dense.weight[stays].double() * ((moved + dense.eps) / (variance + dense.eps)).sqrt())
    pruned.bias.copy_(dense.bias[stays])
