"""The learning rate's course, against torch's own schedulers; the VOC scripts' rule, against its description."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, PolynomialLR

from segprune.training.schedule import DECAYS, Decay, lr_factor, voc_lr, voc_schedule


def torch_factors(decay: Decay, steps: int, eta_min: float = 0.0) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler: LRScheduler
    if decay == "poly":
        scheduler = PolynomialLR(optimizer, steps)
    elif decay == "cosine":
        scheduler = CosineAnnealingLR(optimizer, steps, eta_min=eta_min)
    else:
        scheduler = LambdaLR(optimizer, lambda step: 1.0)
    factors = []
    for _ in range(steps):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_after_the_warm_up_the_decay_is_torch_s_over_what_remains(
    decay: Decay, warmup: int
) -> None:
    factors = [
        lr_factor(step, 40, warmup_steps=warmup, decay=decay) for step in range(warmup, 40)
    ]
    assert factors == pytest.approx(torch_factors(decay, 40 - warmup), abs=1e-6)


def test_cosine_has_torch_s_floor_and_poly_a_line_to_its_own() -> None:
    factors = [
        lr_factor(step, 40, warmup_steps=0, decay="cosine", min_factor=0.1)
        for step in range(40)
    ]
    assert factors == pytest.approx(torch_factors("cosine", 40, eta_min=0.1), abs=1e-6)
    factors = [
        lr_factor(step, 4, warmup_steps=0, decay="poly", min_factor=0.2) for step in range(4)
    ]
    assert factors == pytest.approx([1.0, 0.8, 0.6, 0.4])


@pytest.mark.parametrize("decay", ["poly", "cosine"])
def test_the_last_steps_are_held_at_the_floor_and_the_decay_ends_before_them(
    decay: Decay,
) -> None:
    factors = [
        lr_factor(s, 40, warmup_steps=5, decay=decay, min_factor=0.1, hold_steps=10)
        for s in range(40)
    ]
    shorter = [lr_factor(s, 30, warmup_steps=5, decay=decay, min_factor=0.1) for s in range(30)]
    assert factors == pytest.approx(shorter + [0.1] * 10)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_warm_up_rises_evenly_to_the_base_rate(decay: Decay) -> None:
    factors = [lr_factor(step, 40, warmup_steps=5, decay=decay) for step in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("decay", DECAYS)
def test_the_rate_never_rises_after_the_warm_up_and_no_step_is_wasted_on_zero(
    decay: Decay,
) -> None:
    factors = [lr_factor(step, 100, warmup_steps=5, decay=decay) for step in range(5, 100)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] > 0


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", [0, 1])
def test_a_run_of_one_step_takes_it_at_the_base_rate(decay: Decay, warmup: int) -> None:
    assert lr_factor(0, 1, warmup_steps=warmup, decay=decay) == 1.0


@pytest.mark.parametrize(
    ("lr", "batch_size", "optimizer", "expected"),
    [
        (1e-4, 16, "adamw", 1e-4),
        (1e-4, 8, "adamw", 5e-5),
        (1e-4, 2, "adamw", 3e-5),  # clipped from below
        (1e-4, 64, "adamw", 1e-4),  # and from above
        (1e-2, 32, "sgd", 2e-2),
        (1e-3, 4, "sgd", 5e-4),
        (1e-2, 256, "sgd", 5e-2),
    ],
)
def test_the_voc_rate_is_scaled_by_the_batch_and_clipped(
    lr: float, batch_size: int, optimizer: str, expected: float
) -> None:
    assert voc_lr(lr, batch_size, optimizer) == pytest.approx(expected)


def voc_factor(step: int, total_steps: int, epochs: int) -> float:
    """The factor as the loop takes it."""
    return voc_schedule(epochs).factor(step, total_steps)


@pytest.mark.parametrize(("epochs", "warmup", "hold"), [(20, 1, 1), (60, 3, 3), (100, 3, 5)])
def test_the_voc_course_is_as_described(epochs: int, warmup: int, hold: int) -> None:
    """In epochs of 10 steps: rise, cosine between, and the last at a hundredth."""
    factors = [voc_factor(step, epochs * 10, epochs) for step in range(epochs * 10)]
    assert factors[: warmup * 10] == pytest.approx(
        [(step + 1) / (warmup * 10) for step in range(warmup * 10)]
    )
    assert factors[-hold * 10 :] == pytest.approx([0.01] * (hold * 10))
    middle = factors[warmup * 10 : -hold * 10]
    wave = [0.5 * (1 + math.cos(math.pi * i / len(middle))) for i in range(len(middle))]
    assert middle == pytest.approx([0.01 + 0.99 * w for w in wave])


def test_a_voc_run_of_few_steps_has_no_warm_up() -> None:
    assert voc_factor(0, 4, epochs=1) == 1.0
