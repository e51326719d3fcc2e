"""Turns, what is counted of them, and percentiles against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from segprune.timing import Turn, interleaved, product, spread


def heard(number: int, seen: list[str], **how: object) -> list[list[float]]:
    turns = [
        Turn(lambda i=i: seen.append(f"call {i}"), lambda i=i: seen.append(f"ready {i}"))  # type: ignore[misc]
        for i in range(number)
    ]
    return interleaved(turns, **how)  # type: ignore[arg-type]


def test_every_round_gives_each_its_turn_in_order() -> None:
    seen: list[str] = []
    times = heard(2, seen, max_rounds=4, max_seconds=60.0)
    assert seen == ["ready 0", "call 0", "ready 1", "call 1"] * 4
    assert [len(row) for row in times] == [4, 4]


def test_settling_puts_a_call_before_each_that_counts() -> None:
    seen: list[str] = []
    times = heard(1, seen, max_rounds=3, max_seconds=60.0, settle=True)
    assert seen == ["ready 0", "call 0", "call 0"] * 3
    assert len(times[0]) == 3


def test_no_new_round_begins_once_time_is_up_but_three_are_run() -> None:
    told: list[tuple[int, int]] = []
    times = heard(2, [], max_rounds=50, max_seconds=0.0, progress=lambda done, most: told.append((done, most)))
    assert [len(row) for row in times] == [3, 3]
    assert told == [(1, 50), (2, 50), (3, 50)]


@pytest.mark.parametrize("number", [2, 3, 100, 257])
def test_percentiles_are_numpys(number: int) -> None:
    times = np.random.default_rng(number).lognormal(size=number)
    found = spread(times.tolist())
    assert [found.median_ms, found.p90_ms, found.p99_ms] == pytest.approx(np.percentile(times, [50, 90, 99]).tolist())
    assert found.runs == number


def test_the_product_is_one_of_square_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segprune.timing.PRODUCT_SIDE", 8)
    turn, macs = product(torch.device("cpu"), lambda: None)
    result = turn.call()
    assert isinstance(result, torch.Tensor)
    assert (result.shape, macs) == ((8, 8), 512)
