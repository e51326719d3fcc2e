"""Branches taken out of a network, and their mean outputs kept as a bias."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from segprune.model import Attention, Block, SegFormer, drop_path_rates
from segprune.pruning.depth.branches import singles, without
from segprune.pruning.images import checked_images
from segprune.pruning.trace import eval_mode
from segprune.spec import block_name


@torch.no_grad()
def remove(
    model: SegFormer, names: Collection[str], batches: Iterable[Tensor] = ()
) -> SegFormer:
    """A new network without these branches; a block that loses both goes, and those behind it move up.

    With `batches` (normalised images B 3 H W) the mean of what a removed branch puts out on them stays, in the bias of
    what wrote to the stream before: exact for a branch that puts out a constant. Stochastic depth is spread anew over
    the blocks that remain. Refused: a name that is no branch, a stage that would lose all its blocks, images of another
    shape.
    """
    removed = singles(model.spec, names)
    spec = without(model.spec, names)
    images = checked_images(model, batches)
    means = _mean_outputs(model, removed, images) if images else {}

    result = copy.deepcopy(model)
    for i, stage in enumerate(result.list_stages()):
        # The bias of what wrote to the residual stream last takes the mean of a branch that is removed behind it.
        bias = stage.patch_embed.norm.bias
        for j, block in enumerate(stage.list_blocks()):
            for kind, _, module in block.list_branches():
                name = f"{block_name(i, j)}.{kind}"
                if name in removed:
                    if name in means:
                        bias.add_(means[name])
                    _drop(block, kind)
                else:
                    # A branch that is kept becomes the last one that wrote to the stream.
                    bias = (module.proj if isinstance(module, Attention) else module.fc2).bias

        # Blocks that have lost both branches disappear.
        stage.blocks = nn.ModuleList(
            block for block in stage.list_blocks() if block.list_branches()
        )

    # Stochastic depth is spread anew over the blocks that remain.
    rates = iter(drop_path_rates(spec))
    for stage in result.list_stages():
        for block in stage.list_blocks():
            block.drop_path.rate = next(rates)

    result.spec = spec
    return result


def _drop(block: Block, kind: str) -> None:
    if kind == "attn":
        block.norm1, block.attn = None, None
    else:
        block.norm2, block.mlp = None, None


def _mean_outputs(
    model: SegFormer, names: Collection[str], images: list[Tensor]
) -> dict[str, Tensor]:
    """What each single branch puts out, averaged over images and positions; in float64."""
    # Hooks add up every branch's outputs in one pass over the images; no map is stored.
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def watcher(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = output.double().flatten(0, -2)  # B N C -> B·N C
            sums[name] = sums[name] + rows.sum(0) if name in sums else rows.sum(0)
            counts[name] += len(rows)

        return watch

    hooks = [model.get_submodule(name).register_forward_hook(watcher(name)) for name in names]
    try:
        with eval_mode(model):
            for x in images:
                model.encoder(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sums[name] / counts[name] for name in names}
