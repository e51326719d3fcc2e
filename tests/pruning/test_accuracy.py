"""The search for the smallest network within a drop: on curves whose answer is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from segprune.inference.drop import Drop
from segprune.model import SegFormer
from segprune.pruning.budget import by_rate
from segprune.pruning.budget.accuracy import MAX_TRIALS, Search, Trial, by_accuracy
from segprune.pruning.curves import measure_curves
from segprune.pruning.options import PruneOptions
from segprune.pruning.plan import Plan
from segprune.pruning.pruner import Pruner

REACH = (0.073, 0.948)
Loss = Callable[[float], float]


class Cut(nn.Module):
    """Stands for the network that was cut at a rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate


def search(
    loss: Loss,
    on_trial: Callable[[Trial], None] | None = None,
    *,
    max_drop: float = 1.0,
    noise: float = 0.0,
    most: float = 1.0,
) -> Search:
    """Searches on a curve; on a part of the images it is seen with noise, and no rate above `most` can be cut."""
    rng = random.Random(0)

    def decide(options: PruneOptions) -> Plan:
        assert isinstance(options.pruning_rate, float)
        assert options.max_drop is None
        if options.pruning_rate > most:
            raise ValueError(f"Rate {options.pruning_rate:g} is out of reach.")
        return Plan({}, {"params": options.pruning_rate})

    def score(network: nn.Module, whole: bool) -> Drop:
        assert isinstance(network, Cut)
        points = loss(network.rate)
        if whole or not noise:
            return Drop(points, 0.0, 100)
        return Drop(points + rng.gauss(0.0, noise), 2 * noise, 50)

    def make(plan: Plan) -> nn.Module:
        return Cut(plan.removed["params"])

    options = PruneOptions(max_drop=max_drop)
    return by_accuracy(options, REACH, decide, make, score, on_trial)


def exponential(middle: float, slope: float) -> Loss:
    """Loses one point at `middle`."""
    return lambda rate: math.exp(slope * (rate - middle))


@pytest.mark.parametrize("middle", [0.105, 0.335, 0.505, 0.625, 0.785, 0.935])
@pytest.mark.parametrize("slope", [3.0, 12.0, 60.0])
def test_the_chosen_rate_is_the_highest_within_and_one_step_further_loses_more(
    middle: float, slope: float
) -> None:
    result = search(exponential(middle, slope))
    assert result.chosen.rate == pytest.approx(math.floor(100 * middle) / 100)
    assert result.chosen.drop.points <= 1.0
    assert result.smaller is not None
    assert result.smaller.rate == pytest.approx(result.chosen.rate + 0.01)
    assert result.smaller.drop.points > 1.0
    assert result.larger is None or result.larger.rate < result.chosen.rate
    assert len(result.trials) <= MAX_TRIALS


def test_a_smooth_curve_takes_fewer_trials_than_halving_would() -> None:
    trials = [len(search(exponential(m / 100 + 0.005, 12.0)).trials) for m in range(30, 90)]
    assert sum(trials) / len(trials) < 6.0


def test_what_a_part_of_the_images_cannot_decide_is_scored_on_all() -> None:
    seen: list[Trial] = []
    result = search(exponential(0.625, 12.0), seen.append, noise=0.3)
    # The chosen one and the next are known exactly, and those far off were not scored again.
    assert result.smaller is not None
    assert result.chosen.drop.margin == result.smaller.drop.margin == 0.0
    assert result.chosen.drop.points <= 1.0 < result.smaller.drop.points
    assert any(trial.drop.margin for trial in result.trials)
    assert len(seen) > len(result.trials)


def test_a_curve_that_is_not_monotone_still_ends_within_the_drop() -> None:
    rng = random.Random(1)
    bumps = [rng.gauss(0.0, 0.3) for _ in range(101)]
    smooth = exponential(0.6, 10.0)
    result = search(lambda rate: smooth(rate) + bumps[round(100 * rate)], noise=0.2)
    assert result.chosen.drop.points <= 1.0
    assert result.smaller is not None
    assert result.smaller.drop.points > 1.0
    assert len(result.trials) <= MAX_TRIALS


def test_where_nothing_is_lost_the_smallest_network_that_can_be_cut_is_chosen() -> None:
    result = search(lambda rate: -0.1)
    assert (result.chosen.rate, result.smaller) == (0.94, None)
    assert "no group may lose more" in result.limit

    result = search(lambda rate: -0.1, most=0.7)
    assert (result.chosen.rate, result.smaller) == (0.7, None)
    assert "out of reach" in result.limit


def test_if_the_lowest_rate_loses_more_it_is_refused_with_the_least_loss_seen() -> None:
    with pytest.raises(ValueError, match=r"within 0\.5 points .* 2\.08 points, at rate 0\.08"):
        search(lambda rate: 2.0 + rate, max_drop=0.5)


def by_size(network: nn.Module, whole: bool) -> Drop:
    """A point is lost at 40 % of the small network's parameters."""
    share = sum(p.numel() for p in network.parameters()) / 170_000
    return Drop(math.exp(12.0 * (0.4 - share)), 0.0, 1)


def test_a_pruner_searches_in_any_unit_and_returns_what_it_tried(
    small_model: SegFormer,
) -> None:
    state = {name: tensor.clone() for name, tensor in small_model.state_dict().items()}
    for unit in ("params", "macs"):
        pruner = Pruner(small_model, max_drop=1.0, rate_of=unit, round_to=1, repair=False)
        result = pruner.search(by_size)
        chosen = result.chosen
        assert chosen.plan.removed[unit] == pytest.approx(chosen.rate, abs=0.01)
        assert by_size(chosen.network, True).points == chosen.drop.points <= 1.0
        assert result.smaller is not None
        assert result.smaller.drop.points > 1.0
        assert pruner.plan is chosen.plan
    assert all(torch.equal(state[name], t) for name, t in small_model.state_dict().items())


def test_a_latency_is_searched_from_what_folding_saves(
    small_model: SegFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(networks: Sequence[nn.Module], *_: object, **__: object) -> list[object]:
        return [SimpleNamespace(median_ms=ms) for ms in (10.0, 8.0)]

    def by_latency(prepared: Any, scores: Any, options: PruneOptions, **_: Any) -> Plan:
        assert options.budgets["latency"] > 0.2
        return by_rate(prepared, scores, replace(options, rate_of="params"))

    monkeypatch.setattr("segprune.pruning.pruner.measure_latency", measure)
    monkeypatch.setattr("segprune.pruning.pruner.by_latency", by_latency)
    pruner = Pruner(small_model, max_drop=1.0, rate_of="latency", round_to=1, repair=False)
    assert pruner.search(lambda network, whole: Drop(-1.0, 0.0, 1)).chosen.rate > 0.8


def test_what_the_rate_does_not_change_is_measured_once(
    small_model: SegFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []

    def measure(*arguments: Any, **more: Any) -> Any:
        measured.append(arguments)
        return measure_curves(*arguments, **more)

    monkeypatch.setattr("segprune.pruning.budget.curves.measure_curves", measure)
    monkeypatch.setattr("segprune.pruning.budget.accuracy.MAX_TRIALS", 2)
    images = [torch.randn(2, 3, 32, 32).double()]
    pruner = Pruner(small_model, max_drop=1.0, round_to=1, images=images)
    result = pruner.search(by_size)
    assert len(result.trials) == 2
    assert {trial.plan.decided_by for trial in result.trials} == {"curves"}
    assert len(measured) == 1
