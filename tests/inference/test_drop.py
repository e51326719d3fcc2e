"""What a network loses, on a part of the images and on all: against scores of the same images, none seen twice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segprune.data import MEAN, STD
from segprune.inference.drop import DropScorer
from segprune.inference.evaluate import EvalMode, evaluate

HOW = EvalMode(input_shape=(16, 16))


@dataclass
class Drawn:
    """An image whose red channel is its class, and a count of how often it was read."""

    seed: int
    reads: int = 0

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        self.reads += 1
        labels = np.random.default_rng(self.seed).integers(0, 3, (16, 16), dtype=np.uint8)
        return (labels[..., None] * 100).repeat(3, 2), labels


class Reader(nn.Module):
    """Reads the class off the red channel, but for a share of pixels, more of them where the image is dark."""

    def __init__(self, wrong: float) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, pixels: Tensor) -> Tensor:
        red = ((pixels[:, 0] * STD[0] + MEAN[0]) * 2.55).round().long().clamp(0, 2)
        rows = torch.arange(16)[:, None] < round(self.wrong * 16) + (red[:, :1, :1] == 0)
        red = torch.where(rows if self.wrong else torch.tensor(False), 0, red)
        return nn.functional.one_hot(red, 3).permute(0, 3, 1, 2).float()


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    monkeypatch.setattr("segprune.inference.drop.LEAST_PART", 8)
    return [Drawn(seed) for seed in range(40)]


def test_on_all_images_it_is_the_difference_of_two_scores(samples: list[Drawn]) -> None:
    dense, pruned = Reader(0.0), Reader(0.3)
    scorer = DropScorer(dense, samples, 3, HOW)
    drop = scorer.drop(pruned, True)
    before, after = (evaluate(network, samples, 3, HOW) for network in (dense, pruned))
    assert drop.points == pytest.approx(100 * (before.miou - after.miou))
    assert (drop.margin, drop.num_images) == (0.0, 40)
    assert (scorer.score(), scorer.score(pruned)) == (before, after)


def test_a_part_comes_first_and_no_image_is_seen_twice(samples: list[Drawn]) -> None:
    scorer = DropScorer(Reader(0.0), samples, 3, HOW)
    assert [sample.reads for sample in samples] == [1] * 40

    pruned = Reader(0.3)
    part = scorer.drop(pruned, False)
    assert part.num_images == scorer.num_part == 8
    assert sum(sample.reads for sample in samples) == 48
    whole = scorer.drop(pruned, True)
    assert [sample.reads for sample in samples] == [2] * 40
    assert part.margin > 0.0
    assert abs(part.points - whole.points) <= 2 * part.margin


def test_the_part_is_random_but_fixed_by_the_seed(samples: list[Drawn]) -> None:
    parts = []
    for seed in (1, 1, 2):
        scorer = DropScorer(Reader(0.0), samples, 3, HOW, seed=seed)
        parts.append([sample.seed for sample in scorer.samples[: scorer.num_part]])
    assert parts[0] == parts[1] != parts[2]
    assert parts[0] != list(range(8))


def test_the_margin_holds_as_often_as_it_says(samples: list[Drawn]) -> None:
    pruned, inside = Reader(0.3), []
    for seed in range(20):
        scorer = DropScorer(Reader(0.0), samples, 3, HOW, seed=seed)
        part = scorer.drop(pruned, False)
        inside.append(abs(part.points - scorer.drop(pruned, True).points) <= part.margin)
    assert sum(inside) >= 17
