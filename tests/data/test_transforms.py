"""Geometry and colour of the transforms, on pictures whose pixels say where they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from segprune.data import (
    IGNORE_INDEX,
    MEAN,
    STD,
    EvalTransform,
    TrainTransform,
    letterbox,
    normalise,
)
from segprune.data.transforms import GREY, jitter_colour


def ramp(height: int, width: int) -> np.ndarray:
    """[H, W, 3] of (row, column, 0): a picture that tells each pixel's place, below 128 where it is padding."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)


def plain_training(
    shape: tuple[int, int], scale: tuple[float, float] = (0.5, 2.0), flip: float = 0.0
) -> TrainTransform:
    return TrainTransform(shape, scale=scale, flip=flip, colour=False)


def test_normalise_is_the_formula_per_channel() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = (
        torch.from_numpy(image).double().permute(2, 0, 1)
        - torch.tensor(MEAN)[:, None, None].double()
    ) / (torch.tensor(STD)[:, None, None].double())
    pixels = normalise(image)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.double(), expected, rtol=1e-5, atol=1e-5)


def test_mean_and_deviation_are_imagenet_s_on_bytes() -> None:
    np.testing.assert_allclose(np.array(MEAN) / 255, (0.485, 0.456, 0.406), atol=1e-4)
    np.testing.assert_allclose(np.array(STD) / 255, (0.229, 0.224, 0.225), atol=1e-4)


@pytest.mark.parametrize(
    ("size", "shape", "box"),
    [
        ((50, 100), (64, 64), (16, 0, 32, 64)),
        ((100, 50), (64, 64), (0, 16, 64, 32)),
        ((30, 30), (40, 60), (0, 10, 40, 40)),
        ((40, 61), (40, 60), (0, 0, 39, 60)),
        ((61, 40), (60, 40), (0, 0, 60, 39)),
        ((1, 200), (32, 32), (15, 0, 1, 32)),
        ((40, 60), (40, 60), (0, 0, 40, 60)),
    ],
)
def test_the_letterbox_keeps_the_ratio_and_pads_both_sides_alike(
    size: tuple[int, int], shape: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    image, mask, found = letterbox(
        np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8), shape
    )
    assert found == box
    assert mask is not None
    inside = np.zeros(shape, dtype=bool)
    inside[box[0] : box[0] + box[2], box[1] : box[1] + box[3]] = True
    np.testing.assert_array_equal(image, np.where(inside, 0, GREY)[..., None].repeat(3, axis=2))
    np.testing.assert_array_equal(mask, np.where(inside, 0, IGNORE_INDEX))


@pytest.mark.parametrize("size", [(37, 100), (100, 37), (64, 64), (120, 90)])
def test_cutting_the_box_out_undoes_the_letterbox(size: tuple[int, int]) -> None:
    source = ramp(*size)
    boxed, mask, (top, left, height, width) = letterbox(source, source[..., 1], (64, 96))
    assert mask is not None
    for values in (boxed[..., 1], mask):
        inner = values[top : top + height, left : left + width].astype(float)
        column = (np.arange(width) + 0.5) * size[
            1
        ] / width - 0.5  # of the box's pixels, in the source
        assert np.abs(inner - column)[:, 2:-2].max() <= max(1.0, 0.5 * size[1] / width)
    row = (np.arange(height) + 0.5) * size[0] / height - 0.5
    inner = boxed[top : top + height, left : left + width, 0].astype(float)
    assert np.abs(inner - row[:, None])[2:-2].max() <= 1.0


def test_a_letterbox_of_the_same_shape_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    boxed, mask, _ = letterbox(image, None, (40, 60))
    np.testing.assert_array_equal(boxed, image)
    assert mask is None


def test_evaluation_letterboxes_and_draws_nothing() -> None:
    image = ramp(50, 70)
    rng = np.random.default_rng(0)
    out, mask = EvalTransform((64, 64))(image, image[..., 0], rng)
    expected, expected_mask, _ = letterbox(image, image[..., 0], (64, 64))
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(mask, expected_mask)
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("shape", [(64, 64), (100, 130), (48, 120)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_mask_and_image_stay_aligned_to_the_pixel(shape: tuple[int, int], flip: float) -> None:
    transform, source = plain_training(shape, flip=flip), ramp(90, 120)
    for seed in range(20):
        for axis in (0, 1):
            image, mask = transform(source, source[..., axis], np.random.default_rng(seed))
            inside = mask != IGNORE_INDEX
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            inner = np.s_[rows[0] + 2 : rows[-1] - 1, columns[0] + 2 : columns[-1] - 1]
            difference = image[inner][..., axis].astype(int) - mask[inner]
            assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("shape", [(64, 64), (100, 130)])
def test_a_colour_that_encodes_the_label_does_so_after_training_s_transform(
    shape: tuple[int, int],
) -> None:
    blocks = (
        np.random.default_rng(1)
        .integers(0, 8, (3, 4), dtype=np.uint8)
        .repeat(40, 0)
        .repeat(40, 1)
    )
    source = (blocks[..., None] * np.array([30, 10, 1], dtype=np.uint8)).astype(np.uint8)
    num_checked = 0
    for seed in range(10):
        image, mask = TrainTransform(shape, colour=False)(
            source, blocks, np.random.default_rng(seed)
        )
        wide = np.lib.stride_tricks.sliding_window_view(mask, (11, 11))
        interior = wide.min((2, 3)) == wide.max(
            (2, 3)
        )  # resampling blends what lies nearer to an edge
        labels, colours = mask[5:-5, 5:-5][interior], image[5:-5, 5:-5][interior]
        known = labels != IGNORE_INDEX
        num_checked += int(known.sum())
        np.testing.assert_array_equal(
            colours[known], labels[known][:, None] * np.array([30, 10, 1])
        )
    assert num_checked > 1000


def test_resampling_invents_no_labels() -> None:
    image, labels = (
        ramp(90, 120),
        np.random.default_rng(0).choice(np.array([0, 7, 250], np.uint8), (90, 120)),
    )
    for seed in range(5):
        _, mask = plain_training((64, 64))(image, labels, np.random.default_rng(seed))
        assert set(np.unique(mask)) <= {0, 7, 250, IGNORE_INDEX}
    _, boxed, _ = letterbox(image, labels, (64, 64))
    assert set(np.unique(boxed)) == {0, 7, 250, IGNORE_INDEX}


def test_padding_is_grey_in_the_image_and_ignored_in_the_mask_and_nowhere_else() -> None:
    image, mask = plain_training((64, 64), (0.5, 0.5))(
        ramp(90, 120), np.zeros((90, 120), np.uint8), np.random.default_rng(3)
    )
    assert set(np.unique(mask)) == {0, IGNORE_INDEX}
    np.testing.assert_array_equal((image == GREY).all(2), mask == IGNORE_INDEX)
    assert (mask == 0).sum() == 24 * 32


def test_scale_one_at_the_picture_s_own_shape_is_the_identity_and_flip_one_its_mirror() -> None:
    source = ramp(48, 64)
    for flip, expected in ((0.0, source), (1.0, source[:, ::-1])):
        image, mask = plain_training((48, 64), (1.0, 1.0), flip)(
            source, source[..., 1], np.random.default_rng(0)
        )
        np.testing.assert_array_equal(image, expected)
        np.testing.assert_array_equal(mask, expected[..., 1])


def test_half_the_pictures_are_flipped_at_a_half() -> None:
    source, transform = ramp(48, 64), plain_training((48, 64), (1.0, 1.0), 0.5)
    flipped = [
        transform(source, source[..., 1], np.random.default_rng(seed))[1][0, 0] == 63
        for seed in range(200)
    ]
    assert 70 < sum(flipped) < 130  # 100 ± 4 deviations


def test_crops_and_places_reach_every_side() -> None:
    source, halves = ramp(64, 64), np.arange(64) // 2
    large, small = plain_training((64, 64), (2.0, 2.0)), plain_training((64, 64), (0.5, 0.5))
    corners, places = [], []
    for seed in range(100):
        crop = [
            large(source, source[..., axis], np.random.default_rng(seed))[1].astype(int)
            for axis in (0, 1)
        ]
        corners.append((crop[0][0, 0], crop[1][0, 0]))
        assert np.abs(crop[0] - corners[-1][0] - halves[:, None]).max() <= 1
        assert np.abs(crop[1] - corners[-1][1] - halves).max() <= 1
        mask = small(source, source[..., 1], np.random.default_rng(seed))[1]
        places.append(np.flatnonzero((mask != IGNORE_INDEX).any(0))[0])
    rows, columns = np.array(corners).T
    assert max(rows.min(), columns.min()) <= 1
    assert min(rows.max(), columns.max()) >= 31
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.3
    assert (min(places), max(places)) == (0, 32)


def test_the_scale_drawn_lies_in_its_bounds_and_fills_them() -> None:
    source, transform = np.zeros((64, 64, 3), np.uint8), plain_training((64, 64), (0.25, 0.75))
    sides = []
    for seed in range(200):
        _, mask = transform(source, source[..., 0], np.random.default_rng(seed))
        sides.append(int((mask == 0).any(0).sum()))
    assert 16 <= min(sides) <= 18
    assert 46 <= max(sides) <= 48


@pytest.mark.parametrize("scale", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_a_scale_that_is_no_range_is_refused(scale: tuple[float, float]) -> None:
    with pytest.raises(
        ValueError, match=r"scale \(.*\) must be \(low, high\) with 0 < low <= high; give both"
    ):
        TrainTransform((64, 64), scale=scale)


@pytest.mark.parametrize("flip", [-0.1, 1.1])
def test_a_flip_that_is_no_probability_is_refused(flip: float) -> None:
    with pytest.raises(
        ValueError,
        match=rf"flip {flip} must be a probability in 0\.\.1; give 0 to switch it off",
    ):
        TrainTransform((64, 64), flip=flip)


def test_colour_changes_the_image_and_not_the_mask() -> None:
    source = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    labels = source[..., 0] % 8
    coloured, plain = (
        TrainTransform((40, 60), colour=colour)(source, labels, np.random.default_rng(5))
        for colour in (True, False)
    )
    np.testing.assert_array_equal(coloured[1], plain[1])
    assert (coloured[0] != plain[0]).any()


def jittered(*pixels: tuple[int, int, int]) -> np.ndarray:
    """[200, P, 3]: what 200 seeds make of a picture of these pixels."""
    image = np.array([pixels], dtype=np.uint8)
    return np.stack(
        [jitter_colour(image, np.random.default_rng(seed))[0] for seed in range(200)]
    ).astype(float)


def assert_fills(values: np.ndarray, low: float, high: float) -> None:
    """All lie in low..high, give or take rounding, and 200 of them come near both ends."""
    margin = 0.1 * (high - low)
    assert low - 0.02 < values.min() < low + margin
    assert high - margin < values.max() < high + 0.02


def test_jitter_keeps_grey_grey_and_scales_it_by_the_brightness() -> None:
    grey = jittered((100, 100, 100))
    assert np.ptp(grey, axis=2).max() <= 1
    assert_fills(grey.mean((1, 2)) / 100, 0.7, 1.3)


def test_jitter_changes_contrast_about_the_mean() -> None:
    dark, light = jittered((80, 80, 80), (120, 120, 120)).mean(2).T
    assert_fills((light - dark) / (light + dark) * 5, 0.7, 1.3)


def test_jitter_changes_saturation_and_hue_to_either_side() -> None:
    colours = jittered((120, 90, 90))
    luma = colours @ [0.299, 0.587, 0.114]
    in_phase, quadrature = (
        colours @ [0.5959, -0.2746, -0.3213],
        colours @ [0.2115, -0.5227, 0.3112],
    )
    chroma = np.hypot(in_phase, quadrature) / luma
    before = np.hypot(30 * 0.5959, 30 * 0.2115) / (90 + 30 * 0.299)
    share = chroma / before  # of saturation times contrast, as both factors scale it
    assert 0.6 * 0.7 - 0.05 < share.min() < 0.6
    assert 1.5 < share.max() < 1.4 * 1.3 + 0.05
    turn = (np.arctan2(quadrature, in_phase) - np.arctan2(0.2115, 0.5959)) / (2 * np.pi)
    assert -0.07 < turn.min() < -0.04
    assert 0.04 < turn.max() < 0.07
