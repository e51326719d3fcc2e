"""What each branch does: how far the logits move without it, or, without images, how much it adds to the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segprune.model import Attention, Mlp, SegFormer, to_map
from segprune.pruning.depth.branches import Branch, blocks_of, branches, parts_of, stages_of
from segprune.pruning.depth.removal import images_for, mean_outputs
from segprune.pruning.trace import eval_mode

Distance = Literal["kl", "mse"]
Place = tuple[int, int]  # stage, block
Size = tuple[int, int]  # height and width of the map that tokens come from


@torch.no_grad()
def branch_scores(
    model: SegFormer,
    batches: Iterable[Tensor],
    *,
    distance: Distance = "kl",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """By name, how far the classes' probabilities move when this branch alone puts out its mean; 0 or above.

    `batches` are normalised images B 3 H W, without labels. Per pixel of the logits before the last upsampling: the
    Kullback-Leibler divergence from the network's own probabilities in nats, or the mean square. Branches that put out
    constants score 0. In evaluation mode; what runs before a branch runs once for all that come after it. `progress` is
    called with the blocks done, those of every batch, and their number. Refused: no image, images of another shape, an
    unknown distance.
    """
    if distance not in get_args(Distance):
        raise ValueError(f"Distance {distance!r} is unknown; choose kl or mse.")
    images = images_for(model, batches)
    if not images:
        raise ValueError("Scoring branches needs images, and there are none; give a few dozen, labels are not needed.")
    found = branches(model.spec)
    by_block: dict[Place, list[Branch]] = {}
    for branch in found:
        by_block.setdefault((branch.stage, branch.block), []).append(branch)
    means = mean_outputs(model, [branch.name for branch in found if branch.kind != "block"], images)
    totals = dict.fromkeys((branch.name for branch in found), 0.0)
    done, steps = 0, len(images) * len(by_block)
    with eval_mode(model):
        for x in images:
            dense = model.parts(x)[1]
            for place, tokens, maps, size in _walk(model, x):
                for branch in by_block[place]:
                    stream = _averaged(model, branch, means, tokens, size)
                    totals[branch.name] += len(x) * _far(distance, dense, _finish(model, place, stream, maps, size))
                done += 1
                if progress is not None:
                    progress(done, steps)
    count = sum(len(x) for x in images)
    return {name: total / count for name, total in totals.items()}


def _walk(model: SegFormer, x: Tensor) -> Iterator[tuple[Place, Tensor, list[Tensor], Size]]:
    """Before every block: where, the stream B N C, the maps of the stages behind, the size."""
    maps: list[Tensor] = []
    for i, stage in enumerate(stages_of(model)):
        tokens, height, width = stage.patch_embed(x)
        for j, block in enumerate(blocks_of(stage)):
            yield (i, j), tokens, maps, (height, width)
            tokens = block(tokens, height, width)
        x = to_map(stage.norm(tokens), height, width)
        maps = [*maps, x]


def _averaged(model: SegFormer, branch: Branch, means: Mapping[str, Tensor], tokens: Tensor, size: Size) -> Tensor:
    """The stream behind the branch's block, the branch putting out its mean."""
    name = f"encoder.stages.{branch.stage}.blocks.{branch.block}"
    for kind, norm, module in parts_of(blocks_of(stages_of(model)[branch.stage])[branch.block]):
        single = f"{name}.{kind}"
        tokens = tokens + (means[single].to(tokens) if single in branch.singles else module(norm(tokens), *size))
    return tokens


def _finish(model: SegFormer, place: Place, tokens: Tensor, maps: list[Tensor], size: Size) -> Tensor:
    """The logits B K H/4 W/4 that come of the stream behind the block at `place`."""
    stages = stages_of(model)
    stage = stages[place[0]]
    for block in blocks_of(stage)[place[1] + 1 :]:
        tokens = block(tokens, *size)
    maps = [*maps, to_map(stage.norm(tokens), *size)]
    for later in stages[place[0] + 1 :]:
        maps.append(later(maps[-1]))
    logits: Tensor = model.decode_head(maps)
    return logits


def _far(distance: Distance, dense: Tensor, other: Tensor) -> float:
    wanted, found = (logits.double().log_softmax(1) for logits in (dense, other))
    if distance == "mse":
        return float((wanted.exp() - found.exp()).square().mean())
    return float((wanted.exp() * (wanted - found)).sum(1).mean().clamp_min(0.0))


@torch.no_grad()
def weight_scores(model: SegFormer) -> dict[str, float]:
    """By name, the share of the stream's energy behind a branch that the branch wrote, as the weights suggest; no data.

    A heuristic. LayerNorms put out independent normal channels with their gain and bias as deviation and mean;
    attention looks at one key; maps are smooth, so a depth-wise filter multiplies by the sum of its weights. The stream
    starts as the patch embedding's LayerNorm, and branches add their energies (sums over channels of mean square). A
    block scores what its two branches do together.
    """
    scores: dict[str, float] = {}
    for i, stage in enumerate(stages_of(model)):
        norm = stage.patch_embed.norm
        stream = float((norm.weight.double().square() + norm.bias.double().square()).sum())
        for j, block in enumerate(blocks_of(stage)):
            name = f"encoder.stages.{i}.blocks.{j}"
            energies = {f"{name}.{kind}": _energy(norm, module) for kind, norm, module in parts_of(block)}
            total = sum(energies.values())
            for single, energy in energies.items():
                stream += energy
                scores[single] = energy / stream
            if len(energies) == 2:
                scores[name] = total / stream
    return scores


Normal = tuple[Tensor, Tensor]  # mean and variance of each channel


def _energy(norm: nn.LayerNorm, module: Attention | Mlp) -> float:
    """The mean square of what the branch puts out, summed over its channels."""
    x = _put_out(norm)
    if isinstance(module, Attention):
        x = _through(module.v, _put_out(module.norm) if module.norm is not None else x)
        mean, variance = _through(module.proj, x)
    else:
        mean, variance = _through(module.fc1, x)
        gain = module.dwconv.weight.double().sum((1, 2, 3))
        assert module.dwconv.bias is not None
        mean, variance = gain * mean + module.dwconv.bias.double(), gain.square() * variance
        mean, variance = _through(module.fc2, _activated(module, mean, variance))
    return float((mean.square() + variance).sum())


def _put_out(norm: nn.LayerNorm) -> Normal:
    return norm.bias.double(), norm.weight.double().square()


def _through(layer: nn.Linear, x: Normal) -> Normal:
    weight = layer.weight.double()
    return F.linear(x[0], weight, layer.bias.double()), weight.square() @ x[1]


def _activated(module: Mlp, mean: Tensor, variance: Tensor) -> Normal:
    """Of the activation's output, by an even spread of quantiles."""
    steps = (torch.arange(64, dtype=torch.float64, device=mean.device) + 0.5) / 64
    values = module.act(mean + variance.sqrt() * torch.special.ndtri(steps)[:, None])
    return values.mean(0), values.var(0, correction=0)
