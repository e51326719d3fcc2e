"""The settings of one training run, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from segprune.training.distill import Distillation
from segprune.training.losses import SegmentationLoss
from segprune.training.optim import check_optimizer
from segprune.training.schedule import DECAYS, Decay

MIXED_PRECISION = ("no", "fp16", "bf16")  # accelerate's words


@dataclass(frozen=True)
class TrainConfig:
    """One run. Sizes are H, W in pixels; `lr` is the highest of the run; `warmup` is a share of its steps.

    `batch_size` counts the pictures of one step, over all processes and over the `accumulate` pieces in which each
    process takes its share one after another.
    """

    num_classes: int
    input_shape: tuple[int, int] = (512, 512)
    epochs: int = 50
    batch_size: int = 8
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 6e-5
    layer_decay: float = 1.0  # of the encoder's rate with every block further from the decode head
    head_lr_factor: float = 1.0  # the decode head's rate, in rates of the encoder
    weight_decay: float = 0.01
    momentum: float = 0.9  # of SGD
    decay: Decay = "poly"
    min_factor: float = 0.0  # where the decay ends, as a share of `lr`
    warmup: float = 0.05
    hold: float = 0.0  # share of the steps, the last ones, that stay where the decay ends
    clip_norm: float = 0.0  # of all gradients together; 0: not clipped
    ema: float = 0.0  # decay of the weights' moving average, which is then scored and saved; 0: none
    freeze_epochs: int = 0  # the encoder stands still for so many epochs first
    loss: SegmentationLoss = SegmentationLoss()  # noqa: RUF009 - frozen
    distillation: Distillation | None = None  # needs a teacher
    scale: tuple[float, float] = (0.5, 2.0)  # of the random resizing before the crop
    eval_every: int = 1  # epochs
    save_steps: int = 0  # steps between two states handed out within an epoch; 0: only after epochs
    num_workers: int = 2
    seed: int = 11
    mixed_precision: str = "no"
    tf32: bool = False  # for products of float32 in the steps, on a GPU; scores are taken without
    compile: bool = False

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ValueError(f"Decay {self.decay!r} is unknown; choose one of {', '.join(DECAYS)}.")
        check_optimizer(self.optimizer)
        if self.mixed_precision not in MIXED_PRECISION:
            raise ValueError(f"Mixed precision {self.mixed_precision!r} is unknown; choose no, fp16 or bf16.")
        for name in ("epochs", "batch_size", "accumulate", "lr", "head_lr_factor", "eval_every"):
            if not getattr(self, name) > 0:  # NaN neither
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("weight_decay", "clip_norm", "freeze_epochs", "save_steps", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or above.")
        for name in ("warmup", "hold", "ema", "momentum", "min_factor"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, from 0 to below 1.")
