"""Counts and ratios, against torchmetrics, scikit-learn and a boundary IoU written down naively."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score, precision_score, recall_score
from torch import Tensor
from torchmetrics import Accuracy, JaccardIndex, Precision, Recall

from segprune.inference.metrics import Score, Tally, score, shard


def maps(
    seed: int, size: tuple[int, ...], values: tuple[int, ...], noise: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Predictions and labels in blocks of 4 pixels, mostly the same; labels have 255 among them."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice([*values, 255], size=[*size[:-2], -(-size[-2] // 4), -(-size[-1] // 4)])
    labels = blocks.repeat(4, -2).repeat(4, -1)[..., : size[-2], : size[-1]]
    guesses = rng.choice(values, size=labels.shape)
    predicted = np.where((labels == 255) | (rng.random(labels.shape) < noise), guesses, labels)
    return torch.from_numpy(predicted), torch.from_numpy(labels.astype(np.uint8))


def tallied(
    predicted: Tensor, labels: Tensor, num_classes: int, *, boundary: bool = False
) -> Score:
    tally = Tally(num_classes, boundary=boundary)
    for one, truth in zip(predicted, labels, strict=True):
        tally.update(one, truth)
    return score(tally.counts, num_classes, len(labels))


@pytest.mark.parametrize("present", [tuple(range(6)), (0, 2, 5), (3,)])
def test_every_ratio_is_torchmetrics_even_with_absent_classes(present: tuple[int, ...]) -> None:
    predicted, labels = maps(0, (3, 40, 50), present)
    mine = tallied(predicted, labels, 6)
    how = {"task": "multiclass", "num_classes": 6, "ignore_index": 255}
    for theirs, per_class, mean in (
        (JaccardIndex, mine.iou, mine.miou),
        (Recall, mine.recall, mine.mean_accuracy),
        (Precision, mine.precision, None),
    ):
        assert [value is not None for value in per_class] == [k in present for k in range(6)]
        each = theirs(**how, average="none")(predicted, labels.long())
        assert [value or 0.0 for value in per_class] == pytest.approx(each.tolist(), abs=1e-6)
        if mean is not None:
            assert mean == pytest.approx(
                float(theirs(**how, average="macro")(predicted, labels.long())), abs=1e-6
            )
    assert mine.pixel_accuracy == pytest.approx(
        float(Accuracy(**how, average="micro")(predicted, labels.long()))
    )
    assert mine.num_images == 3


def test_the_matrix_is_scikit_learns_and_so_are_the_ratios() -> None:
    predicted, labels = maps(1, (2, 37, 53), (0, 1, 2, 4))
    mine = tallied(predicted, labels, 5)
    valid = labels != 255
    truth, guess = labels[valid].numpy(), predicted[valid].numpy()
    assert np.array_equal(mine.confusion, confusion_matrix(truth, guess, labels=range(5)))
    for theirs, values in (
        (jaccard_score, mine.iou),
        (recall_score, mine.recall),
        (precision_score, mine.precision),
    ):
        expected = theirs(truth, guess, labels=range(5), average=None, zero_division=0)
        assert [value or 0.0 for value in values] == pytest.approx(expected.tolist())


def test_a_class_that_is_only_predicted_has_the_iou_zero_no_recall_and_enters_only_the_mean_iou() -> (
    None
):
    mine = tallied(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]), 3)
    assert (mine.iou, mine.miou) == ((0.5, 0.0, None), 0.25)
    assert (mine.recall, mine.mean_accuracy) == ((0.5, None, None), 0.5)
    assert mine.precision == (1.0, 0.0, None)


def test_rows_are_labels_and_labels_from_num_classes_up_are_ignored() -> None:
    mine = tallied(torch.tensor([[[1, 1, 0, 1]]]), torch.tensor([[[0, 1, 2, 255]]]), 2)
    assert mine.confusion == ((0, 1), (0, 1))


def test_nothing_labelled_is_refused() -> None:
    message = "No pixel has a label, so there is nothing to score; check the masks' values."
    with pytest.raises(ValueError, match=message):
        score(Tally(3).counts, 3, 1)


def test_counts_hold_more_pixels_than_32_bits_and_are_whole() -> None:
    counts = torch.tensor([2**40, 2**40, 0, 2**40])
    assert score(counts, 2, 1).iou == (0.5, 0.5)


def eroded(mask: np.ndarray) -> np.ndarray:
    """Pixels all of whose 3×3 neighbourhood is in the mask; outside of the picture nothing is."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    parts = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.logical_and.reduce(parts)


def naive_boundary_counts(
    predicted: np.ndarray, labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """Intersection and union of each class's rims, its masks eroded d times as the paper's authors do."""
    distance = max(1, round(0.02 * np.hypot(*labels.shape)))
    found = np.zeros((2, num_classes), dtype=np.int64)
    for k in range(num_classes):
        rims = []
        for mask in ((predicted == k) & (labels < num_classes), labels == k):
            inner = mask
            for _ in range(distance):
                inner = eroded(inner)
            rims.append(mask & ~inner)
        found[:, k] = (rims[0] & rims[1]).sum(), (rims[0] | rims[1]).sum()
    return found


@pytest.mark.parametrize("size", [(24, 24), (37, 90), (120, 100), (3, 200), (1, 1)])
def test_boundary_counts_are_the_naive_ones(size: tuple[int, int]) -> None:
    for seed, values in enumerate([(0, 1, 2, 3), (2,), (0, 3)]):
        predicted, labels = maps(seed, size, values, noise=0.02)
        tally = Tally(4, boundary=True)
        tally.update(predicted, labels)
        expected = naive_boundary_counts(predicted.numpy(), labels.numpy(), 4)
        assert tally.counts[16:].view(2, 4).tolist() == expected.tolist()


def test_boundary_iou_is_one_where_the_prediction_is_right_whatever_it_is_on_ignored_pixels() -> (
    None
):
    predicted, labels = maps(3, (2, 60, 60), (0, 1, 3), noise=0.0)
    mine = tallied(predicted, labels, 4, boundary=True)
    assert (mine.boundary_iou, mine.boundary_miou) == ((1.0, 1.0, None, 1.0), 1.0)


def test_boundary_iou_punishes_a_shift_more_the_larger_the_object() -> None:
    """The paper's reason for it: the IoU of a large object hides errors along its contour."""
    worse = []
    for side in (20, 60):
        labels, predicted = torch.zeros(2, 1, 100, 100, dtype=torch.uint8)
        labels[0, 10 : 10 + side, 10 : 10 + side] = 1
        predicted[0, 10 : 10 + side, 12 : 12 + side] = 1
        mine = tallied(predicted, labels, 2, boundary=True)
        assert mine.boundary_iou is not None
        worse.append(mine.iou[1] - mine.boundary_iou[1])
    assert 0.1 < worse[0] < worse[1]


def test_boundaries_that_were_not_counted_have_no_score() -> None:
    mine = tallied(*maps(4, (1, 30, 30), (0, 1)), 2)
    assert (mine.boundary_iou, mine.boundary_miou) == (None, None)


@pytest.mark.parametrize("boundary", [False, True])
def test_tallies_of_shares_add_up_to_that_of_all(boundary: bool) -> None:
    predicted, labels = maps(5, (7, 20, 20), (0, 1, 2))
    whole = tallied(predicted, labels, 3, boundary=boundary)
    counts = 0
    for process in range(3):
        tally = Tally(3, boundary=boundary)
        for i in shard(range(7), process, 3):
            tally.update(predicted[i], labels[i])
        counts = counts + tally.counts
    assert score(counts, 3, 7) == whole


@pytest.mark.parametrize("processes", range(1, 9))
def test_shards_hold_each_sample_once_and_differ_by_one_at_most(processes: int) -> None:
    shards = [shard(range(7), process, processes) for process in range(processes)]
    assert sorted(i for part in shards for i in part) == list(range(7))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
