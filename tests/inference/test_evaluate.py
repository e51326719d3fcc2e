"""A data set scored: every picture once, in its own pixels, by a network or by any function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from segprune.data import MEAN, STD, Pair, SampleError
from segprune.inference.evaluate import EvalMode, Tally, evaluate, score, shard, tallies
from segprune.inference.label_maps import Mode

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
    labels = np.random.default_rng(height * width).integers(
        0, 4, (height // side, width // side), dtype=np.uint8
    )
    return labels.repeat(side, 0).repeat(side, 1)


def write_sample(folder: Path, labels: np.ndarray, image: np.ndarray | None = None) -> Pair:
    """A picture in its labels' colours, if no other is given."""
    number = len(list(folder.iterdir()))
    sample = Pair(f"{number}", folder / f"{number}_image.png", folder / f"{number}_mask.png")
    Image.fromarray(COLOURS[labels % 4] if image is None else image).save(sample.image)
    Image.fromarray(labels).save(sample.mask)
    return sample


def test_masks_without_a_labelled_pixel_are_refused(tmp_path: Path) -> None:
    sample = write_sample(tmp_path, np.full((32, 32), 255, dtype=np.uint8))
    with pytest.raises(ValueError, match="No pixel has a label"):
        evaluate(ColourModel(), [sample], 4, EvalMode(input_shape=(32, 32)))


@pytest.mark.parametrize(
    "size", [(32, 64), (64, 32), (64, 128), (128, 64), (16, 32), (64, 64), (24, 64)]
)
def test_perfect_predictions_score_one_on_pictures_of_any_shape(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    samples = [write_sample(tmp_path, blocks(*size))]
    perfect = evaluate(ColourModel(), samples, 4, EvalMode(input_shape=(64, 64)))
    assert (perfect.miou, perfect.pixel_accuracy) == (1.0, 1.0)


def test_pictures_of_different_shapes_share_a_batch_and_the_matrix_is_summed_over_them(
    tmp_path: Path,
) -> None:
    right, wrong = blocks(32, 64), np.full((64, 48), 1, dtype=np.uint8)
    samples = [
        write_sample(tmp_path, right),
        write_sample(tmp_path, wrong, COLOURS[np.zeros_like(wrong)]),
    ]
    tally = Tally(4)
    tally.update(torch.from_numpy(right), torch.from_numpy(right))
    tally.update(torch.zeros(wrong.shape), torch.ones(wrong.shape))
    expected = score(tally.counts, 4, 2)
    assert 0 < expected.miou < 1
    for batch_size in (1, 2, 8):
        assert (
            evaluate(
                ColourModel(), samples, 4, EvalMode(input_shape=(64, 64)), batch_size=batch_size
            )
            == expected
        )


def test_ignored_pixels_count_nowhere(tmp_path: Path) -> None:
    labels = blocks(32, 64)
    image = COLOURS[labels]
    image[:, :8] = COLOURS[(labels[:, :8] + 1) % 4]  # predicted wrongly
    assert (
        evaluate(
            ColourModel(),
            [write_sample(tmp_path, labels, image)],
            4,
            EvalMode(input_shape=(64, 64)),
        ).miou
        < 1
    )
    labels[:, :8] = 255
    perfect = evaluate(
        ColourModel(),
        [write_sample(tmp_path, labels, image)],
        4,
        EvalMode(input_shape=(64, 64)),
    )
    assert (perfect.miou, perfect.pixel_accuracy) == (1.0, 1.0)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_scored_in_eval_mode_and_comes_back_in_its_own(
    tmp_path: Path, training: bool
) -> None:
    model = ColourModel().train(training)
    evaluate(model, [write_sample(tmp_path, blocks(32, 32))], 4, EvalMode(input_shape=(32, 32)))
    assert model.modes == [False]
    assert model.training is training


def test_the_mode_comes_back_after_an_error_too(tmp_path: Path) -> None:
    sample = write_sample(tmp_path, blocks(32, 32))
    sample.mask.unlink()
    model = ColourModel().train()
    with pytest.raises(SampleError, match=r"_mask\.png is missing"):
        evaluate(model, [sample], 4, EvalMode(input_shape=(32, 32)))
    assert model.training


def test_progress_counts_pictures_batch_by_batch(tmp_path: Path) -> None:
    samples = [write_sample(tmp_path, blocks(32, 32)) for _ in range(5)]
    seen: list[tuple[int, int]] = []

    evaluate(
        ColourModel(),
        samples,
        4,
        EvalMode(input_shape=(32, 32)),
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_function_is_scored_like_the_network_it_calls(tmp_path: Path) -> None:
    samples, how = (
        [write_sample(tmp_path, blocks(32, 64))],
        EvalMode(input_shape=(40, 40), boundary=True),
    )
    model = ColourModel()
    assert evaluate(lambda pixels: model(pixels), samples, 4, how) == evaluate(
        model, samples, 4, how
    )


@pytest.mark.parametrize("mode", ["letterbox", "whole", "slide"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_processes_that_share_the_pictures_count_what_one_does(
    tmp_path: Path, mode: Mode, num_workers: int
) -> None:
    rng = np.random.default_rng(0)
    samples = []
    for size in ((32, 64), (64, 32), (48, 48), (40, 96), (16, 16)):
        labels = blocks(*size)
        samples.append(
            write_sample(tmp_path, labels, COLOURS[np.where(rng.random(size) < 0.4, 0, labels)])
        )
    how = EvalMode(mode, (40, 48), boundary=True)
    whole = evaluate(ColourModel(), samples, 4, how, batch_size=2)
    assert 0 < whole.miou < 1
    total, seen = Tally(4, boundary=True).counts, 0
    for process in range(2):
        mine = shard(samples, process, 2)
        for counts in tallies(
            ColourModel(), mine, 4, how, device="cpu", batch_size=2, num_workers=num_workers
        ):
            assert counts.dtype == torch.int64
            total += counts.sum(0)  # as it is, outside of inference mode
            seen += len(counts)
    assert score(total, 4, seen) == whole


def test_nothing_is_drawn_from_the_global_generator(tmp_path: Path) -> None:
    samples = [write_sample(tmp_path, blocks(32, 32))]
    before = torch.get_rng_state()
    evaluate(ColourModel(), samples, 4, EvalMode(input_shape=(32, 32)))
    assert torch.equal(torch.get_rng_state(), before)


def test_boundaries_are_scored_where_asked_for(tmp_path: Path) -> None:
    samples = [write_sample(tmp_path, blocks(32, 64))]
    without = evaluate(ColourModel(), samples, 4, EvalMode(input_shape=(64, 64)))
    assert without.boundary_iou is None
    assert (
        evaluate(
            ColourModel(), samples, 4, EvalMode(input_shape=(64, 64), boundary=True)
        ).boundary_miou
        == 1.0
    )
