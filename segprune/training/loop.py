"""The training loop: AdamW, warm-up and decay, cross-entropy with ignored labels, a score after every epoch.

Runs on Hugging Face accelerate: one CPU, one GPU, or several processes started by torchrun. What is random (order of
the pictures, augmentation, dropout) follows from the seed and the step alone, so an interrupted run goes on where it
stopped: on one CPU to the same bits. With several processes the statistics of BatchNorm are the first one's.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from segprune.data import IGNORE_INDEX, SegmentationData, TrainTransform, open_source
from segprune.training.evaluate import Score, confusion_matrices, score
from segprune.training.schedule import DECAYS, Decay, lr_factor


@dataclass(frozen=True)
class TrainConfig:
    """One run. Sizes are H, W in pixels; `lr` is the highest of the run; `warmup` is a share of its steps."""

    data: str
    num_classes: int
    input_shape: tuple[int, int] = (512, 512)
    epochs: int = 50
    batch_size: int = 8  # per process
    lr: float = 6e-5
    weight_decay: float = 0.01
    decay: Decay = "poly"
    warmup: float = 0.05
    freeze_epochs: int = 0  # the encoder stands still for so many epochs first
    scale: tuple[float, float] = (0.5, 2.0)  # of the random resizing before the crop
    eval_every: int = 1  # epochs
    num_workers: int = 2
    seed: int = 11
    mixed_precision: str = "no"  # accelerate's words: no, fp16, bf16

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ValueError(f"Decay {self.decay!r} is unknown; choose one of {', '.join(DECAYS)}.")
        for name in ("epochs", "batch_size", "lr", "eval_every"):
            if not getattr(self, name) > 0:  # NaN neither
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it is a share of the steps, from 0 to below 1.")
        if self.freeze_epochs < 0:
            raise ValueError(f"freeze_epochs is {self.freeze_epochs}; it must be 0, to train all at once, or above.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or above.")
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise ValueError(f"Mixed precision {self.mixed_precision!r} is unknown; choose no, fp16 or bf16.")


@dataclass
class TrainState:
    """All that a run needs to go on, in copies: `epoch` is the running one, `step` the batches done in it."""

    epoch: int
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None  # of the loss, in mixed precision fp16
    losses: list[float]  # of the running epoch's batches
    best_miou: float
    config: dict[str, Any]


@dataclass(frozen=True)
class EpochResult:
    """`score` is None in epochs without evaluation; `best` says whether it is the highest so far."""

    epoch: int
    loss: float
    score: Score | None
    best: bool


class TrainingInterrupted(Exception):
    """Ctrl-C came; `state` is where the run stood after its last whole step."""

    def __init__(self, state: TrainState) -> None:
        super().__init__(f"Training was interrupted in epoch {state.epoch + 1} after {state.step} batches.")
        self.state = state


OnStep = Callable[[int, int, float, float], None]  # steps done, steps in all, loss, learning rate
OnEpoch = Callable[[EpochResult, TrainState], None]


def train(
    model: nn.Module,
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    state: TrainState | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
) -> Score:
    """Train `model` (logits B K H W) in place and return its last score, which is taken in full precision.

    `state` continues an earlier run with the same settings. `on_epoch` gets the state to save, on the main process.
    Seeds torch's global generator before every step. Raises TrainingInterrupted on Ctrl-C, after the running step;
    ValueError for settings that do not fit model, data, processes or `state`, and when the loss is no longer finite.
    """
    run = _Run(model, config, accelerator, state)
    with _sigint_flag() as interrupted:
        try:
            while run.epoch < config.epochs:
                for loss in run.steps():
                    if on_step is not None:
                        on_step(run.steps_done, run.total_steps, loss, run.optimizer.param_groups[0]["lr"])
                    if interrupted.is_set():
                        raise TrainingInterrupted(run.state())
                result = run.end_epoch()
                if on_epoch is not None and accelerator.is_main_process:
                    on_epoch(result, run.state())
        finally:
            run.train_encoder(True)
    return run.last_score or run.evaluate()


class _Run:
    """What lives on from step to step."""

    def __init__(
        self, model: nn.Module, config: TrainConfig, accelerator: Accelerator, state: TrainState | None
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        transform = TrainTransform(config.input_shape, scale=config.scale)
        source = open_source(config.data)
        self.data = SegmentationData(source.split("train"), config.num_classes, transform, seed=config.seed)
        self.val = source.split("val")
        _check_processes(config, accelerator, len(self.data))
        self.process, self.processes = accelerator.process_index, accelerator.num_processes
        self.settings = asdict(config) | {"num_processes": self.processes, "num_images": len(self.data)}
        self.batch_size = min(config.batch_size, len(self.data) // self.processes)
        self.steps_per_epoch: int = len(self.data) // (self.batch_size * self.processes)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.bare = model
        self.encoder = _encoder_parameters(model) if config.freeze_epochs else []
        self.optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), lr=config.lr)
        self.epoch = self.step = 0
        self.best_miou = -1.0
        self.losses: list[float] = []
        self.last_score: Score | None = None
        if state is not None:
            self._restore(state)
        # accelerate rewrites the forward of what it prepares; the container is ours to be rewritten
        self.model, self.optimizer = accelerator.prepare(nn.Sequential(model), self.optimizer)

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def steps(self) -> Iterator[float]:
        """The remaining steps of the running epoch; yields each step's loss."""
        self.data.set_epoch(self.epoch)
        self.model.train()
        self.train_encoder(self.epoch >= self.config.freeze_epochs)
        loader: DataLoader[Any] = DataLoader(
            self.data, batch_sampler=self._batches()[self.step :], num_workers=self.config.num_workers
        )
        for pixels, labels in loader:
            torch.manual_seed((self.config.seed * 1_000_003 + self.steps_done) * self.processes + self.process)
            self._set_lr()
            loss = self._update(pixels.to(self.accelerator.device), labels.to(self.accelerator.device))
            self.losses.append(loss)
            self.step += 1
            yield loss

    def _batches(self) -> list[list[int]]:
        """This process's batches of the running epoch; an incomplete last one is left for other epochs."""
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.data), generator=generator).tolist()
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return batches[self.process :: self.processes][: self.steps_per_epoch]

    def _set_lr(self) -> None:
        warmup = round(self.config.warmup * self.total_steps)
        factor = lr_factor(self.steps_done, self.total_steps, warmup_steps=warmup, decay=self.config.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor

    def _update(self, pixels: Tensor, labels: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(pixels), labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(f"The loss became {value}")
        self.accelerator.backward(loss)
        self.optimizer.step()
        return value

    def _diverged(self, what: str) -> ValueError:
        return ValueError(f"{what} in epoch {self.epoch + 1}; lower --lr (it was {self.config.lr:g}) and start again.")

    def end_epoch(self) -> EpochResult:
        if not all(bool(parameter.isfinite().all()) for parameter in self.bare.parameters()):
            raise self._diverged("A weight became NaN or infinite")  # in the last step, so no loss has seen it
        mean_loss = sum(self.losses) / len(self.losses)
        self.epoch, self.step, self.losses = self.epoch + 1, 0, []
        if self.epoch % self.config.eval_every and self.epoch < self.config.epochs:
            return EpochResult(self.epoch, mean_loss, None, best=False)
        self.last_score = self.evaluate()
        best = self.last_score.miou > self.best_miou
        self.best_miou = max(self.best_miou, self.last_score.miou)
        return EpochResult(self.epoch, mean_loss, self.last_score, best)

    def evaluate(self) -> Score:
        """Each process scores its share of the validation pictures; the counts are added up."""
        for statistic in self.bare.buffers():
            broadcast(statistic)
        config, device = self.config, self.accelerator.device
        size, workers = config.batch_size, config.num_workers
        mine = self.val[self.process :: self.processes]
        batches = confusion_matrices(
            self.bare, mine, config.num_classes, config.input_shape, device=device, batch_size=size, num_workers=workers
        )
        zero = torch.zeros(config.num_classes, config.num_classes, dtype=torch.int64)
        total = sum((matrix for _, matrix in batches), zero).to(device)
        return score(self.accelerator.reduce(total).cpu(), len(self.val))

    def state(self) -> TrainState:
        scaler = self.accelerator.scaler
        return TrainState(
            self.epoch,
            self.step,
            {name: tensor.detach().cpu().clone() for name, tensor in self.bare.state_dict().items()},
            deepcopy(self.optimizer.state_dict()),
            None if scaler is None else scaler.state_dict(),
            list(self.losses),
            self.best_miou,
            self.settings,
        )

    def _restore(self, state: TrainState) -> None:
        _check_same_run(state.config, self.settings)
        self.bare.load_state_dict(state.model)
        self.optimizer.load_state_dict(deepcopy(state.optimizer))
        if state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.epoch, self.step, self.losses = state.epoch, state.step, list(state.losses)
        self.best_miou = state.best_miou

    def train_encoder(self, trained: bool) -> None:
        for parameter in self.encoder:
            parameter.requires_grad_(trained)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labelled pixels; 0, and not NaN, where a batch has none."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and normalisations do not, as SegFormer was trained."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _encoder_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What freeze_epochs holds still; parameters that did not train anyway are left as they are."""
    encoder = getattr(model, "encoder", None)
    if encoder is None:
        raise ValueError(f"freeze_epochs needs a submodule `encoder`, which {type(model).__name__} lacks; set it to 0.")
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


def _check_processes(config: TrainConfig, accelerator: Accelerator, num_images: int) -> None:
    processes, started = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    if started > processes:
        raise ValueError(f"{started} processes were started but only {processes} joined; start them with torchrun.")
    if num_images < processes:
        raise ValueError(f"{num_images} training pictures came for {processes} processes; start no more than pictures.")
    if config.freeze_epochs and processes > 1:
        raise ValueError(f"freeze_epochs must be 0 with {processes} processes; set it to 0 or train on one process.")
    used = accelerator.mixed_precision
    if config.mixed_precision != used:
        raise ValueError(f"mixed_precision is {config.mixed_precision}, the accelerator's {used}; give both the same.")


_MAY_CHANGE = {"num_workers", "eval_every", "data"}


def _check_same_run(old: dict[str, Any], new: dict[str, Any]) -> None:
    """A run goes on only with the settings that decide its course."""
    for name, value in new.items():
        before = old.get(name)
        before = tuple(before) if isinstance(before, list) else before
        if name not in _MAY_CHANGE and before != value:
            change = f"The run to resume had {name} {before}, now it is {value}"
            raise ValueError(f"{change}; resume with the same settings, or start anew without --resume.")


@contextmanager
def _sigint_flag() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the flag, so that a step is never cut in half; the second interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
