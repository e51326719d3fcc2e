"""What the settings of a run do, each by a law; and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn

from segprune.data import write_shapes
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.model import SegFormer
from segprune.training.loop import train
from segprune.training.objective import Student
from segprune.training.options import TrainOptions, complete
from segprune.training.state import EpochResult, TrainState
from tests.training.tiny import (
    NUM_CLASSES,
    Pointwise,
    config_of,
    interrupt,
    losses_of,
    quiet_model,
    recorded,
    same,
    splits_of,
    taught,
    tiny_model,
    weights_of,
)


def test_a_frozen_encoder_stands_still_and_then_trains(data: Path, cpu: Accelerator) -> None:
    model = tiny_model()
    start = weights_of(model)
    _, _, states = recorded(model, config_of(data, epochs=2, freeze_epochs=1), cpu)
    first, second = (state.model for state in states)
    assert same(start, first, "encoder.")
    assert not same(start, first, "decode_head.")
    moved = [
        name
        for name, _ in model.encoder.named_parameters(prefix="encoder")
        if not second[name].equal(first[name])
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
    assert {
        name: parameter.requires_grad for name, parameter in model.named_parameters()
    } == before
    assert same(start, weights_of(model), "encoder.")


def test_freezing_needs_an_encoder(data: Path, cpu: Accelerator) -> None:
    with pytest.raises(
        ValueError,
        match="`freeze_epochs` needs a submodule `encoder`, which Pointwise lacks; set it to 0",
    ):
        train(Pointwise(), *config_of(data, freeze_epochs=1), accelerator=cpu)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decay": "step"}, "`decay` is 'step'; choose one of poly, cosine, constant"),
        ({"optimizer": "lion"}, "`optimizer` is 'lion'; choose one of adamw, sgd"),
        ({"lr_rule": "coco"}, "`lr_rule` is 'coco'; choose one of voc"),
        ({"amp": "fp8"}, "`amp` is 'fp8'; choose one of auto, no, fp16, bf16"),
        ({"epochs": 0}, "`epochs` is 0; it must be above 0"),
        ({"batch_size": -1}, "`batch_size` is -1; it must be above 0"),
        ({"lr": 0.0}, r"`lr` is 0\.0; it must be above 0"),
        ({"head_lr": 0.0}, r"`head_lr` is 0\.0; it must be above 0"),
        ({"head_lr": float("nan")}, "`head_lr` is nan; it must be above 0"),
        ({"eval_every": 0}, "`eval_every` is 0; it must be above 0"),
        ({"accumulate": 0}, "`accumulate` is 0; it must be above 0"),
        ({"freeze_epochs": -1}, "`freeze_epochs` is -1; it must be 0 or above"),
        ({"clip_norm": -1.0}, r"`clip_norm` is -1\.0; it must be 0 or above"),
        ({"warmup": 1.0}, r"`warmup` is 1\.0; it must be a share from 0 to below 1"),
        ({"warmup": -0.1}, r"`warmup` is -0\.1; it must be a share"),
        ({"ema": 1.0}, r"`ema` is 1\.0; it must be a share from 0 to below 1"),
        ({"momentum": 1.0}, r"`momentum` is 1\.0; it must be a share"),
        ({"lr_rule": "voc", "warmup": 0.1}, "`warmup` has no effect with `lr_rule` voc"),
        (
            {"lr_rule": "voc", "warmup": None, "decay": "poly"},
            "`decay` has no effect with `lr_rule` voc",
        ),
        ({"loss": "mse"}, "Loss 'mse' in 'mse' is unknown"),
        (
            {"class_weights": "rare"},
            "`class_weights` is 'rare'; give enet, median, or one number per class",
        ),
        ({"class_weights": "enet", "loss": "dice"}, "`class_weights` has no effect on dice"),
        ({"distill_pixel": -1.0}, r"The pixel weight is -1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_of(Path("nowhere"), **changes)


def test_weights_decay_but_biases_and_norms_do_not(tmp_path: Path, cpu: Accelerator) -> None:
    root = write_shapes(tmp_path, num_train=1, num_val=1, size=(32, 48))
    for path in (root / "SegmentationClass").glob("train*.png"):
        Image.new("L", (48, 32), 255).save(path)  # nothing labelled: the gradient is 0
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    train(
        model,
        *config_of(tmp_path, epochs=1, lr=0.1, weight_decay=0.5, warmup=0.0),
        accelerator=cpu,
    )
    for name, parameter in model.named_parameters():
        expected = 0.95 if parameter.dim() > 1 else 1.0
        assert torch.allclose(parameter, torch.tensor(expected)), name


def test_mixed_precision_is_used_and_leaves_no_trace_on_the_model(data: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    model = tiny_model()
    model.decode_head.classifier.register_forward_hook(
        lambda m, args, out: seen[m.training].add(out.dtype)
    )
    try:
        config = config_of(data, epochs=1, amp="bf16")
        train(model, *config, accelerator=Accelerator(cpu=True, mixed_precision="bf16"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert "forward" not in vars(model)


def test_mixed_precision_must_be_the_accelerator_s(data: Path, cpu: Accelerator) -> None:
    with pytest.raises(
        ValueError,
        match="`amp` is bf16, the accelerator's mixed_precision no; give both the same",
    ):
        train(Pointwise(), *config_of(data, amp="bf16"), accelerator=cpu)


def steps_of(
    model: nn.Module, data: Path, accelerator: Accelerator, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after a run of plain gradient descent, so that a step is the gradient times the rate."""
    plain = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "warmup": 0.0,
        "decay": "constant",
        "lr": 0.1,
    }
    before = weights_of(model)
    train(model, *config_of(data, **plain | {"epochs": 1} | changes), accelerator=accelerator)
    return before, weights_of(model)


@pytest.mark.parametrize("pieces", [2, 4])
def test_a_batch_in_pieces_takes_the_steps_of_the_whole(
    pieces: int, data: Path, cpu: Accelerator
) -> None:
    changes = {
        "batch_size": 4,
        "epochs": 3,
        "loss": "ce+0.5*dice",
        "label_smoothing": 0.1,
        "clip_norm": 0.5,
    }
    _, whole = steps_of(Pointwise(), data, cpu, **changes)
    start, parts = steps_of(Pointwise(), data, cpu, **changes, accumulate=pieces)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6)
        assert (start[name] - tensor).norm() > 1e-2


def test_the_average_is_scored_and_shown_while_states_keep_the_weights_of_their_own(
    data: Path, cpu: Accelerator
) -> None:
    plain, model = tiny_model(), tiny_model()
    _, _, expected = recorded(plain, config_of(data), cpu)
    shown: list[tuple[dict[str, Tensor], EpochResult, TrainState]] = []
    on_epoch = lambda result, state: shown.append((weights_of(model), result, state))  # noqa: E731
    last = train(model, *config_of(data, ema=0.9), accelerator=cpu, on_epoch=on_epoch)
    assert len(shown) == 3
    for (weights, result, state), raw in zip(shown, expected, strict=True):
        assert same(state.model, raw.model)  # averaging does not change the course
        assert same(weights, state.ema["averages"])
        assert not same(weights, state.model)
        averaged = tiny_model()
        averaged.load_state_dict(weights)
        how = EvalMode(input_shape=(32, 32))
        assert result.score == evaluate(averaged, splits_of(data).val, NUM_CLASSES, how)
    assert last == shown[-1][1].score
    assert same(weights_of(model), weights_of(plain))


def test_a_step_is_clipped_to_the_norm_that_was_asked_for(data: Path, cpu: Accelerator) -> None:
    lengths = []
    for clip_norm in (0.0, 0.01):
        before, after = steps_of(
            Pointwise(), data, cpu, batch_size=8, clip_norm=clip_norm
        )  # one step
        lengths.append(
            torch.cat([(after[name] - before[name]).flatten() for name in before]).norm().item()
        )
    assert lengths[1] == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert lengths[0] > 2 * lengths[1]


def test_the_heads_rate_is_its_factor_times_the_encoders(data: Path, cpu: Accelerator) -> None:
    start, slow = steps_of(tiny_model(), data, cpu, batch_size=8, lr=0.5)
    _, fast = steps_of(tiny_model(), data, cpu, batch_size=8, lr=0.5, head_lr=8.0)
    assert same(slow, fast, "encoder.")
    name = "decode_head.classifier.weight"
    torch.testing.assert_close(
        fast[name] - start[name], 8 * (slow[name] - start[name]), rtol=1e-3, atol=1e-6
    )


def test_computing_the_blocks_twice_changes_no_bit(data: Path, cpu: Accelerator) -> None:
    runs, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model()  # with dropout and stochastic depth
        model.encoder.checkpointing = checkpointing
        calls.append(0)

        def count(*_: object) -> None:
            calls[-1] += 1

        model.encoder.stages[0].blocks[0].norm1.register_forward_hook(count)
        train(model, *config_of(data, epochs=1, eval_every=1), accelerator=cpu)
        runs.append(weights_of(model))
    assert same(*runs)
    assert calls[1] == calls[0] + 4  # once more in each of the steps


def test_the_network_is_compiled_if_asked_for_and_again_when_more_of_it_trains(
    data: Path, cpu: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Student] = []
    monkeypatch.setattr(
        Student, "compile", lambda student: compiled.append(student)
    )  # the compiler itself takes a minute
    numbers = []
    for changes in ({}, {"compile": True}, {"compile": True, "freeze_epochs": 1}):
        train(tiny_model(), *config_of(data, epochs=2, **changes), accelerator=cpu)
        numbers.append(len(compiled))
    assert numbers == [0, 1, 3]


def test_weights_need_a_teacher_and_a_teacher_must_fit_the_student(
    data: Path, cpu: Accelerator
) -> None:
    plain = config_of(data)
    five = SegFormer(replace(tiny_model().spec, num_classes=5))
    with pytest.raises(ValueError, match="`distill_channel` has no effect without `teacher`"):
        train(tiny_model(), *config_of(data, distill_channel=0.5), accelerator=cpu)
    with pytest.raises(
        ValueError,
        match="The student is a Pointwise; distillation compares the maps of two SegFormers",
    ):
        train(Pointwise(), *plain, accelerator=cpu, teacher=tiny_model())
    with pytest.raises(
        ValueError,
        match="The teacher has 5 classes and the student 8; give a teacher that was trained",
    ):
        train(tiny_model(), *plain, accelerator=cpu, teacher=five)


def test_a_student_comes_nearer_to_its_teacher_than_the_labels_bring_it(
    data: Path, cpu: Accelerator
) -> None:
    teacher, x = quiet_model(7), torch.randn(2, 3, 32, 32)
    nn.init.normal_(
        teacher.decode_head.classifier.weight
    )  # so that it is surer than one just made
    before = weights_of(teacher)

    def distance(student: nn.Module) -> float:
        with torch.inference_mode():
            ours, theirs = (network.eval()(x).softmax(1) for network in (student, teacher))
        return (ours - theirs).abs().mean().item()

    alone, taught = quiet_model(), quiet_model()
    start = distance(taught)
    settings: dict[str, Any] = {"epochs": 10, "lr": 1e-2, "eval_every": 10}
    train(alone, *config_of(data, **settings), accelerator=cpu)
    distilled = config_of(data, distill_pixel=100.0, **settings)
    train(taught, *distilled, accelerator=cpu, teacher=teacher)
    assert distance(taught) < 0.9 * min(start, distance(alone))
    assert same(weights_of(teacher), before)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_compiled_student_takes_the_steps_of_one_that_is_not(
    data: Path, cpu: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = nn.Module.compile
    monkeypatch.setattr(
        Student, "compile", lambda student: compile_(student, backend="aot_eager")
    )  # without C++
    losses: dict[bool, list[float]] = {}
    weights = {}
    for compiled in (False, True):
        model = quiet_model()
        losses[compiled], _ = losses_of(
            model,
            taught(data, epochs=1, freeze_epochs=0, compile=compiled),
            cpu,
            quiet_model(7),
        )
        weights[compiled] = weights_of(model)
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    for name, tensor in weights[False].items():
        torch.testing.assert_close(weights[True][name], tensor, rtol=1e-3, atol=1e-4)


def test_what_was_not_given_is_completed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    options = complete(TrainOptions(5), device)
    assert (options.lr, options.head_lr, options.amp, options.tf32) == (6e-5, 1.0, "no", False)
    assert options.num_workers is not None
    assert complete(options, device) == options
    with pytest.raises(ValueError, match="`num_classes` is not given"):
        complete(TrainOptions(), device)


def test_weights_of_the_classes_that_need_the_data_are_not_trained_with(
    data: Path, cpu: Accelerator
) -> None:
    with pytest.raises(
        ValueError, match="`class_weights` is 'enet', which needs the data's pixel counts"
    ):
        train(Pointwise(), *config_of(data, class_weights="enet"), accelerator=cpu)
