"""The score, against torchmetrics, and the way back from the network's input to the picture's own pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Accuracy, JaccardIndex

from segprune.data import MEAN, STD, Pair, SampleError
from segprune.training.evaluate import confusion_matrix, evaluate, score

COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], dtype=np.uint8)


class ColourModel(nn.Module):
    """Logits that are highest where a pixel has the class's colour; the network's part without a network."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.modes: list[bool] = []

    def forward(self, pixels: Tensor) -> Tensor:
        self.modes.append(self.training)
        rgb = pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        colours = torch.from_numpy(COLOURS).float()[: self.num_classes]
        return -(rgb[:, None] - colours[:, :, None, None]).square().sum(2)  # B K H W


def blocks(height: int, width: int, side: int = 8) -> np.ndarray:
    labels = np.random.default_rng(height * width).integers(0, 4, (height // side, width // side), dtype=np.uint8)
    return labels.repeat(side, 0).repeat(side, 1)


def write_sample(folder: Path, labels: np.ndarray, image: np.ndarray | None = None) -> Pair:
    """A picture in its labels' colours, if no other is given."""
    number = len(list(folder.iterdir()))
    sample = Pair(f"{number}", folder / f"{number}_image.png", folder / f"{number}_mask.png")
    Image.fromarray(COLOURS[labels % 4] if image is None else image).save(sample.image)
    Image.fromarray(labels).save(sample.mask)
    return sample


@pytest.mark.parametrize("present", [range(6), (0, 2, 5), (3,)])
def test_confusion_matrix_and_score_are_torchmetrics_even_with_absent_classes(present: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([*present, 255])
    labels = values[torch.randint(len(values), (3, 40, 50), generator=generator)]
    predicted = values[torch.randint(len(present), (3, 40, 50), generator=generator)]
    mine = score(sum((confusion_matrix(p, t, 6) for p, t in zip(predicted, labels, strict=True))), 3)
    each = JaccardIndex(task="multiclass", num_classes=6, ignore_index=255, average="none")(predicted, labels)
    mean = JaccardIndex(task="multiclass", num_classes=6, ignore_index=255)(predicted, labels)
    share = Accuracy(task="multiclass", num_classes=6, ignore_index=255, average="micro")(predicted, labels)
    assert [iou is not None for iou in mine.iou] == [k in present for k in range(6)]
    assert [iou or 0.0 for iou in mine.iou] == pytest.approx(each.tolist(), abs=1e-6)
    assert mine.miou == pytest.approx(float(mean), abs=1e-6)
    assert mine.pixel_accuracy == pytest.approx(float(share), abs=1e-6)
    assert mine.num_images == 3


def test_a_class_that_is_only_predicted_has_the_iou_zero() -> None:
    mine = score(confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 0]), 3), 1)
    assert mine.iou == (0.5, 0.0, None)
    assert mine.miou == 0.25


def test_rows_are_labels_and_labels_from_num_classes_up_are_ignored() -> None:
    matrix = confusion_matrix(torch.tensor([1, 1, 0, 1]), torch.tensor([0, 1, 2, 255]), 2)
    assert matrix.tolist() == [[0, 1], [0, 1]]


def test_nothing_labelled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No labelled pixel was found, so there is nothing to score; check the masks"):
        score(torch.zeros(3, 3, dtype=torch.int64), 1)


def test_masks_without_a_labelled_pixel_are_refused(tmp_path: Path) -> None:
    sample = write_sample(tmp_path, np.full((32, 32), 255, dtype=np.uint8))
    with pytest.raises(ValueError, match="No labelled pixel was found"):
        evaluate(ColourModel(), [sample], 4, (32, 32))


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (64, 128), (128, 64), (16, 32), (64, 64), (24, 64)])
def test_perfect_predictions_score_one_on_pictures_of_any_shape(tmp_path: Path, size: tuple[int, int]) -> None:
    samples = [write_sample(tmp_path, blocks(*size))]
    perfect = evaluate(ColourModel(), samples, 4, (64, 64))
    assert (perfect.miou, perfect.pixel_accuracy) == (1.0, 1.0)


def test_pictures_of_different_shapes_share_a_batch_and_the_matrix_is_summed_over_them(tmp_path: Path) -> None:
    right, wrong = blocks(32, 64), np.full((64, 48), 1, dtype=np.uint8)
    samples = [write_sample(tmp_path, right), write_sample(tmp_path, wrong, COLOURS[np.zeros_like(wrong)])]
    predicted = torch.cat([torch.from_numpy(right).flatten(), torch.zeros(wrong.size, dtype=torch.int64)])
    labels = torch.cat([torch.from_numpy(right).flatten(), torch.ones(wrong.size, dtype=torch.int64)])
    expected = score(confusion_matrix(predicted, labels, 4), 2)
    assert 0 < expected.miou < 1
    for batch_size in (1, 2, 8):
        assert evaluate(ColourModel(), samples, 4, (64, 64), batch_size=batch_size) == expected


def test_ignored_pixels_count_nowhere(tmp_path: Path) -> None:
    labels = blocks(32, 64)
    image = COLOURS[labels]
    image[:, :8] = COLOURS[(labels[:, :8] + 1) % 4]  # predicted wrongly
    assert evaluate(ColourModel(), [write_sample(tmp_path, labels, image)], 4, (64, 64)).miou < 1
    labels[:, :8] = 255
    perfect = evaluate(ColourModel(), [write_sample(tmp_path, labels, image)], 4, (64, 64))
    assert (perfect.miou, perfect.pixel_accuracy) == (1.0, 1.0)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_scored_in_eval_mode_and_comes_back_in_its_own(tmp_path: Path, training: bool) -> None:
    model = ColourModel().train(training)
    evaluate(model, [write_sample(tmp_path, blocks(32, 32))], 4, (32, 32))
    assert model.modes == [False]
    assert model.training is training


def test_the_mode_comes_back_after_an_error_too(tmp_path: Path) -> None:
    sample = write_sample(tmp_path, blocks(32, 32))
    sample.mask.unlink()
    model = ColourModel().train()
    with pytest.raises(SampleError, match=r"_mask\.png is missing"):
        evaluate(model, [sample], 4, (32, 32))
    assert model.training


def test_progress_counts_pictures_batch_by_batch(tmp_path: Path) -> None:
    samples = [write_sample(tmp_path, blocks(32, 32)) for _ in range(5)]
    seen: list[tuple[int, int]] = []

    evaluate(ColourModel(), samples, 4, (32, 32), batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
