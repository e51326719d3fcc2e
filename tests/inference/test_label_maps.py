"""From pictures to labels, against the same written down plainly: whole tensors, no strips, one window at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from segprune.data import normalise
from segprune.data.transforms import IMAGENET
from segprune.inference import label_maps as module
from segprune.inference.label_maps import (
    EvalMode,
    Network,
    Predict,
    label_maps,
    make_network,
    normalise_pixels,
    prepare,
)
from segprune.model import SegFormer

K = 5


@pytest.fixture
def predict() -> Predict:
    """A small function that looks around every pixel and at the whole input, so that size and padding tell.

    In float64, so that classes hardly ever hang on rounding.
    """
    generator = torch.Generator().manual_seed(1)
    near = torch.randn(K, 3, 9, 9, generator=generator, dtype=torch.float64) / 9
    far = torch.randn(K, 3, generator=generator, dtype=torch.float64)
    return lambda x: (
        F.conv2d(x.double(), near, padding=4)
        + (far @ x.double().mean((2, 3)).T).T[:, :, None, None]
    )


def picture(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    small = rng.integers(
        0, 256, (math.ceil(height / 8), math.ceil(width / 8), 3), dtype=np.uint8
    )
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def labelled(
    predict: Predict, images: list[np.ndarray], how: EvalMode, batch_size: int = 4
) -> list[Tensor]:
    return label_maps(
        Network(predict, K, "cpu", batch_size), [prepare(image, how) for image in images], how
    )


def resized(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def padded(image: np.ndarray, height: int, width: int) -> Tensor:
    canvas = np.full((height, width, 3), 128, dtype=np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return normalise(canvas)[None]


def slid(
    predict: Predict, image: np.ndarray, window: tuple[int, int], step: tuple[int, int]
) -> Tensor:
    """Sums and counts over the whole picture, a window at a time, as mmsegmentation lays them out."""
    height, width = image.shape[:2]
    x = padded(image, max(height, window[0]), max(width, window[1]))
    total, count = torch.zeros(1, K, *x.shape[2:]), torch.zeros(x.shape[2:])
    rows = max(x.shape[2] - window[0] + step[0] - 1, 0) // step[0] + 1
    columns = max(x.shape[3] - window[1] + step[1] - 1, 0) // step[1] + 1
    for i in range(rows):
        for j in range(columns):
            bottom, right = (
                min(i * step[0] + window[0], x.shape[2]),
                min(j * step[1] + window[1], x.shape[3]),
            )
            part = (slice(bottom - window[0], bottom), slice(right - window[1], right))
            total[:, :, *part] += predict(x[:, :, *part]).float()
            count[part] += 1
    assert count.min() >= 1
    return (total / count)[:, :, :height, :width]


def same(found: Tensor, expected: Tensor) -> None:
    """Equal but for a pixel in a thousand, where two classes may be as likely to rounding."""
    assert found.shape == expected.shape
    assert found.dtype == torch.uint8
    assert (found != expected).float().mean() <= 1e-3
    assert len(expected.unique()) > 1


def test_normalise_pixels_is_the_datas_normalise() -> None:
    images = [picture(40, 33), picture(40, 33)[::-1].copy()]
    found = normalise_pixels(torch.stack([torch.from_numpy(image) for image in images]))
    assert torch.equal(found, torch.stack([normalise(image) for image in images]))


def test_a_whole_picture_is_padded_to_a_multiple_of_32_and_cut_again(predict: Predict) -> None:
    images = [
        picture(33, 70),
        picture(64, 32),
        picture(50, 90),
        picture(20, 31),
    ]  # two share a padded size
    for image, found in zip(images, labelled(predict, images, EvalMode("whole")), strict=True):
        height, width = image.shape[:2]
        x = padded(image, math.ceil(height / 32) * 32, math.ceil(width / 32) * 32)
        same(found, predict(x)[0, :, :height, :width].argmax(0))


@pytest.mark.parametrize("step", [None, (32, 40), (7, 40), (16, 11)])
@pytest.mark.parametrize("size", [(32, 40), (75, 101), (20, 95), (64, 30), (10, 10)])
def test_sliding_windows_are_averaged_where_they_overlap(
    predict: Predict, size: tuple[int, int], step: tuple[int, int] | None
) -> None:
    window, image = (32, 40), picture(*size)
    (found,) = labelled(predict, [image], EvalMode("slide", window, step))
    same(found, slid(predict, image, window, step or (22, 27))[0].argmax(0))


def test_one_window_that_holds_the_picture_is_the_picture_in_a_letterbox(
    predict: Predict,
) -> None:
    image = picture(64, 96)
    found = [
        labelled(predict, [image], EvalMode(mode, (64, 96)))[0]
        for mode in ("letterbox", "slide", "whole")
    ]
    same(found[0], found[1])
    same(found[0], found[2])


@pytest.mark.parametrize("mode", ["letterbox", "whole", "slide"])
@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((0.5, 1.0, 1.6), True)])
@pytest.mark.parametrize("size", [(150, 70), (45, 61)])
def test_strips_change_nothing(
    predict: Predict,
    monkeypatch: pytest.MonkeyPatch,
    mode: module.Mode,
    scales: tuple[float, ...],
    flip: bool,
    size: tuple[int, int],
) -> None:
    how = EvalMode(mode, (48, 64), scales=scales, flip=flip)
    (whole,) = labelled(predict, [picture(*size)], how)
    monkeypatch.setattr(module, "CPU_STRIP_NUMBERS", K * size[1] * 7)
    (found,) = labelled(predict, [picture(*size)], how)
    same(found, whole)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("mode", ["letterbox", "whole", "slide"])
def test_the_batch_changes_nothing(
    predict: Predict, mode: module.Mode, batch_size: int
) -> None:
    images, how = (
        [picture(64, 40), picture(40, 64), picture(64, 50), picture(90, 31)],
        EvalMode(mode, (32, 48)),
    )
    together = labelled(predict, images, how, batch_size)
    for image, found in zip(images, together, strict=True):
        same(found, labelled(predict, [image], how, 3)[0])


def test_views_vote_with_their_softmax_at_the_pictures_own_size(predict: Predict) -> None:
    image = picture(60, 90)
    votes = torch.zeros(K, 60, 90)
    for scale in (0.5, 1.0, 1.5):
        height, width = round(60 * scale), round(90 * scale)
        small = np.asarray(
            Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        )
        x = padded(small, math.ceil(height / 32) * 32, math.ceil(width / 32) * 32)
        for logits in (predict(x), predict(x.flip(-1)).flip(-1)):
            votes += resized(logits[:, :, :height, :width], (60, 90))[0].softmax(0)
    (found,) = labelled(predict, [image], EvalMode("whole", scales=(0.5, 1.0, 1.5), flip=True))
    same(found, votes.argmax(0))


def test_a_mirrored_picture_gets_the_mirrored_labels_with_flip(predict: Predict) -> None:
    image = picture(64, 96)
    how = EvalMode("slide", (64, 64), (64, 32), flip=True)
    found, mirrored = labelled(predict, [image, image[:, ::-1].copy()], how)
    same(found, mirrored.flip(-1))


@pytest.mark.parametrize("mode", ["letterbox", "whole", "slide"])
def test_logits_at_a_lower_resolution_are_resized(predict: Predict, mode: module.Mode) -> None:
    def coarse(x: Tensor) -> Tensor:
        return predict(x)[:, :, ::4, ::4]

    def fine(x: Tensor) -> Tensor:
        return resized(coarse(x), x.shape[2:])

    image, how = picture(70, 50), EvalMode(mode, (64, 64))
    same(labelled(coarse, [image], how)[0], labelled(fine, [image], how)[0])


def test_sliding_keeps_only_the_rows_that_are_still_needed(
    predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    read = module._SlidingWindows.read

    def watched(self: module._SlidingWindows, a: int, b: int) -> Tensor:
        nonlocal most
        most = max(most, self.sums.shape[1])
        return read(self, a, b)

    monkeypatch.setattr(module._SlidingWindows, "read", watched)
    monkeypatch.setattr(module, "CPU_STRIP_NUMBERS", K * 40 * 8)
    labelled(predict, [picture(1000, 40)], EvalMode("slide", (32, 40)))
    assert 32 <= most <= 64


def test_a_network_with_other_classes_is_refused() -> None:
    message = (
        r"The network made \(1, 3, 32, 32\) of a batch of 1, where B K H W with 1 images and 5 classes is expected; "
        "give a network with as many classes as the data."
    )
    with pytest.raises(ValueError, match=message):
        labelled(lambda x: x, [picture(32, 32)], EvalMode(input_shape=(32, 32)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "crop"}, "`mode` 'crop' is unknown; choose one of letterbox, whole, slide."),
        (
            {"scales": ()},
            "`scales` is empty; give at least one, each above 0, such as 0.75 1 1.25.",
        ),
        (
            {"scales": (1.0, 0.0)},
            "`scales` is 1 0; give at least one, each above 0, such as 0.75 1 1.25.",
        ),
        ({"scales": (math.nan,)}, "`scales` is nan; give at least one, each above 0"),
        (
            {"stride": (9, 9)},
            "`stride` has no effect in mode letterbox; leave it out, or choose the mode slide.",
        ),
        (
            {"mode": "slide", "input_shape": (64, 32), "stride": (64, 33)},
            "`stride` is 64×33, where 1×1 to the window's 64×32 is allowed; a longer one would leave pixels out.",
        ),
        (
            {"mode": "slide", "stride": (0, 9)},
            "`stride` is 0×9, where 1×1 to the window's 512×512 is allowed",
        ),
    ],
)
def test_a_mode_that_makes_no_sense_is_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EvalMode(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "how",
    [
        EvalMode(input_shape=(64, 128)),
        EvalMode("whole", flip=True),
        EvalMode("slide", input_shape=(64, 128), stride=(40, 90)),
    ],
    ids=lambda how: how.mode,
)
def test_a_segformer_upsampled_as_rows_are_read_gives_the_same_maps(
    how: EvalMode, small_model: SegFormer
) -> None:
    network = small_model.float()
    with torch.no_grad():  # every class as likely as the others
        means = network(normalise(picture(64, 128))[None]).mean((0, 2, 3))
        network.decode_head.classifier.bias -= means
    images = [prepare(picture(*size), how) for size in ((60, 128), (100, 150), (64, 131))]
    with torch.inference_mode():
        plain = label_maps(Network(network, K, "cpu", 2), images, how)
        strips = label_maps(make_network(network, K, "cpu", 2, IMAGENET), images, how)
    assert len(plain[0].unique()) > 1
    assert all(torch.equal(one, other) for one, other in zip(plain, strips, strict=True))


def test_a_subclass_that_returns_something_else_is_asked_for_that(
    small_model: SegFormer,
) -> None:
    class Negative(SegFormer):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    network = Negative(small_model.spec).eval()
    assert make_network(network, K, "cpu", 1, IMAGENET).upsampling is None
    assert make_network(small_model, K, "cpu", 1, IMAGENET).upsampling is small_model
