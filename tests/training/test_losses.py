"""Each loss against its formula written out in NumPy, against torch's, and against identities."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from segprune.training import losses
from segprune.training.losses import (
    LOSSES,
    WEIGHT_RULES,
    SegmentationLoss,
    WeightRule,
    class_weights_from_counts,
    focal,
    ohem,
    parse_loss,
)

Array = npt.NDArray[Any]
BATCH, CLASSES, SIZE = 4, 5, (6, 7)
WEIGHTS = (0.5, 2.0, 1.0, 0.0, 3.0)


def batch(ignored: float = 0.2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits that want a gradient, labels of which some are ignored; class 4 is rare."""
    logits = torch.randn(BATCH, CLASSES, *SIZE, dtype=dtype) * 3
    labels = torch.randint(0, CLASSES - 1, (BATCH, *SIZE))
    labels[0, 2, :3] = 4
    labels[torch.rand(BATCH, *SIZE) < ignored] = 255
    return logits.requires_grad_(), labels


def loss_of(text: str, **settings: Any) -> SegmentationLoss:
    return SegmentationLoss(parse_loss(text), **settings)


def softmax(logits: Tensor) -> Array:
    exponents = np.exp(logits.detach().double().numpy())
    return exponents / exponents.sum(1, keepdims=True)


def labelled_pixels(logits: Tensor, labels: Tensor) -> list[tuple[int, Array, int]]:
    """(image, probabilities K, label) of each pixel that has one."""
    p = softmax(logits)
    where = itertools.product(*map(range, labels.shape))
    return [
        (b, p[b, :, i, j], int(labels[b, i, j])) for b, i, j in where if labels[b, i, j] != 255
    ]


def naive_ce(
    logits: Tensor, labels: Tensor, weights: tuple[float, ...], smoothing: float
) -> float:
    pixels, total = labelled_pixels(logits, labels), 0.0
    for _, p, label in pixels:
        target = [(1 - smoothing) * (k == label) + smoothing / CLASSES for k in range(CLASSES)]
        total += sum(-t * w * math.log(q) for t, w, q in zip(target, weights, p, strict=True))
    return total / len(pixels)


def naive_focal(logits: Tensor, labels: Tensor, weights: tuple[float, ...]) -> float:
    pixels = labelled_pixels(logits, labels)
    return sum(-weights[y] * (1 - p[y]) ** 2 * math.log(p[y]) for _, p, y in pixels) / len(
        pixels
    )


def naive_ohem(logits: Tensor, labels: Tensor, weights: tuple[float, ...]) -> float:
    pixels, total = labelled_pixels(logits, labels), 0.0
    for b in range(BATCH):
        mine = sorted((float(p[y]), weights[y]) for image, p, y in pixels if image == b)
        hard = [
            pair
            for rank, pair in enumerate(mine)
            if pair[0] < 0.7 or rank < math.ceil(len(mine) / 16)
        ]
        total += len(mine) * sum(-w * math.log(q) for q, w in hard) / len(hard)
    return total / len(pixels)


def naive_per_class(logits: Tensor, labels: Tensor, of_class: Any) -> float:
    """Mean over images of the mean over the image's classes of `of_class(probabilities, truth)`."""
    pixels, images = labelled_pixels(logits, labels), []
    for b in range(BATCH):
        mine = [(p, y) for image, p, y in pixels if image == b]
        p, y = np.array([p for p, _ in mine]), np.array([y for _, y in mine])
        images.append(np.mean([of_class(p[:, k], y == k) for k in np.unique(y)]))
    return float(np.mean(images))


def naive_dice(p: Array, truth: Array) -> float:
    return float(1 - 2 * p[truth].sum() / (p.sum() + truth.sum()))


def naive_lovasz(p: Array, truth: Array) -> float:
    """The extension as defined: each error times what its pixel adds to the Jaccard loss of the set of worse ones."""

    def jaccard_loss(wrong: set[int]) -> float:
        positive = set(np.flatnonzero(truth))
        return len(wrong) / len(positive | wrong)

    errors = np.abs(truth - p)
    total, worse = 0.0, set[int]()
    for pixel in np.argsort(-errors):
        total += errors[pixel] * (jaccard_loss(worse | {int(pixel)}) - jaccard_loss(worse))
        worse.add(int(pixel))
    return total


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_formula(
    weights: tuple[float, ...] | None, smoothing: float
) -> None:
    logits, labels = batch()
    loss = loss_of("ce", class_weights=weights, label_smoothing=smoothing)(logits, labels)
    assert loss.item() == pytest.approx(
        naive_ce(logits, labels, weights or (1.0,) * CLASSES, smoothing)
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_and_its_gradient_are_torch_s(
    weights: tuple[float, ...] | None, smoothing: float
) -> None:
    logits, labels = batch()
    loss = loss_of("ce", class_weights=weights, label_smoothing=smoothing)(logits, labels)
    weight = None if weights is None else logits.new_tensor(weights)
    total = F.cross_entropy(
        logits,
        labels,
        weight=weight,
        ignore_index=255,
        label_smoothing=smoothing,
        reduction="sum",
    )
    expected = total / (labels != 255).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("name", "naive"), [("focal", naive_focal), ("ohem", naive_ohem)])
def test_focal_and_ohem_are_their_formulas(
    name: str, naive: Any, weights: tuple[float, ...] | None
) -> None:
    logits, labels = batch()
    loss = loss_of(name, class_weights=weights)(logits, labels)
    assert loss.item() == pytest.approx(naive(logits, labels, weights or (1.0,) * CLASSES))


@pytest.mark.parametrize(("name", "naive"), [("dice", naive_dice), ("lovasz", naive_lovasz)])
def test_dice_and_lovasz_are_their_formulas(name: str, naive: Any) -> None:
    logits, labels = batch()
    assert loss_of(name)(logits, labels).item() == pytest.approx(
        naive_per_class(logits, labels, naive)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    logits, labels = batch()
    small = (logits[:2, :, :3, :3] / 3).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of(name)(x, labels[:2, :3, :3]), (small,))


def test_focal_leaves_sure_pixels_out() -> None:
    nll = torch.tensor([0.0, 1e-6, 0.5, 4.0], dtype=torch.float64)
    assert (focal(nll) <= nll).all()
    assert float(focal(nll)[1]) == pytest.approx(1e-18)  # no digits lost where p is nearly 1


@pytest.mark.parametrize(("name", "value"), [("_OHEM_PROBABILITY", 1.0), ("_OHEM_SHARE", 1.0)])
def test_ohem_that_keeps_every_pixel_is_cross_entropy(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, name, value)
    logits, labels = batch()
    nll = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")
    torch.testing.assert_close(ohem(nll, nll, labels), nll.sum())


def test_ohem_of_a_sure_network_trains_the_least_sure_sixteenth_of_the_pixels() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0] = torch.linspace(3, 6, 64).view(8, 8)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of("ohem")(logits, labels), logits)
    assert gradient.flatten(2).abs().sum((0, 1)).nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_prediction_costs_nothing(name: str) -> None:
    _, labels = batch()
    logits = 1e3 * F.one_hot(labels.clamp(max=CLASSES - 1), CLASSES).movedim(3, 1).float()
    assert loss_of(name)(logits, labels).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("right", [0, 3, 8])
def test_of_sure_predictions_lovasz_is_1_minus_iou_and_dice_1_minus_f1(right: int) -> None:
    labels = torch.zeros(1, 1, 16, dtype=torch.int64)
    labels[..., :8] = 1
    predicted = torch.zeros_like(labels)
    predicted[..., 8 - right : 16 - right] = 1  # as many as there are, `right` of them so
    logits = 100.0 * F.one_hot(predicted, 2).movedim(3, 1)  # both classes have the same IoU
    assert loss_of("lovasz")(logits, labels).item() == pytest.approx(
        1 - right / (16 - right), abs=1e-6
    )
    assert loss_of("dice")(logits, labels).item() == pytest.approx(1 - right / 8, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_change_nothing(name: str) -> None:
    logits, labels = batch(ignored=0.4)
    loss = loss_of(name)(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    ignored = (labels == 255)[:, None].expand_as(logits)
    assert not gradient[ignored].any()
    other = (
        logits.detach().masked_fill(ignored, 0)
        + torch.randn_like(logits).masked_fill(~ignored, 0) * 9
    )
    torch.testing.assert_close(loss_of(name)(other, labels), loss)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shards", [2, 4])
def test_the_mean_over_shards_is_the_loss_of_the_whole_batch(name: str, shards: int) -> None:
    logits, labels = batch(ignored=0.3)
    labels[1:3] = 255  # shards may have few labels, or none
    labels[3, :5] = 255
    whole = loss_of(name)(logits, labels)
    num_labelled = (labels != 255).sum() / shards
    parts = [
        loss_of(name)(x, y, num_labelled)
        for x, y in zip(logits.chunk(shards), labels.chunk(shards), strict=True)
    ]
    mean = torch.stack(parts).mean()
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(
        torch.autograd.grad(mean, logits), torch.autograd.grad(whole, logits)
    )


@pytest.mark.parametrize("text", [*LOSSES, "+".join(LOSSES)])
@pytest.mark.parametrize("num_labelled", [None, torch.tensor(0.0), torch.tensor(70.5)])
def test_a_batch_without_labels_is_0_and_so_is_its_gradient(
    text: str, num_labelled: Tensor | None
) -> None:
    logits, labels = batch()
    loss = loss_of(text)(logits, torch.full_like(labels, 255), num_labelled)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_whatever_the_logits_the_loss_is_computed_in_float32(
    name: str, dtype: torch.dtype
) -> None:
    logits, labels = batch(dtype=torch.float32)
    logits = logits.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(name)(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), loss_of(name)(logits.double(), labels), rtol=1e-5, atol=1e-6
    )
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


def test_terms_are_weighted_and_summed() -> None:
    logits, labels = batch()
    settings: dict[str, Any] = {"class_weights": WEIGHTS, "label_smoothing": 0.1}
    whole = loss_of("ohem + 0.5*lovasz+2 * dice", **settings)(logits, labels)
    lovasz, dice = (loss_of(name)(logits, labels) for name in ("lovasz", "dice"))
    torch.testing.assert_close(
        whole, loss_of("ohem", **settings)(logits, labels) + 0.5 * lovasz + 2 * dice
    )


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("ce", (("ce", 1.0),)),
        ("ce+dice", (("ce", 1.0), ("dice", 1.0))),
        (" ohem + .5 * lovasz ", (("ohem", 1.0), ("lovasz", 0.5))),
    ],
)
def test_a_text_gives_terms_and_weights(
    text: str, terms: tuple[tuple[str, float], ...]
) -> None:
    assert parse_loss(text) == terms


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "iou",
            r"Loss 'iou' in 'iou' is unknown; add up ce, dice, focal, lovasz, ohem, as in ce\+0\.5\*lovasz\.",
        ),
        ("", r"Loss '' in '' is unknown; add up ce, dice"),
        ("ce+", r"Loss '' in 'ce\+' is unknown"),
        (
            "ce+2*ce",
            r"Loss 'ce\+2\*ce' names ce twice; name each once, with its weight, as in 2\*ce\.",
        ),
        (
            "x*ce",
            r"Weight 'x' in loss 'x\*ce' is no number above 0; write it as in ce\+0\.5\*lovasz\.",
        ),
        ("0*ce", r"Weight '0' in loss '0\*ce' is no number above 0"),
        ("nan*ce", r"Weight 'nan' in loss"),
        ("inf*ce", r"Weight 'inf' in loss"),
        ("*ce", r"Weight '' in loss"),
    ],
)
def test_a_text_that_says_no_loss_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_loss(text)


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        (
            "ce",
            {"label_smoothing": 1.0},
            r"`label_smoothing` is 1\.0; it is a share, from 0 to below 1\.",
        ),
        ("ce", {"label_smoothing": -0.1}, r"`label_smoothing` is -0\.1; it is a share"),
        (
            "focal+dice",
            {"label_smoothing": 0.1},
            r"`label_smoothing` has no effect on dice \+ focal; set it to 0",
        ),
        (
            "lovasz",
            {"class_weights": (1.0, 2.0)},
            r"`class_weights` has no effect on lovasz; drop them or add ce\.",
        ),
        (
            "ce",
            {"class_weights": (1.0, -2.0)},
            r"`class_weights` is 1, -2; each must be 0 or above, and not all 0\.",
        ),
        ("ce", {"class_weights": (1.0, math.nan)}, r"`class_weights` is 1, nan; each must be"),
        ("ce", {"class_weights": (0.0, 0.0)}, r"`class_weights` is 0, 0; each must be"),
    ],
)
def test_settings_without_sense_or_effect_are_refused(
    text: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        loss_of(text, **settings)


def test_class_weights_of_another_number_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"2 class weights came for 5 classes; give one per class\."
    ):
        loss_of("ce", class_weights=(1.0, 2.0))(*batch())


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_weights_from_counts_rise_with_rarity_and_average_1_over_the_pixels(
    rule: WeightRule,
) -> None:
    pixels = (700, 0, 250, 50)
    weights = class_weights_from_counts(pixels, rule)
    assert weights[1] == 0
    assert 0 < weights[0] < weights[2] < weights[3]
    assert np.dot(pixels, weights) / sum(pixels) == pytest.approx(1)


def test_weights_from_counts_keep_the_ratios_of_the_papers() -> None:
    pixels = np.array([6000, 3000, 1000])
    shares = pixels / pixels.sum()
    for rule, raw in (
        ("enet", 1 / np.log(1.02 + shares)),
        ("median", np.median(shares) / shares),
    ):
        weights = np.array(class_weights_from_counts(pixels.tolist(), rule))  # type: ignore[arg-type]
        np.testing.assert_allclose(weights / weights[0], raw / raw[0])


def test_weights_by_median_frequency_give_every_class_the_same_say() -> None:
    pixels = np.array([6000, 3000, 1000])
    assert np.ptp(
        pixels * np.array(class_weights_from_counts(pixels.tolist(), "median"))
    ) == pytest.approx(0)


def test_weights_from_no_pixels_or_by_an_unknown_rule_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"No class has a labelled pixel, so classes cannot be weighed; check the",
    ):
        class_weights_from_counts([0, 0], "enet")
    with pytest.raises(
        ValueError,
        match=r"Rule 'best' for class weights is unknown; choose one of enet, median\.",
    ):
        class_weights_from_counts([1, 2], "best")  # type: ignore[arg-type]
