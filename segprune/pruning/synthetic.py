"""Images where none are given: synthetic ones, chosen by what the network remembers of those it was trained with.

The BatchNorm of the decode head holds mean and variance of every channel over the training images. Of several times as
many candidates as are wanted, those are chosen that together come nearest to them ("Learning to See by Looking at
Noise", arXiv 2106.05963, for the images; statistics that a network stores as a witness of its data: "Dreaming to
Distill", arXiv 1912.08795). Candidates are drawn and looked at in small, the chosen ones drawn at full size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from segprune.data.leaves import draw_leaves
from segprune.data.transforms import normalise
from segprune.model import SegFormer
from segprune.pruning.trace import eval_mode
from segprune.spec import preprocessing_of_drawn
from segprune.timing import tf32_products

NUM_IMAGES = 64
CANDIDATES = 4  # for each image that is wanted
SMALL = 192  # pixels of a candidate's shorter side, at most
BATCH = 8


@torch.no_grad()
def synthetic_images(
    model: SegFormer,
    size: tuple[int, int],
    *,
    count: int = NUM_IMAGES,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Returns batches of `count` normalised images of `size` (H, W) in all, on the model's device.

    `progress` is called with the candidates looked at and their number. The same arguments give the same images.
    """
    parameter = model.decode_head.classifier.weight

    # Candidates are small copies of the wanted size, at least 32 pixels: the encoder's stride.
    scale = min(1.0, SMALL / min(size))
    small = (max(32, round(size[0] * scale)), max(32, round(size[1] * scale)))
    total = count * CANDIDATES

    def draw(indices: list[int], shape: tuple[int, int]) -> Tensor:
        channels, own = model.spec.in_channels, preprocessing_of_drawn(model.spec)
        drawn = [draw_leaves(seed, index, shape, channels) for index in indices]
        images = [normalise(image, own) for image in drawn]
        return torch.stack(images).to(parameter.device, parameter.dtype)

    # For every candidate: mean and mean square of what the head's BatchNorm reads, N D.
    means, squares = [], []
    with eval_mode(model), tf32_products(False):
        for start in range(0, total, BATCH):
            candidates = draw(list(range(start, min(start + BATCH, total))), small)
            fused = model.decode_head.fused(model.encoder(candidates)).double()  # B D H/4 W/4
            means.append(fused.mean((2, 3)))
            squares.append(fused.square().mean((2, 3)))
            if progress is not None:
                progress(min(start + BATCH, total), total)

    chosen = _choose(torch.cat(means), torch.cat(squares), model.decode_head.norm, count)

    # The same index gives the same scene at any size.
    return [draw(chosen[start : start + BATCH], size) for start in range(0, count, BATCH)]


def _choose(means: Tensor, squares: Tensor, norm: nn.BatchNorm2d, count: int) -> list[int]:
    """Picks images one by one, each the one that brings the mean and the variance of all picked nearest to the norm's.

    `means` and `squares` are N D, of each image's channels. Nearness is the divergence of two normal distributions.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None

    # The target: one normal distribution per channel, as training has left it in the norm.
    mean, variance = norm.running_mean.double(), norm.running_var.double() + norm.eps
    chosen: list[int] = []
    total_mean, total_square = torch.zeros_like(mean), torch.zeros_like(mean)

    # Greedy: at pick k every candidate is tried beside the k − 1 that are chosen already.
    for k in range(1, count + 1):
        trial_mean = (total_mean + means) / k
        trial_variance = ((total_square + squares) / k - trial_mean.square()).clamp_min(1e-12)

        # Twice KL(trial || norm) of two normal distributions, summed over the channels: N.
        # No image is chosen twice.
        ratio = trial_variance / variance
        divergence = (ratio - 1.0 - ratio.log() + (trial_mean - mean).square() / variance).sum(
            1
        )
        divergence[chosen] = torch.inf

        best = int(divergence.argmin())
        chosen.append(best)
        total_mean += means[best]
        total_square += squares[best]
    return chosen
