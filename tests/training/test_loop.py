"""The training loop's laws on a tiny network: it learns, stops anywhere, and goes on to the same bits."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn

from segprune.data import SegmentationData, open_source, write_shapes
from segprune.model import SegFormer
from segprune.spec import BlockSpec, standard_spec
from segprune.training.config import TrainConfig
from segprune.training.distill import Distillation
from segprune.training.evaluate import EvalMode, Score, evaluate
from segprune.training.loop import train
from segprune.training.losses import SegmentationLoss, parse_loss
from segprune.training.state import EpochResult, Splits, TrainingInterrupted, TrainState

NUM_CLASSES = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, num_train=8, num_val=4, size=(32, 48), seed=5)
    return folder


@pytest.fixture
def cpu() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny_model(seed: int = 0) -> SegFormer:
    """One block of 8 channels per stage; dropout and stochastic depth as in the real ones."""
    spec = standard_spec("b0", NUM_CLASSES, decoder_dim=8)
    stages = []
    for stage in spec.stages:
        reduction_dim = None if stage.reduction_ratio == 1 else 8
        block = BlockSpec(num_heads=1, qk_dim=8, v_dim=8, ffn_dim=16, reduction_dim=reduction_dim, qk_scale=8**-0.5)
        stages.append(replace(stage, width=8, blocks=(block,)))
    torch.manual_seed(seed)
    return SegFormer(replace(spec, stages=tuple(stages)))


class Pointwise(nn.Module):
    """The least that can be trained: no encoder, no statistics, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


Setup = tuple[TrainConfig, Splits]


def splits_of(data: Path) -> Splits:
    source = open_source(data)
    return Splits(source.split("train"), source.split("val"))


def config_of(data: Path, **changes: Any) -> Setup:
    plain = TrainConfig(NUM_CLASSES, input_shape=(32, 32), epochs=3, batch_size=2, lr=3e-3, num_workers=0, warmup=0.1)
    return replace(plain, **changes), splits_of(data)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], prefix: str = "") -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one if name.startswith(prefix))


def through_a_file(state: TrainState) -> TrainState:
    """Saved and read back as safe data, without pickled code."""
    file = io.BytesIO()
    torch.save(vars(state), file)
    file.seek(0)
    return TrainState(**torch.load(file, weights_only=True))


def interrupt(model: nn.Module, config: Setup, accelerator: Accelerator, step: int) -> TrainState:
    """Train until Ctrl-C in the given step; the state that comes with the exception."""

    def press(done: int, total: int, loss: float, lr: float) -> None:
        if done == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingInterrupted) as caught:
        train(model, *config, accelerator=accelerator, on_step=press)
    return caught.value.state


def recorded(
    model: nn.Module, config: Setup, accelerator: Accelerator, state: TrainState | None = None
) -> tuple[Score, list[EpochResult], list[TrainState]]:
    results: list[EpochResult] = []
    states: list[TrainState] = []

    def note(result: EpochResult, state: TrainState) -> None:
        results.append(result)
        states.append(state)

    return train(model, *config, accelerator=accelerator, state=state, on_epoch=note), results, states


def test_the_loss_falls_when_a_few_pictures_are_learnt_by_heart(data: Path, cpu: Accelerator) -> None:
    config = config_of(data, epochs=40, batch_size=4, lr=1e-2, scale=(1.0, 1.0), eval_every=40)
    _, results, _ = recorded(tiny_model(), config, cpu)
    losses = [result.loss for result in results]
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])


def test_the_network_trains_in_training_mode_after_every_score_too(data: Path, cpu: Accelerator) -> None:
    model, modes = tiny_model().eval(), []
    on_step = lambda done, total, loss, lr: modes.append([m.training for m in model.modules()])  # noqa: E731
    train(model, *config_of(data), accelerator=cpu, on_step=on_step)
    assert len(modes) == 12
    assert all(all(mode) for mode in modes)


def test_two_runs_of_one_seed_are_the_same_to_the_bit_and_of_another_seed_not(data: Path, cpu: Accelerator) -> None:
    runs = []
    for seed in (1, 1, 2):
        model = tiny_model()
        torch.manual_seed(os.getpid())  # what was drawn before must not matter
        recorded(model, config_of(data, epochs=1, seed=seed), cpu)
        runs.append(weights_of(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("step", [1, 4, 6, 11])  # at an epoch's start, its end, in the next one, just before the end
@pytest.mark.parametrize("freeze_epochs", [0, 2])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    data: Path, cpu: Accelerator, step: int, freeze_epochs: int
) -> None:
    config = config_of(data, freeze_epochs=freeze_epochs)
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
    assert [(state.epoch, state.step, state.losses) for state in states] == [(1, 0, []), (2, 0, []), (3, 0, [])]
    for state in states[:2]:
        resumed = tiny_model(seed=9)
        assert recorded(resumed, config_of(data), cpu, state)[:2] == (score, results[state.epoch :])
        assert same(weights_of(resumed), weights_of(whole))


def test_a_state_is_a_copy_that_training_on_leaves_alone(data: Path, cpu: Accelerator) -> None:
    state = interrupt(tiny_model(), config_of(data), cpu, 6)
    before = through_a_file(state)
    train(tiny_model(seed=9), *config_of(data), accelerator=cpu, state=state)
    assert same(state.model, before.model)
    moments, moments_before = state.optimizer["state"], before.optimizer["state"]
    assert len(moments) > 0
    assert all(same(moments[number], moments_before[number]) for number in moments)
    assert (state.epoch, state.step, state.losses) == (before.epoch, before.step, before.losses)


def test_a_run_that_was_complete_is_scored_again_and_not_trained(data: Path, cpu: Accelerator) -> None:
    score, _, states = recorded(tiny_model(), config_of(data), cpu)
    resumed = tiny_model(seed=9)
    assert recorded(resumed, config_of(data), cpu, states[-1]) == (score, [], [])
    assert same(weights_of(resumed), states[-1].model)


def test_the_score_is_that_of_evaluate_and_the_last_one_is_returned(data: Path, cpu: Accelerator) -> None:
    model = tiny_model()
    score, results, _ = recorded(model, config_of(data), cpu)
    assert (
        score == results[-1].score == evaluate(model, splits_of(data).val, NUM_CLASSES, EvalMode(input_shape=(32, 32)))
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lr", 1e-4, r"lr 0\.003, now it is 0\.0001"),
        ("batch_size", 4, "batch_size 2, now it is 4"),
        ("epochs", 9, "epochs 3, now it is 9"),
        ("seed", 12, "seed 11, now it is 12"),
        ("scale", (1.0, 2.0), r"scale \(0\.5, 2\.0\), now it is \(1\.0, 2\.0\)"),
        ("input_shape", (32, 64), r"input_shape \(32, 32\), now it is \(32, 64\)"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    data: Path, cpu: Accelerator, name: str, value: object, said: str
) -> None:
    state = interrupt(Pointwise(), config_of(data), cpu, 1)
    with pytest.raises(ValueError, match=f"The run to resume had {said}; resume with the same settings, or start anew"):
        train(Pointwise(), *config_of(data, **{name: value}), accelerator=cpu, state=state)


def test_a_run_does_not_go_on_with_other_pictures(tmp_path: Path, data: Path, cpu: Accelerator) -> None:
    state = interrupt(Pointwise(), config_of(data), cpu, 1)
    write_shapes(tmp_path, num_train=7, num_val=1, size=(32, 48))
    with pytest.raises(ValueError, match="The run to resume had other pictures"):
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


def test_a_frozen_encoder_stands_still_and_then_trains(data: Path, cpu: Accelerator) -> None:
    model = tiny_model()
    start = weights_of(model)
    _, _, states = recorded(model, config_of(data, epochs=2, freeze_epochs=1), cpu)
    first, second = (state.model for state in states)
    assert same(start, first, "encoder.")
    assert not same(start, first, "decode_head.")
    moved = [
        name for name, _ in model.encoder.named_parameters(prefix="encoder") if not second[name].equal(first[name])
    ]
    assert len(moved) > 20


@pytest.mark.parametrize("stop", [False, True])
def test_what_was_frozen_is_trainable_again_afterwards_and_what_was_not_stays(
    data: Path, cpu: Accelerator, stop: bool
) -> None:
    model = tiny_model()
    start = weights_of(model)
    model.encoder.stages[0].requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = config_of(data, epochs=2, freeze_epochs=2)
    if stop:
        interrupt(model, config, cpu, 3)
    else:
        train(model, *config, accelerator=cpu)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert same(start, weights_of(model), "encoder.")


def test_freezing_needs_an_encoder(data: Path, cpu: Accelerator) -> None:
    with pytest.raises(
        ValueError, match="freeze_epochs needs a submodule `encoder`, which Pointwise lacks; set it to 0"
    ):
        train(Pointwise(), *config_of(data, freeze_epochs=1), accelerator=cpu)


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decay": "step"}, "Decay 'step' is unknown; choose one of poly, cosine, constant"),
        ({"epochs": 0}, "epochs is 0; it must be above 0"),
        ({"batch_size": -1}, "batch_size is -1; it must be above 0"),
        ({"lr": 0.0}, r"lr is 0\.0; it must be above 0"),
        ({"eval_every": 0}, "eval_every is 0; it must be above 0"),
        ({"warmup": 1.0}, r"warmup is 1\.0; it is a share, from 0 to below 1"),
        ({"warmup": -0.1}, r"warmup is -0\.1; it is a share"),
        ({"freeze_epochs": -1}, "freeze_epochs is -1; it must be 0 or above"),
        ({"optimizer": "lion"}, "Optimizer 'lion' is unknown; choose one of adamw, sgd"),
        ({"accumulate": 0}, "accumulate is 0; it must be above 0"),
        ({"clip_norm": -1.0}, r"clip_norm is -1\.0; it must be 0 or above"),
        ({"ema": 1.0}, r"ema is 1\.0; it is a share, from 0 to below 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_of(Path("nowhere"), **changes)


def test_a_loss_that_is_no_longer_finite_stops_the_run(data: Path, cpu: Accelerator) -> None:
    with pytest.raises(
        ValueError,
        match=r"The loss became (nan|inf) in epoch 1, batch \d \(step \d of 12\); lower --lr \(it was 1e\+30\) and",
    ):
        train(tiny_model(), *config_of(data, lr=1e30), accelerator=cpu)


def test_weights_that_the_last_step_ruined_are_not_saved(data: Path, cpu: Accelerator) -> None:
    config, saved = config_of(data, epochs=1), []
    model = tiny_model()

    def ruin(done: int, total: int, loss: float, lr: float) -> None:
        if done == total:
            next(model.parameters()).data.fill_(float("nan"))

    with pytest.raises(ValueError, match="A weight became NaN or infinite in epoch 1"):
        train(model, *config, accelerator=cpu, on_step=ruin, on_epoch=lambda *given: saved.append(given))
    assert not saved


def test_scores_come_every_so_many_epochs_and_after_the_last(data: Path, cpu: Accelerator) -> None:
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


def test_steps_are_counted_and_the_rate_follows_the_schedule(data: Path, cpu: Accelerator) -> None:
    seen: list[tuple[int, int, float]] = []
    config = config_of(data, warmup=0.25, lr=0.01)
    train(Pointwise(), *config, accelerator=cpu, on_step=lambda done, total, loss, lr: seen.append((done, total, lr)))
    rates = [0.01 * factor for factor in [1 / 3, 2 / 3, 1, *(1 - i / 9 for i in range(9))]]
    assert [(done, total) for done, total, _ in seen] == [(i, 12) for i in range(1, 13)]
    assert [lr for _, _, lr in seen] == pytest.approx(rates)


def test_weights_decay_but_biases_and_norms_do_not(tmp_path: Path, cpu: Accelerator) -> None:
    root = write_shapes(tmp_path, num_train=1, num_val=1, size=(32, 48))
    for path in (root / "SegmentationClass").glob("train*.png"):
        Image.new("L", (48, 32), 255).save(path)  # nothing labelled: the gradient is 0
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    train(model, *config_of(tmp_path, epochs=1, lr=0.1, weight_decay=0.5, warmup=0.0), accelerator=cpu)
    for name, parameter in model.named_parameters():
        expected = 0.95 if parameter.dim() > 1 else 1.0
        assert torch.allclose(parameter, torch.tensor(expected)), name


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


def test_fewer_pictures_than_a_batch_make_one_short_batch(tmp_path: Path, cpu: Accelerator) -> None:
    write_shapes(tmp_path, num_train=3, num_val=1, size=(32, 48))
    few, exact = tiny_model(), tiny_model()
    seen: list[tuple[int, int]] = []
    for model, batch_size in ((few, 8), (exact, 3)):
        config = config_of(tmp_path, epochs=2, batch_size=batch_size)
        train(model, *config, accelerator=cpu, on_step=lambda done, total, loss, lr: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)] * 2
    assert same(weights_of(few), weights_of(exact))


def test_the_handler_of_ctrl_c_is_put_back_however_a_run_ends(data: Path, cpu: Accelerator) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(Pointwise(), *config_of(data, epochs=1), accelerator=cpu)
    assert signal.getsignal(signal.SIGINT) is before
    interrupt(Pointwise(), config_of(data), cpu, 2)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="The loss became"):
        train(tiny_model(), *config_of(data, lr=1e30), accelerator=cpu)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_interruption_says_where_the_run_stood(data: Path, cpu: Accelerator) -> None:
    message = str(TrainingInterrupted(interrupt(Pointwise(), config_of(data), cpu, 6)))
    assert message == "Training was interrupted in epoch 2 after 2 batches."


def test_a_second_ctrl_c_interrupts_at_once(data: Path, cpu: Accelerator) -> None:
    def press_twice(done: int, total: int, loss: float, lr: float) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(Pointwise(), *config_of(data), accelerator=cpu, on_step=press_twice)


def test_outside_the_main_thread_a_run_leaves_signals_alone(data: Path, cpu: Accelerator) -> None:
    scores: list[Score] = []
    thread = threading.Thread(target=lambda: scores.append(train(Pointwise(), *config_of(data), accelerator=cpu)))
    thread.start()
    thread.join()
    assert len(scores) == 1


def test_mixed_precision_is_used_and_leaves_no_trace_on_the_model(data: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    model = tiny_model()
    model.decode_head.classifier.register_forward_hook(lambda m, args, out: seen[m.training].add(out.dtype))
    try:
        config = config_of(data, epochs=1, mixed_precision="bf16")
        train(model, *config, accelerator=Accelerator(cpu=True, mixed_precision="bf16"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert "forward" not in vars(model)


def test_mixed_precision_must_be_the_accelerator_s(data: Path, cpu: Accelerator) -> None:
    with pytest.raises(ValueError, match="mixed_precision is fp16, the accelerator's no; give both the same"):
        train(Pointwise(), *config_of(data, mixed_precision="fp16"), accelerator=cpu)


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


def test_processes_that_accelerate_did_not_join_are_refused(
    data: Path, cpu: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes were started but only 1 joined; start them with torchrun"):
        train(Pointwise(), *config_of(data), accelerator=cpu)


@pytest.mark.parametrize(
    ("processes", "changes", "said"),
    [
        (9, {"batch_size": 9}, "8 training pictures came for 9 processes and 1 pieces; start fewer, so that each gets"),
        (
            2,
            {"batch_size": 3},
            "batch_size is 3, which 2 processes and 1 pieces do not share evenly; make it a multiple of 2",
        ),
        (
            2,
            {"accumulate": 2},
            "batch_size is 2, which 2 processes and 2 pieces do not share evenly; make it a multiple of 4",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    data: Path, processes: int, changes: dict[str, Any], said: str
) -> None:
    several = SimpleNamespace(num_processes=processes, process_index=0, mixed_precision="no")
    with pytest.raises(ValueError, match=said):
        train(tiny_model(), *config_of(data, **changes), accelerator=several)


def quiet_model(seed: int = 0) -> SegFormer:
    """The tiny one without dropout and stochastic depth, whose random numbers differ between processes."""
    spec = tiny_model().spec
    torch.manual_seed(seed)
    return SegFormer(replace(spec, numerics=replace(spec.numerics, head_dropout=0.0, drop_path=0.0)))


def taught(data: Path, **changes: Any) -> Setup:
    """Settings in which everything takes part that several processes or pieces must share: padding without labels,
    statistics, a frozen start, a teacher, clipping, an average. SGD, since AdamW makes steps of rounding errors where
    gradients are 0, as those of the keys' biases are."""
    changes = {
        "freeze_epochs": 1,
        "clip_norm": 1.0,
        "ema": 0.9,
        "batch_size": 4,
        "lr": 0.05,
        "optimizer": "sgd",
    } | changes
    loss = SegmentationLoss(parse_loss("ce+0.5*dice"), label_smoothing=0.1)
    return config_of(data, loss=loss, distillation=Distillation(), **changes)


def losses_of(
    model: nn.Module, setup: Setup, accelerator: Accelerator, teacher: SegFormer
) -> tuple[list[float], Score]:
    losses: list[float] = []
    on_step = lambda done, total, loss, lr: losses.append(loss)  # noqa: E731
    return losses, train(model, *setup, accelerator=accelerator, teacher=teacher, on_step=on_step)


TWO_PROCESSES = """
import importlib.util, sys
from pathlib import Path
import torch
from accelerate import Accelerator

spec = importlib.util.spec_from_file_location("laws", sys.argv[1])
laws = sys.modules["laws"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(laws)
data, out = Path(sys.argv[2]), Path(sys.argv[3])
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = laws.quiet_model()
losses, score = laws.losses_of(model, laws.taught(data), accelerator, laws.quiet_model(7))
record = {"weights": laws.weights_of(model), "losses": losses, "miou": score.miou, "iou": score.iou}
torch.save(record, out / f"{accelerator.process_index}.pt")
accelerator.end_training()
"""


def test_two_processes_take_the_steps_of_one_with_the_same_batch(tmp_path: Path, data: Path, cpu: Accelerator) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([*command, script, __file__, data, tmp_path], check=True, timeout=300, env=environment)
    first, second = (torch.load(tmp_path / f"{process}.pt") for process in (0, 1))
    assert same(first["weights"], second["weights"])
    assert (first["losses"], first["iou"]) == (second["losses"], second["iou"])

    alone = quiet_model()
    losses, score = losses_of(alone, taught(data), cpu, quiet_model(7))
    assert first["losses"] == pytest.approx(losses, rel=1e-4)
    for name, tensor in weights_of(alone).items():
        torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-3, atol=1e-4)
    assert first["miou"] == pytest.approx(score.miou, abs=0.01)
