"""Distillation against formulas written out, and its laws: from oneself there is nothing to learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from segprune.training.distill import (
    Distillation,
    Projections,
    channel_divergence,
    feature_distance,
    pixel_divergence,
)

OFF: dict[str, Any] = {"pixel": 0.0, "channel": 0.0, "feature": 0.0}
SHAPES = (
    (2, 8, 6, 5),
    (2, 12, 3, 3),
    (2, 16, 2, 2),
    (2, 20, 1, 1),
)  # at the last, one position


def two_logits() -> tuple[Tensor, Tensor]:
    student = (2 * torch.randn(2, 5, 4, 3)).requires_grad_()
    return student, (2 * torch.randn(2, 5, 4, 3)).requires_grad_()


def two_maps() -> tuple[list[Tensor], list[Tensor]]:
    student, teacher = (
        [torch.randn(shape).requires_grad_() for shape in SHAPES] for _ in range(2)
    )
    return student, teacher


def naive_divergence(student: Tensor, teacher: Tensor, temperature: float, axis: int) -> float:
    """Sum of KL over all distributions along the axis, times the temperature squared."""

    def soft(x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
        exponents = np.exp(x.detach().double().numpy() / temperature)
        return exponents / exponents.sum(axis, keepdims=True)

    p, q = soft(teacher), soft(student)
    return float((p * np.log(p / q)).sum()) * temperature**2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergences_are_their_formulas(temperature: float) -> None:
    student, teacher = two_logits()
    pixels = naive_divergence(student, teacher, temperature, axis=1) / (2 * 4 * 3)
    channels = naive_divergence(student.flatten(2), teacher.flatten(2), temperature, axis=2) / (
        2 * 5
    )
    assert pixel_divergence(student, teacher, temperature).item() == pytest.approx(
        pixels, rel=1e-5
    )
    assert channel_divergence(student, teacher, temperature).item() == pytest.approx(
        channels, rel=1e-5
    )


def test_the_distance_of_features_is_1_minus_numpy_s_correlation() -> None:
    student, teacher = torch.randn(2, 8, 3, 2), torch.randn(2, 8, 3, 2)
    pairs = zip(
        student.movedim(1, -1).reshape(-1, 8),
        teacher.movedim(1, -1).reshape(-1, 8),
        strict=True,
    )
    expected = np.mean([1 - np.corrcoef(one, other)[0, 1] for one, other in pairs])
    assert feature_distance(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_identical_networks_have_nothing_to_learn() -> None:
    logits, _ = two_logits()
    maps, _ = two_maps()
    projections = Projections([x.shape[1] for x in maps], [x.shape[1] for x in maps])
    loss = Distillation()(logits, projections(maps), logits, maps)
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, [logits, *maps])
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-6


def test_gradients_reach_the_student_and_its_projections_but_not_the_teacher() -> None:
    (student, teacher), (_, theirs) = two_logits(), two_maps()
    ours = [torch.randn(2, 6, *shape[2:], requires_grad=True) for shape in SHAPES]
    projections = Projections([6] * 4, [shape[1] for shape in SHAPES])
    Distillation()(student, projections(ours), teacher, theirs).backward()
    assert all(
        x.grad is not None and x.grad.any() for x in [student, *ours, *projections.parameters()]
    )
    assert all(x.grad is None for x in [teacher, *theirs])


@pytest.mark.parametrize("factor", [1e-2, 1.0, 1e2])
def test_the_distance_of_features_knows_no_scale_and_no_offset(factor: float) -> None:
    student, teacher = (x.double() for x in (torch.randn(2, 8, 3, 2), torch.randn(2, 8, 3, 2)))
    expected = feature_distance(student, teacher)
    torch.testing.assert_close(
        feature_distance(factor * student, teacher), expected, rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        feature_distance(student, factor * teacher + 3), expected, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("divergence", [pixel_divergence, channel_divergence])
def test_gradients_tend_to_one_size_at_high_temperatures(divergence: Any) -> None:
    student, teacher = two_logits()
    one, other = (
        torch.autograd.grad(divergence(student, teacher, t), student)[0] for t in (200.0, 400.0)
    )
    torch.testing.assert_close(one, other, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("divergence", [pixel_divergence, channel_divergence])
def test_logits_and_temperature_scaled_alike_scale_the_loss_by_the_square(
    divergence: Any,
) -> None:
    student, teacher = two_logits()
    torch.testing.assert_close(
        divergence(3 * student, 3 * teacher, 3.0), 9 * divergence(student, teacher, 1.0)
    )


def test_the_mean_over_shards_is_the_loss_of_the_whole_batch() -> None:
    (student, teacher), (ours, theirs) = two_logits(), two_maps()
    whole = Distillation()(student, ours, teacher, theirs)
    parts = [
        Distillation()(student[i], [x[i] for x in ours], teacher[i], [x[i] for x in theirs])
        for i in (slice(0, 1), slice(1, 2))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_weights_add_up_and_a_weight_of_0_switches_off() -> None:
    (student, teacher), (ours, theirs) = two_logits(), two_maps()
    expected = 2 * pixel_divergence(student, teacher, 2.0)
    torch.testing.assert_close(
        Distillation(**OFF | {"pixel": 2.0, "pixel_temperature": 2.0})(
            student, None, teacher, None
        ),
        expected,
    )
    expected = expected + 3 * channel_divergence(student, teacher, 5.0)
    settings: dict[str, float] = {
        "pixel": 2.0,
        "pixel_temperature": 2.0,
        "channel": 3.0,
        "channel_temperature": 5.0,
    }
    torch.testing.assert_close(
        Distillation(**settings, feature=0.0)(student, None, teacher, None), expected
    )
    stages = [feature_distance(one, other) for one, other in zip(ours, theirs, strict=True)]
    expected = expected + 4 * torch.stack(stages).mean()
    torch.testing.assert_close(
        Distillation(**settings, feature=4.0)(student, ours, teacher, theirs), expected
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whatever_the_networks_compute_in_the_loss_is_float32(dtype: torch.dtype) -> None:
    student, teacher = (x.detach().to(dtype).requires_grad_() for x in two_logits())
    ours, theirs = ([x.detach().to(dtype) for x in maps] for maps in two_maps())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = Distillation()(student, ours, teacher, theirs)
    assert loss.dtype == torch.float32
    full = Distillation()(
        student.float(), [x.float() for x in ours], teacher.float(), [x.float() for x in theirs]
    )
    torch.testing.assert_close(loss, full)
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_projections_start_as_the_identity_where_widths_agree_and_keep_lengths_where_they_do_not() -> (
    None
):
    maps = [torch.randn(2, width, 3, 3) for width in (8, 6, 10)]
    same, wider, narrower = Projections([8, 6, 10], [8, 12, 5])(maps)
    assert torch.equal(same, maps[0])
    torch.testing.assert_close(wider.norm(dim=1), maps[1].norm(dim=1))
    assert wider.shape == (2, 12, 3, 3)
    assert narrower.shape == (2, 5, 3, 3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"pixel": -1.0},
            r"The pixel weight is -1\.0; it must be 0, to switch off, or above\.",
        ),
        ({"feature": float("nan")}, r"The feature weight is nan; it must be 0"),
        ({"pixel_temperature": 0.0}, r"pixel_temperature is 0\.0; it must be above 0\."),
        (
            {"channel_temperature": float("inf")},
            r"channel_temperature is inf; it must be above 0\.",
        ),
        (
            OFF,
            r"All weights of distillation are 0; raise one of pixel, channel, feature or drop the teacher\.",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Distillation(**settings)


def test_a_teacher_of_another_shape_is_refused() -> None:
    student, teacher = two_logits()
    message = r"The student's logits have shape \(2, 4, 4, 3\), the teacher's \(2, 5, 4, 3\); choose a teacher of the"
    with pytest.raises(ValueError, match=message):
        Distillation(feature=0.0)(student[:, :4], None, teacher, None)
    ours, theirs = two_maps()
    with pytest.raises(
        ValueError,
        match=r"The student's maps of stage 2 have shape \(2, 11, 3, 3\), the teacher's",
    ):
        Distillation()(student, [ours[0], ours[1][:, :11], *ours[2:]], teacher, theirs)
    with pytest.raises(
        ValueError,
        match=r"The student has 3 stages, the teacher 4; their maps must come in pairs\.",
    ):
        Projections([8, 8, 8], [8, 8, 8, 8])
