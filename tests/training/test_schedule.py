"""The learning rate's course, against torch's own schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, PolynomialLR

from segprune.training.schedule import DECAYS, Decay, lr_factor


def torch_factors(decay: Decay, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler: LRScheduler
    scheduler = PolynomialLR(optimizer, steps) if decay == "poly" else CosineAnnealingLR(optimizer, steps)
    factors = []
    for _ in range(steps):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_after_the_warm_up_the_decay_is_torch_s_over_what_remains(decay: Decay, warmup: int) -> None:
    factors = [lr_factor(step, 40, warmup_steps=warmup, decay=decay) for step in range(warmup, 40)]
    assert factors == pytest.approx(torch_factors(decay, 40 - warmup), abs=1e-6)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_warm_up_rises_evenly_to_the_base_rate(decay: Decay) -> None:
    factors = [lr_factor(step, 40, warmup_steps=5, decay=decay) for step in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("decay", DECAYS)
def test_the_rate_never_rises_after_the_warm_up_and_no_step_is_wasted_on_zero(decay: Decay) -> None:
    factors = [lr_factor(step, 100, warmup_steps=5, decay=decay) for step in range(5, 100)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] > 0


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", [0, 1])
def test_a_run_of_one_step_takes_it_at_the_base_rate(decay: Decay, warmup: int) -> None:
    assert lr_factor(0, 1, warmup_steps=warmup, decay=decay) == 1.0
