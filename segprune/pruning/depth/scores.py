"""What each branch does: how far the logits move without it, on images or on noise that stands in for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from segprune.model import SegFormer, to_map
from segprune.pruning.depth.branches import Branch, branches
from segprune.pruning.images import checked_images
from segprune.pruning.trace import eval_mode
from segprune.spec import RGB, block_name
from segprune.timing import tf32_products

BlockIndex = tuple[int, int]  # stage, block
Size = tuple[int, int]  # height and width of the map that tokens come from


@torch.no_grad()
def branch_scores(
    model: SegFormer,
    batches: Iterable[Tensor],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Returns by name how far the classes' probabilities move when this branch alone is skipped; 0 or above.

    `batches` are normalised images B 3 H W, without labels. Per pixel of the logits before the last upsampling: the
    Kullback-Leibler divergence from the network's own probabilities in nats. A branch's mean output
    counts although `remove` may keep it: rankings that left it out chose worse. In evaluation mode; what runs before a
    branch runs once for all that come after it. `progress` is called with the blocks done, those of every batch, and
    their number. Refused: no image, images of another shape.
    """
    images = checked_images(model, batches)
    if not images:
        raise ValueError(
            "Scoring branches needs images, and there are none; give a few dozen, labels are not needed."
        )

    # Branches of one block share what runs before it.
    by_block: dict[BlockIndex, list[Branch]] = {}
    for branch in branches(model.spec):
        by_block.setdefault((branch.stage, branch.block), []).append(branch)
    totals = dict.fromkeys((branch.name for branch in branches(model.spec)), 0.0)

    done, steps = 0, len(images) * len(by_block)
    with eval_mode(model), tf32_products(False):
        for x in images:
            # From the stream before a block: run it without the branch, then all that comes
            # after it.
            dense = model.parts(x)[1]
            for place, tokens, maps, size in _walk(model, x):
                for branch in by_block[place]:
                    stream = _skipping(model, branch, tokens, size)
                    totals[branch.name] += len(x) * _divergence(
                        dense, _finish(model, place, stream, maps, size)
                    )
                done += 1
                if progress is not None:
                    progress(done, steps)

    # The mean over images, whatever the sizes of their batches.
    count = sum(len(x) for x in images)
    return {name: total / count for name, total in totals.items()}


def _walk(
    model: SegFormer, x: Tensor
) -> Iterator[tuple[BlockIndex, Tensor, list[Tensor], Size]]:
    """Yields before every block: where, the stream B N C, the maps of the stages behind, the size."""
    maps: list[Tensor] = []
    for i, stage in enumerate(model.list_stages()):
        tokens, height, width = stage.patch_embed(x)
        for j, block in enumerate(stage.list_blocks()):
            yield (i, j), tokens, maps, (height, width)
            tokens = block(tokens, height, width)
        x = to_map(stage.norm(tokens), height, width)

        # A new list, since the old one was handed out.
        maps = [*maps, x]


def _skipping(model: SegFormer, branch: Branch, tokens: Tensor, size: Size) -> Tensor:
    """Returns the stream behind the branch's block without what the branch adds to it."""
    name = block_name(branch.stage, branch.block)
    block = model.list_stages()[branch.stage].list_blocks()[branch.block]
    for kind, norm, module in block.list_branches():
        if f"{name}.{kind}" not in branch.singles:
            tokens = tokens + module(norm(tokens), *size)
    return tokens


def _finish(
    model: SegFormer, place: BlockIndex, tokens: Tensor, maps: list[Tensor], size: Size
) -> Tensor:
    """Returns the logits B K H/4 W/4 that come of the stream behind the block at `place`."""
    stages = model.list_stages()
    stage = stages[place[0]]
    for block in stage.list_blocks()[place[1] + 1 :]:
        tokens = block(tokens, *size)

    # Maps of the stages before are the dense ones; this stage's and the later ones change.
    maps = [*maps, to_map(stage.norm(tokens), *size)]
    for later in stages[place[0] + 1 :]:
        maps.append(later(maps[-1]))
    logits: Tensor = model.decode_head(maps)
    return logits


def _divergence(dense: Tensor, other: Tensor) -> float:
    # KL(dense || other), the sum over classes, averaged over pixels; rounding may make it
    # negative.
    wanted, actual = (logits.double().log_softmax(1) for logits in (dense, other))
    return float((wanted.exp() * (wanted - actual)).sum(1).mean().clamp_min(0.0))


def noise(
    input_shape: Size, count: int = 32, seed: int = 0, channels: int = RGB
) -> list[Tensor]:
    """Returns one batch B C H W to give in place of images where there are none, on the CPU.

    Structure of all sizes, as photographs have it: a spectrum that falls with one over the frequency, colours that
    agree more than they differ, standardised. On b0s trained on generated pictures it ranked branches much as these do,
    and its means were better than none; white noise did worse at both.
    """
    height, width = input_shape
    generator = torch.Generator().manual_seed(seed)

    # White noise, divided by the frequency in Fourier space: amplitude 1/f, power 1/f².
    white = torch.randn(count, channels, height, width, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)  # the mean, as strong as the longest wave
    pink = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))

    # The colours agree more than they differ.
    pink = pink + pink.mean(1, keepdim=True) * 3.0
    return [(pink - pink.mean()) / pink.std()]
