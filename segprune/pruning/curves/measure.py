"""A curve per group from a few images without labels: what is lost after the repair, at each width.

Two passes over the images. The first collects moments of what passes at every place, from which follows what least
squares cannot give back there (losses.py). The second, over other images, so that what was fitted to the first is not
believed, tells what such an error does to the logits: gradients of random directions of them (places.py), position by
position with the signs they have, for errors of neighbours add up or cancel.

Not counted is what layers further on make up for, and what groups do together. On photographs (docs/log.md) the two
nearly cancel: the sum of all curves at a plan was within a fifth of the divergence measured after the repair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from segprune.model import SegFormer
from segprune.pruning.curves.losses import Losses, Statistics, work_out_losses
from segprune.pruning.curves.places import Place, find_places, probe_logits, watch
from segprune.pruning.groups import Group
from segprune.pruning.repair import DAMPING
from segprune.pruning.trace import eval_mode
from segprune.timing import tf32_products

NUM_WIDTHS = 20  # widths of a group that are measured; straight lines between them
PROBES = 4  # random directions of the logits, per image
UNSEEN = 3  # every third image is for the second pass
CROP = 288  # pixels of a side, at most, that are looked at of an image: gradients take memory and time
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Curve:
    """`losses[i]` (nats per pixel) at `widths[i]` slots, ascending; 0 at the full width.

    `order` has the channels, least needed first, where it matters which ones are kept.
    """

    widths: tuple[int, ...]
    losses: tuple[float, ...]
    order: tuple[int, ...] | None = None

    def at(self, width: int) -> float:
        """Returns the loss at a width between the least and the full one, by the chord."""
        return float(np.interp(width, self.widths, self.losses))


def measure_curves(
    model: SegFormer,
    groups: Sequence[Group],
    batches: Sequence[Tensor],
    widths: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Curve]:
    """Returns the groups' curves.

    `batches` are normalised images B 3 H W; `widths` are what each group may take, ascending, its full width last. The
    model is left as it was; `progress` is called with the images done and their number.
    """
    places = find_places(model, groups)
    generator = torch.Generator().manual_seed(seed)
    images: list[Tensor] = []
    for batch in batches:
        images.extend(_crop(image, generator) for image in batch.split(1))

    fitted, unseen = _split(images)
    total = len(fitted) + len(unseen)

    def step(done: int) -> None:
        if progress is not None:
            progress(done, total)

    steps = [_some(allowed) for allowed in widths]
    with eval_mode(model), torch.enable_grad(), tf32_products(False):
        # First pass: moments of what passes at each place, and of the gradient there.
        statistics = {place: Statistics() for place in places}
        with watch(model, places) as passing:
            for i, image in enumerate(fitted):
                logits = _logits_with_graph(model, image)
                gradients = probe_logits(logits, passing, generator)
                for place, item in passing.items():
                    statistics[place].add(model, place, item, gradients[place])
                step(i + 1)

        # What least squares cannot give back: a linear map per place and width.
        losses = []
        for g, group in enumerate(groups):
            here = [place for place in places if place.group == g]
            known = [statistics[place] for place in here]
            losses.append(work_out_losses(model, group, here, known, steps[g], DAMPING))
        means = {
            place: statistics[place].moments.means[0]
            for place in places
            if place.kind != "products"
        }
        lost = _by_place(places, losses)

        # Second pass, over other images: how far the errors of
        # each width move the logits, along random directions.
        samples: list[list[Tensor]] = [[] for _ in groups]
        with watch(model, places) as passing:
            for i, image in enumerate(unseen):
                logits = _logits_with_graph(model, image)
                for _ in range(PROBES):
                    gradients = probe_logits(logits, passing, generator)
                    changes = [torch.zeros(len(ws), dtype=torch.float64) for ws in steps]
                    for place, item in passing.items():
                        x = item.x[0]
                        if place in means:
                            x = x - means[place].to(x.dtype)  # biases are free

                        # The sum over positions of gradient · (lost @ x) is lost ·
                        # (gradientᵀ x), so one product serves all widths.
                        product = gradients[place][0].T @ x  # out in
                        changes[place.group] += (
                            (lost[place] * product).sum((1, 2)).double().cpu()
                        )
                    for g, change in enumerate(changes):
                        samples[g].append(change)
                step(len(fitted) + i + 1)

    return [
        _curve(ws, torch.stack(rows), item.order)
        for ws, rows, item in zip(steps, samples, losses, strict=True)
    ]


def _split(images: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Keeps every third image for the second pass; of fewer than three, all serve for both."""
    if len(images) < UNSEEN:
        return images, images
    return [x for i, x in enumerate(images) if (i + 1) % UNSEEN], images[UNSEEN - 1 :: UNSEEN]


def _logits_with_graph(model: SegFormer, image: Tensor) -> Tensor:
    # The image takes a gradient, so that there is a graph where all weights are frozen.
    return model.parts(image.detach().requires_grad_())[1]


def _crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """A part of the image 1 3 H W, at a random place, where it is larger than `CROP`."""
    for dim in (2, 3):
        rest = image.shape[dim] - CROP
        if rest > 0:
            start = int(torch.randint(rest + 1, (), generator=generator))
            image = image.narrow(dim, start, CROP)
    return image


def _some(widths: Sequence[int]) -> list[int]:
    """At most `NUM_WIDTHS` of them, the first and the last included."""
    picks = np.linspace(0, len(widths) - 1, min(NUM_WIDTHS, len(widths))).round().astype(int)
    return [widths[i] for i in picks]


def _by_place(places: Sequence[Place], losses: Sequence[Losses]) -> dict[Place, Tensor]:
    lost: dict[Place, Tensor] = {}
    for g, item in enumerate(losses):
        here = [place for place in places if place.group == g]
        lost |= zip(here, item.lost, strict=True)
    return lost


def _curve(widths: Sequence[int], changes: Tensor, order: tuple[int, ...] | None) -> Curve:
    """`changes` (samples × widths) are those of one direction of the logits; a narrower group never loses less."""
    # The mean of (Σ gradient · error)² / 2 estimates the divergence, see `probe_logits`.
    losses = 0.5 * changes.square().mean(0).numpy()

    # Samples scatter: from the full width downwards a curve may only rise.
    falling = np.maximum.accumulate(losses[::-1])[::-1]
    return Curve(tuple(widths), tuple(float(loss) for loss in falling), order)
