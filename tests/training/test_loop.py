"""The training loop's laws on a tiny network: what it learns, shows, counts and scores."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from segprune.data import SegmentationData, write_shapes
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.training.loop import train
from tests.training.tiny import (
    NUM_CLASSES,
    Pointwise,
    config_of,
    recorded,
    same,
    splits_of,
    tiny_model,
    weights_of,
)


def test_the_loss_falls_when_a_few_pictures_are_learnt_by_heart(
    data: Path, cpu: Accelerator
) -> None:
    config = config_of(data, epochs=40, batch_size=4, lr=1e-2, scale=(1.0, 1.0), eval_every=40)
    _, results, _ = recorded(tiny_model(), config, cpu)
    losses = [result.loss for result in results]
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])


def test_the_network_trains_in_training_mode_after_every_score_too(
    data: Path, cpu: Accelerator
) -> None:
    model, modes = tiny_model().eval(), []
    on_step = lambda done, total, loss, lr: modes.append([m.training for m in model.modules()])  # noqa: E731
    train(model, *config_of(data), accelerator=cpu, on_step=on_step)
    assert len(modes) == 12
    assert all(all(mode) for mode in modes)


def test_two_runs_of_one_seed_are_the_same_to_the_bit_and_of_another_seed_not(
    data: Path, cpu: Accelerator
) -> None:
    runs = []
    for seed in (1, 1, 2):
        model = tiny_model()
        torch.manual_seed(os.getpid())  # what was drawn before must not matter
        recorded(model, config_of(data, epochs=1, seed=seed), cpu)
        runs.append(weights_of(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_the_score_is_that_of_evaluate_and_the_last_one_is_returned(
    data: Path, cpu: Accelerator
) -> None:
    model = tiny_model()
    score, results, _ = recorded(model, config_of(data), cpu)
    assert (
        score
        == results[-1].score
        == evaluate(model, splits_of(data).val, NUM_CLASSES, EvalMode(input_shape=(32, 32)))
    )


def test_the_ignored_label_has_no_influence(tmp_path: Path, cpu: Accelerator) -> None:
    runs = []
    for ignored in (255, 200):
        root = write_shapes(tmp_path / str(ignored), num_train=4, num_val=2, size=(32, 48))
        for path in (root / "SegmentationClass").glob("train*.png"):
            mask = np.array(Image.open(path))
            mask[:, :20] = ignored
            Image.fromarray(mask).save(path)
        model = tiny_model()
        train(model, *config_of(tmp_path / str(ignored), epochs=1), accelerator=cpu)
        runs.append(weights_of(model))
    assert same(*runs)


def test_a_loss_that_is_no_longer_finite_stops_the_run(data: Path, cpu: Accelerator) -> None:
    with pytest.raises(
        ValueError,
        match=r"The loss became (nan|inf) in epoch 1, batch \d \(step \d of 12\); lower `lr` \(it was 1e\+30\) and",
    ):
        train(tiny_model(), *config_of(data, lr=1e30), accelerator=cpu)


def test_weights_that_the_last_step_ruined_are_not_saved(data: Path, cpu: Accelerator) -> None:
    config, saved = config_of(data, epochs=1), []
    model = tiny_model()

    def ruin(done: int, total: int, loss: float, lr: float) -> None:
        if done == total:
            next(model.parameters()).data.fill_(float("nan"))

    with pytest.raises(ValueError, match="A weight became NaN or infinite in epoch 1"):
        train(
            model,
            *config,
            accelerator=cpu,
            on_step=ruin,
            on_epoch=lambda *given: saved.append(given),
        )
    assert not saved


def test_scores_come_every_so_many_epochs_and_after_the_last(
    data: Path, cpu: Accelerator
) -> None:
    _, results, _ = recorded(Pointwise(), config_of(data, epochs=5, eval_every=2), cpu)
    assert [result.epoch for result in results] == [1, 2, 3, 4, 5]
    assert [result.score is not None for result in results] == [False, True, False, True, True]


def test_best_is_only_what_beats_all_scores_before(data: Path, cpu: Accelerator) -> None:
    config = config_of(data, lr=1e-12)  # so little that no score changes
    _, results, states = recorded(Pointwise(), config, cpu)
    assert [result.best for result in results] == [True, False, False]
    assert {state.best_miou for state in states} == {results[0].score.miou}
    _, results, _ = recorded(Pointwise(), config, cpu, replace(states[0], best_miou=0.0))
    assert [result.best for result in results] == [True, False]


def test_steps_are_counted_and_the_rate_follows_the_schedule(
    data: Path, cpu: Accelerator
) -> None:
    seen: list[tuple[int, int, float]] = []
    config = config_of(data, warmup=0.25, lr=0.01)
    train(
        Pointwise(),
        *config,
        accelerator=cpu,
        on_step=lambda done, total, loss, lr: seen.append((done, total, lr)),
    )
    rates = [0.01 * factor for factor in [1 / 3, 2 / 3, 1, *(1 - i / 9 for i in range(9))]]
    assert [(done, total) for done, total, _ in seen] == [(i, 12) for i in range(1, 13)]
    assert [lr for _, _, lr in seen] == pytest.approx(rates)


@pytest.mark.parametrize(("batch_size", "steps"), [(3, 2), (8, 1), (1, 8)])
def test_an_epoch_shows_every_picture_at_most_once_in_an_order_of_its_own(
    data: Path, cpu: Accelerator, monkeypatch: pytest.MonkeyPatch, batch_size: int, steps: int
) -> None:
    shown: list[list[int]] = []
    load = SegmentationData.__getitem__

    def noted(self: SegmentationData, index: int) -> tuple[Tensor, Tensor]:
        shown[-1].append(index)
        return load(self, index)

    monkeypatch.setattr(SegmentationData, "__getitem__", noted)
    monkeypatch.setattr(SegmentationData, "set_epoch", lambda self, epoch: shown.append([]))
    train(tiny_model(), *config_of(data, batch_size=batch_size), accelerator=cpu)
    assert [len(indices) for indices in shown] == [batch_size * steps] * 3
    assert all(len(set(indices)) == len(indices) for indices in shown)
    assert len({tuple(indices) for indices in shown}) == 3


def test_fewer_pictures_than_a_batch_make_one_short_batch(
    tmp_path: Path, cpu: Accelerator
) -> None:
    write_shapes(tmp_path, num_train=3, num_val=1, size=(32, 48))
    few, exact = tiny_model(), tiny_model()
    seen: list[tuple[int, int]] = []
    for model, batch_size in ((few, 8), (exact, 3)):
        config = config_of(tmp_path, epochs=2, batch_size=batch_size)
        train(
            model,
            *config,
            accelerator=cpu,
            on_step=lambda done, total, loss, lr: seen.append((done, total)),
        )
    assert seen == [(1, 2), (2, 2)] * 2
    assert same(weights_of(few), weights_of(exact))
