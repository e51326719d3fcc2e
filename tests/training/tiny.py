"""What the training loop is tried on: tiny networks, settings, and runs that are watched or stopped."""

from __future__ import annotations

import io
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from segprune.data import open_source
from segprune.inference.evaluate import Score
from segprune.model import SegFormer
from segprune.spec import BlockSpec, standard_spec
from segprune.training.loop import train
from segprune.training.options import TrainOptions
from segprune.training.state import EpochResult, Splits, TrainingInterrupted, TrainState

NUM_CLASSES = 8
Setup = tuple[TrainOptions, Splits]


def tiny_model(seed: int = 0) -> SegFormer:
    """One block of 8 channels per stage; dropout and stochastic depth as in the real ones."""
    spec = standard_spec("b0", NUM_CLASSES, decoder_dim=8)
    stages = []
    for stage in spec.stages:
        reduction_dim = None if stage.reduction_ratio == 1 else 8
        block = BlockSpec(
            num_heads=1,
            qk_dim=8,
            v_dim=8,
            ffn_dim=16,
            reduction_dim=reduction_dim,
            qk_scale=8**-0.5,
        )
        stages.append(replace(stage, width=8, blocks=(block,)))
    torch.manual_seed(seed)
    return SegFormer(replace(spec, stages=tuple(stages)))


def quiet_model(seed: int = 0) -> SegFormer:
    """The tiny one without dropout and stochastic depth, whose random numbers differ between processes."""
    spec = tiny_model().spec
    torch.manual_seed(seed)
    return SegFormer(
        replace(spec, numerics=replace(spec.numerics, head_dropout=0.0, drop_path=0.0))
    )


class Pointwise(nn.Module):
    """The least that can be trained: no encoder, no statistics, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def splits_of(data: Path) -> Splits:
    source = open_source(data)
    return Splits(source.split("train"), source.split("val"))


def config_of(data: Path, **changes: Any) -> Setup:
    plain = TrainOptions(
        NUM_CLASSES,
        (32, 32),
        epochs=3,
        batch_size=2,
        lr=3e-3,
        num_workers=0,
        warmup=0.1,
        amp="no",
        tf32=False,
    )
    return replace(plain, **changes), splits_of(data)


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
    return config_of(data, loss="ce+0.5*dice", label_smoothing=0.1, **changes)


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


def interrupt(
    model: nn.Module,
    config: Setup,
    accelerator: Accelerator,
    step: int,
    by: signal.Signals = signal.SIGINT,
) -> TrainState:
    """Train until Ctrl-C, or another signal, in the given step; the state that comes with the exception."""

    def press(done: int, total: int, loss: float, lr: float) -> None:
        if done == step:
            signal.raise_signal(by)

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

    return (
        train(model, *config, accelerator=accelerator, state=state, on_epoch=note),
        results,
        states,
    )


def losses_of(
    model: nn.Module, setup: Setup, accelerator: Accelerator, teacher: SegFormer
) -> tuple[list[float], Score]:
    losses: list[float] = []
    on_step = lambda done, total, loss, lr: losses.append(loss)  # noqa: E731
    return losses, train(
        model, *setup, accelerator=accelerator, teacher=teacher, on_step=on_step
    )
