import time

import numpy as np
import pytest

from segprune.data.leaves import draw_leaves


@pytest.mark.parametrize("size", [(64, 96), (33, 32), (128, 128)])
def test_an_image_has_the_size_asked_for_and_is_the_same_for_the_same_arguments(
    size: tuple[int, int],
) -> None:
    image = draw_leaves(3, 5, size)
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, draw_leaves(3, 5, size))


def test_images_differ_by_seed_and_by_index() -> None:
    images = [
        draw_leaves(seed, index, (64, 64)) for seed, index in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert len({image.tobytes() for image in images}) == 4


def test_an_image_of_another_size_is_the_same_scene() -> None:
    for index in range(8):
        large, small = (
            draw_leaves(0, index, (256, 256)).astype(float),
            draw_leaves(0, index, (64, 64)).astype(float),
        )
        reduced = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
        same = np.corrcoef(reduced.ravel(), small.ravel())[0, 1]
        assert same > 0.6, index


def test_images_have_the_spectrum_of_photographs() -> None:
    """Power falls about with the square of the frequency (Field 1987), and all brightness levels occur."""
    power = np.zeros((128, 128))
    images = [draw_leaves(0, index, (128, 128)) for index in range(24)]
    for image in images:
        grey = image.mean(-1)
        power += np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    middle = (frequency > 2 / 128) & (frequency < 0.3)
    slope = np.polyfit(np.log(frequency[middle]), np.log(power[middle]), 1)[0]
    assert -3.2 < slope < -1.6
    levels = np.bincount(np.stack(images).ravel(), minlength=256)
    assert (levels > 0).all()


def test_sixty_four_large_images_take_seconds() -> None:
    start = time.process_time()
    for index in range(8):
        draw_leaves(0, index, (512, 512))
    assert (
        8.0 * (time.process_time() - start) < 20.0
    )  # about five on an idle core; the slack is for busy machines
