"""A run that stops anywhere goes on to the same bits; and what it goes on with."""

from __future__ import annotations

import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from segprune.data import write_shapes
from segprune.inference.evaluate import Score
from segprune.training.loop import train
from segprune.training.state import TrainingInterrupted, TrainState, check_same_run
from tests.training.tiny import (
    Pointwise,
    config_of,
    interrupt,
    recorded,
    same,
    through_a_file,
    tiny_model,
    weights_of,
)


@pytest.mark.parametrize(
    ("changes", "step"),  # at an epoch's start, its end, in the next one, just before the end
    [
        ({}, 4),
        ({"ema": 0.9}, 1),
        ({"ema": 0.9}, 6),
        ({"freeze_epochs": 2}, 4),
        ({"freeze_epochs": 2}, 11),
    ],
    ids=str,
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    data: Path, cpu: Accelerator, step: int, changes: dict[str, Any]
) -> None:
    config = config_of(data, **changes)
    whole = tiny_model()
    score, results, _ = recorded(whole, config, cpu)
    state = through_a_file(interrupt(tiny_model(), config, cpu, step))
    assert (state.epoch, state.step) == ((step - 1) // 4, (step - 1) % 4 + 1)
    resumed = tiny_model(seed=9)
    torch.manual_seed(9)
    assert recorded(resumed, config, cpu, state)[:2] == (score, results[state.epoch :])
    assert same(weights_of(resumed), weights_of(whole))


def test_a_run_goes_on_from_the_state_of_any_epoch(data: Path, cpu: Accelerator) -> None:
    whole = tiny_model()
    score, results, states = recorded(whole, config_of(data), cpu)
    assert [(state.epoch, state.step, state.losses) for state in states] == [
        (1, 0, []),
        (2, 0, []),
        (3, 0, []),
    ]
    for state in states[:2]:
        resumed = tiny_model(seed=9)
        assert recorded(resumed, config_of(data), cpu, state)[:2] == (
            score,
            results[state.epoch :],
        )
        assert same(weights_of(resumed), weights_of(whole))


def test_states_come_every_so_many_steps_within_epochs_and_a_run_goes_on_from_each(
    data: Path, cpu: Accelerator
) -> None:
    whole = tiny_model()
    train(whole, *config_of(data), accelerator=cpu)
    for every, expected in (
        (0, []),
        (3, [(0, 3), (1, 3), (2, 3)]),
        (4, []),
        (2, [(0, 2), (1, 2), (2, 2)]),
    ):
        states: list[TrainState] = []
        train(
            tiny_model(),
            *config_of(data, save_steps=every),
            accelerator=cpu,
            on_state=states.append,
        )
        # the first one comes before the first step, and after an epoch's last one `on_epoch` has it
        assert [(state.epoch, state.step) for state in states] == [(0, 0), *expected]
    for state in (states[0], *map(through_a_file, states[1:])):
        resumed = tiny_model(seed=9)
        train(resumed, *config_of(data, save_steps=7), accelerator=cpu, state=state)
        assert same(weights_of(resumed), weights_of(whole))


def test_sigterm_stops_a_run_as_ctrl_c_does(data: Path, cpu: Accelerator) -> None:
    states = [
        interrupt(tiny_model(), config_of(data), cpu, 6, by)
        for by in (signal.SIGINT, signal.SIGTERM)
    ]
    assert (states[0].epoch, states[0].step) == (states[1].epoch, states[1].step) == (1, 2)
    assert same(states[0].model, states[1].model)


def test_a_state_is_a_copy_that_training_on_leaves_alone(data: Path, cpu: Accelerator) -> None:
    state = interrupt(tiny_model(), config_of(data), cpu, 6)
    before = through_a_file(state)
    train(tiny_model(seed=9), *config_of(data), accelerator=cpu, state=state)
    assert same(state.model, before.model)
    moments, moments_before = state.optimizer["state"], before.optimizer["state"]
    assert len(moments) > 0
    assert all(same(moments[number], moments_before[number]) for number in moments)
    assert (state.epoch, state.step, state.losses) == (before.epoch, before.step, before.losses)


def test_a_run_that_was_complete_is_scored_again_and_not_trained(
    data: Path, cpu: Accelerator
) -> None:
    score, _, states = recorded(tiny_model(), config_of(data), cpu)
    resumed = tiny_model(seed=9)
    assert recorded(resumed, config_of(data), cpu, states[-1]) == (score, [], [])
    assert same(weights_of(resumed), states[-1].model)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lr", 1e-4, r"`lr` 0\.003, now it is 0\.0001"),
        ("batch_size", 4, "`batch_size` 2, now it is 4"),
        ("epochs", 9, "`epochs` 3, now it is 9"),
        ("seed", 12, "`seed` 11, now it is 12"),
        ("scale", (1.0, 2.0), r"`scale` \(0\.5, 2\.0\), now it is \(1\.0, 2\.0\)"),
        ("input_shape", (32, 64), r"`input_shape` \(32, 32\), now it is \(32, 64\)"),
        ("label_smoothing", 0.1, r"`label_smoothing` 0\.0, now it is 0\.1"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    data: Path, cpu: Accelerator, name: str, value: object, said: str
) -> None:
    state = interrupt(Pointwise(), config_of(data), cpu, 1)
    with pytest.raises(
        ValueError,
        match=f"The run to resume had {said}; resume with the same settings, or start anew",
    ):
        train(Pointwise(), *config_of(data, **{name: value}), accelerator=cpu, state=state)


def test_a_run_does_not_go_on_with_other_images(
    tmp_path: Path, data: Path, cpu: Accelerator
) -> None:
    state = interrupt(Pointwise(), config_of(data), cpu, 1)
    write_shapes(tmp_path, num_train=7, num_val=1, size=(32, 48))
    with pytest.raises(ValueError, match="The run to resume had other images"):
        train(Pointwise(), *config_of(tmp_path), accelerator=cpu, state=state)


def test_a_run_goes_on_when_the_data_moved_and_the_scores_come_at_other_times(
    tmp_path: Path, data: Path, cpu: Accelerator
) -> None:
    whole, resumed = tiny_model(), tiny_model(seed=9)
    train(whole, *config_of(data), accelerator=cpu)
    state = interrupt(tiny_model(), config_of(data), cpu, 2)
    moved = shutil.copytree(data, tmp_path / "moved")
    train(resumed, *config_of(moved, eval_every=2), accelerator=cpu, state=state)
    assert same(weights_of(resumed), weights_of(whole))


def test_the_handlers_of_signals_are_put_back_however_a_run_ends(
    data: Path, cpu: Accelerator
) -> None:
    handlers = lambda: [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]  # noqa: E731
    before = handlers()
    train(Pointwise(), *config_of(data, epochs=1), accelerator=cpu)
    assert handlers() == before
    interrupt(Pointwise(), config_of(data), cpu, 2)
    assert handlers() == before
    with pytest.raises(ValueError, match="The loss became"):
        train(tiny_model(), *config_of(data, lr=1e30), accelerator=cpu)
    assert handlers() == before


def test_the_interruption_says_where_the_run_stood(data: Path, cpu: Accelerator) -> None:
    message = str(TrainingInterrupted(interrupt(Pointwise(), config_of(data), cpu, 6)))
    assert message == "Training was interrupted in epoch 2 after 2 batches."


def test_a_second_ctrl_c_interrupts_at_once(data: Path, cpu: Accelerator) -> None:
    def press_twice(done: int, total: int, loss: float, lr: float) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(Pointwise(), *config_of(data), accelerator=cpu, on_step=press_twice)


def test_outside_the_main_thread_a_run_leaves_signals_alone(
    data: Path, cpu: Accelerator
) -> None:
    scores: list[Score] = []
    thread = threading.Thread(
        target=lambda: scores.append(train(Pointwise(), *config_of(data), accelerator=cpu))
    )
    thread.start()
    thread.join()
    assert len(scores) == 1


def test_the_scale_of_the_loss_goes_on_where_it_stopped(data: Path) -> None:
    """What accelerate does for fp16 on a GPU, here with fp32 on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    scalers = []

    def scaled() -> Accelerator:
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        scalers.append(accelerator.scaler)
        return accelerator

    whole, resumed = tiny_model(), tiny_model(seed=9)
    train(whole, *config_of(data), accelerator=scaled())
    state = interrupt(tiny_model(), config_of(data), scaled(), 5)
    train(resumed, *config_of(data), accelerator=scaled(), state=through_a_file(state))
    assert scalers[0].state_dict() == scalers[2].state_dict()
    assert scalers[0].get_scale() == 8.0 * 2**4  # 12 steps
    assert same(weights_of(resumed), weights_of(whole))


def test_a_state_that_does_not_say_its_teacher_goes_on_with_any() -> None:
    check_same_run({"lr": 0.1}, {"lr": 0.1, "teacher": "0123"})
    with pytest.raises(
        ValueError,
        match=r"^The run to resume had another teacher \(its weights differ\); give the same",
    ):
        check_same_run({"lr": 0.1, "teacher": "4567"}, {"lr": 0.1, "teacher": "0123"})
