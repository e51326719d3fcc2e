"""A network scored on a data set: every image counted once, in its own pixels, whatever the network's input size.

Worker processes read and resize images a batch ahead; classes are chosen and counted on the device. Only counts are
kept, so the memory does not depend on the number of images. `EvalMode` says how an image is put through the network,
and `metrics` what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from segprune.data import Sample
from segprune.data.loading import load_batches
from segprune.inference.label_maps import (
    EvalMode,
    Predict,
    Prepared,
    label_maps,
    make_network,
    prepare,
)
from segprune.inference.metrics import Score, Tally, score, shard
from segprune.spec import Preprocessing, preprocessing_of

__all__ = [
    "EvalMode",
    "Predict",
    "Progress",
    "Score",
    "Tally",
    "evaluate",
    "score",
    "shard",
    "tallies",
]

Progress = Callable[[int, int], None]


def evaluate(
    predict: Predict,
    samples: Sequence[Sample],
    num_classes: int,
    how: EvalMode,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    num_workers: int = 0,
    preprocessing: Preprocessing | None = None,
    progress: Progress | None = None,
) -> Score:
    """Returns the score of `predict`, a network or any function from pixels to logits, on the samples.

    A network says its `preprocessing` itself, and so does an exported file; any other function gets ImageNet's.
    A network is scored in eval mode and comes back in the mode it was in. `progress` is called with (images done,
    images in all). ValueError if no pixel has a label.
    """
    # Counts are integers: added up batch by batch, they give the exact total.
    total = Tally(num_classes, boundary=how.boundary, device=device).counts
    done = 0

    for counts in tallies(
        predict,
        samples,
        num_classes,
        how,
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
        preprocessing=preprocessing,
    ):
        total += counts.sum(0)
        done += len(counts)
        if progress is not None:
            progress(done, len(samples))

    return score(total, num_classes, done)


def tallies(
    predict: Predict,
    samples: Sequence[Sample],
    num_classes: int,
    how: EvalMode,
    *,
    device: torch.device | str,
    batch_size: int,
    num_workers: int,
    preprocessing: Preprocessing | None = None,
) -> Iterator[Tensor]:
    """Yields batch by batch a `Tally`'s counts, a row for each image, to be added up and given to `score`.

    Nothing is drawn from torch's global generator.
    """
    # A generator of its own: the loader would draw its seed from torch's global one.
    batches = load_batches(
        list(samples),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=partial(_load_batch, how=how),
        generator=torch.Generator(),
    )
    preprocessing = preprocessing or preprocessing_of(predict)
    network = make_network(predict, num_classes, device, batch_size, preprocessing)
    with _in_eval_mode(predict):
        for images, labels in batches:
            rows = []
            # Not around the yield, which would leave inference mode on in the caller.
            with torch.inference_mode():
                for predicted, truth in zip(
                    label_maps(network, images, how), labels, strict=True
                ):
                    tally = Tally(num_classes, boundary=how.boundary, device=device)
                    tally.update(predicted, truth.to(device))
                    rows.append(tally.counts)
            yield torch.stack(rows)


def _load_batch(
    samples: Sequence[Sample], how: EvalMode
) -> tuple[list[Prepared], list[Tensor]]:
    images, labels = [], []
    for sample in samples:
        image, mask = sample.load()
        images.append(prepare(image, how))
        labels.append(torch.tensor(mask))
    return images, labels


@contextmanager
def _in_eval_mode(predict: Predict) -> Iterator[None]:
    if not isinstance(predict, nn.Module):
        yield
        return
    # In train mode dropout would draw, and BatchNorm would learn from what is scored.
    was_training = predict.training
    predict.eval()
    try:
        yield
    finally:
        predict.train(was_training)
