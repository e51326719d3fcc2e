"""The training loop: steps over all pictures, a score after every epoch, a state to go on from at any time.

Runs on Hugging Face accelerate: one CPU, one GPU, or several processes started by torchrun. What is random (order of
the pictures, augmentation, dropout) follows from the seed and the step alone, so an interrupted run goes on where it
stopped: on one CPU to the same bits. Several processes share each batch of the one-process run, its statistics of
BatchNorm and its count of labelled pixels, so without dropout they take the same steps, to rounding.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from segprune.data import IGNORE_INDEX, SegmentationData, TrainTransform
from segprune.training.config import TrainConfig
from segprune.training.distill import Projections
from segprune.training.ema import Ema
from segprune.training.evaluate import EvalMode, Score, Tally, score, shard, tallies
from segprune.training.objective import Objective, Student, check_teacher
from segprune.training.optim import make_optimizer, parameter_groups
from segprune.training.processes import check_processes, fitting_batch
from segprune.training.schedule import lr_factor
from segprune.training.state import (
    EpochResult,
    Splits,
    TrainingDiverged,
    TrainingInterrupted,
    TrainState,
    check_same_run,
)
from segprune.training.stop import stop_flag
from segprune.training.sync import synced

OnStep = Callable[[int, int, float, float], None]  # steps done, steps in all, loss, learning rate
OnEpoch = Callable[[EpochResult, TrainState], None]
OnState = Callable[[TrainState], None]


def train(
    model: nn.Module,
    config: TrainConfig,
    splits: Splits,
    *,
    accelerator: Accelerator,
    teacher: nn.Module | None = None,
    state: TrainState | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    on_state: OnState | None = None,
) -> Score:
    """Train `model` (logits B K H W) in place and return its last score, which is taken in full precision.

    `teacher` is a SegFormer to learn from, as `config.distillation` weighs it. `state` continues an earlier run with
    the same settings and pictures. On the main process `on_epoch` is called after every epoch, while `model` has the
    weights that were scored (their average, with `config.ema`), and `on_state` before the first step and every
    `config.save_steps` within epochs; both get a state to save. Seeds torch's global generator before every step.
    Raises TrainingInterrupted on Ctrl-C and SIGTERM, after the running step; TrainingDiverged when loss or weights
    are no longer finite; ValueError for settings that do not fit model, pictures, processes or `state`.
    """
    check_teacher(config.distillation, teacher, model)
    run = _Run(model, config, splits, accelerator, teacher, state)
    with ExitStack() as stack:
        stack.callback(run.close)
        stack.enter_context(synced(model))
        stop = stack.enter_context(stop_flag())
        if on_state is not None and accelerator.is_main_process and run.steps_done == 0:
            on_state(run.state())
        while run.epoch < config.epochs:
            for loss in run.steps(stop):
                if on_step is not None:
                    on_step(run.steps_done, run.total_steps, loss, run.lr)
                if on_state is not None and accelerator.is_main_process and run.state_is_due():
                    on_state(run.state())
            with run.averaged():
                result = run.end_epoch()
                if on_epoch is not None and accelerator.is_main_process:
                    on_epoch(result, run.state())
        with run.averaged():
            return run.last_score or run.evaluate()


class _Run:
    """What lives on from step to step."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        splits: Splits,
        accelerator: Accelerator,
        teacher: nn.Module | None,
        state: TrainState | None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.splits = splits
        transform = TrainTransform(config.input_shape, scale=config.scale)
        self.data = SegmentationData(splits.train, config.num_classes, transform, seed=config.seed)
        self.process, self.processes = accelerator.process_index, accelerator.num_processes
        check_processes(config, accelerator)
        self.batch_size = fitting_batch(config, len(self.data), self.processes)
        self.steps_per_epoch: int = len(self.data) // self.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs
        self.settings = asdict(config) | {"pictures": splits.fingerprint()}
        self.bare = model.to(accelerator.device)
        self.encoder = _encoder_parameters(model) if config.freeze_epochs else []
        self.objective = Objective(
            config.loss, config.distillation, _frozen(teacher, accelerator), accelerator.autocast
        )
        self.projections = _projections(model, teacher, config)
        groups = parameter_groups(model, config.weight_decay, config.head_lr_factor, config.layer_decay)
        if self.projections is not None:
            self.projections.to(accelerator.device)
            groups += parameter_groups(self.projections, config.weight_decay)
        self.bare_optimizer = make_optimizer(config.optimizer, groups, config.lr, config.momentum)  # type: ignore[arg-type]
        self.ema = Ema(model, config.ema) if config.ema else None
        self.epoch = self.step = 0
        self.best_miou = -1.0
        self.losses: list[float] = []
        self.own: dict[str, Tensor] | None = None  # the network's weights while their average stands in their place
        self.seconds, self.images = 0.0, 0  # of training in this epoch, since the run was started or resumed
        self.last_score: Score | None = None
        if state is not None:
            self._restore(state)
        self.wrapped = False

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def lr(self) -> float:
        """The run's, of which each group has its own share."""
        group = self.bare_optimizer.param_groups[0]
        return float(group["lr"] / group["lr_scale"])

    def steps(self, stop: threading.Event) -> Iterator[float]:
        """The remaining steps of the running epoch; yields each step's loss. Ends with TrainingInterrupted."""
        self.data.set_epoch(self.epoch)
        self.bare.train()
        self._wrap()
        device, start = self.accelerator.device, time.perf_counter()
        loader: DataLoader[Any] = DataLoader(
            self.data,
            batch_sampler=self._batches()[self.step :],
            num_workers=self.config.num_workers,
            pin_memory=device.type == "cuda",
        )
        for pixels, labels in loader:
            torch.manual_seed((self.config.seed * 1_000_003 + self.steps_done) * self.processes + self.process)
            self._set_lr()
            loss, stopped = self._update(
                pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True), stop
            )
            self.losses.append(loss)
            self.step += 1
            self.seconds += time.perf_counter() - start
            self.images += self.batch_size
            yield loss
            if stopped or (self.processes == 1 and stop.is_set()):
                raise TrainingInterrupted(self.state())
            start = time.perf_counter()

    def _wrap(self) -> None:
        """Hand the network to accelerate; once more when the encoder is freed, since DDP looks at what trains."""
        frozen = self.epoch < self.config.freeze_epochs
        if self.wrapped and not (self.encoder and self.epoch == self.config.freeze_epochs):
            return
        for parameter in self.encoder:
            parameter.requires_grad_(not frozen)
        self._release()
        student = Student(self.bare, self.projections, distilled=self.config.distillation is not None)
        if self.config.compile:
            student.compile()
        self.student, self.optimizer = self.accelerator.prepare(student, self.bare_optimizer)
        self.wrapped = True

    def close(self) -> None:
        """Let go of everything: a process group that something still holds can abort the interpreter's exit."""
        for parameter in self.encoder:
            parameter.requires_grad_(True)
        self.student = self.optimizer = None
        self._release()

    def _release(self) -> None:
        """Take back what accelerate holds on to; collecting garbage takes most of a second, so only if need be."""
        if self.processes > 1:
            self.accelerator.free_memory()
        else:
            self.accelerator._models.clear()
            self.accelerator._optimizers.clear()

    def _batches(self) -> list[list[int]]:
        """This process's share of the running epoch's batches; an incomplete last one is left for other epochs."""
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.data), generator=generator).tolist()
        share = self.batch_size // self.processes
        starts = range(self.process * share, self.steps_per_epoch * self.batch_size, self.batch_size)
        return [order[start : start + share] for start in starts]

    def _set_lr(self) -> None:
        config = self.config
        factor = lr_factor(
            self.steps_done,
            self.total_steps,
            warmup_steps=round(config.warmup * self.total_steps),
            decay=config.decay,
            min_factor=config.min_factor,
            hold_steps=round(config.hold * self.total_steps),
        )
        for group in self.bare_optimizer.param_groups:
            group["lr"] = config.lr * factor * group["lr_scale"]

    def _update(self, pixels: Tensor, labels: Tensor, stop: threading.Event) -> tuple[float, bool]:
        """One step. The loss of the whole batch, and whether any process was told to stop."""
        pieces = self.config.accumulate
        labelled = self._summed((labels != IGNORE_INDEX).sum().float())
        num_labelled = labelled / (self.processes * pieces)  # then the mean over all pieces is that of the batch
        self.optimizer.zero_grad()
        total = torch.zeros((), device=pixels.device)
        for number, (x, y) in enumerate(zip(pixels.chunk(pieces), labels.chunk(pieces), strict=True), start=1):
            with nullcontext() if number == pieces else self.accelerator.no_sync(self.student):
                loss = self.objective(self.student, x, y, num_labelled) / pieces
                self.accelerator.backward(loss)
            total += loss.detach() / self.processes
        told = total.new_full((), float(stop.is_set()))
        value, stopped = self._summed(torch.stack([total, told])).tolist()
        if not math.isfinite(value):
            raise self._diverged(f"The loss became {value}")
        if self.config.clip_norm:
            self.accelerator.clip_grad_norm_(self.student.parameters(), self.config.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.bare)
        return value, stopped > 0

    def _summed(self, tensor: Tensor) -> Tensor:
        return tensor if self.processes == 1 else self.accelerator.reduce(tensor, "sum")

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what} in epoch {self.epoch + 1}, batch {self.step + 1} (step {self.steps_done + 1} of "
            f"{self.total_steps}); lower --lr (it was {self.config.lr:g}) and start again."
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the network has the weights that are scored and saved; states keep its own."""
        if self.ema is None:
            yield
            return
        self.own = self._weights()
        try:
            with self.ema.applied(self.bare):
                yield
        finally:
            self.own = None

    def end_epoch(self) -> EpochResult:
        if not all(bool(parameter.isfinite().all()) for parameter in self.bare.parameters()):
            raise self._diverged("A weight became NaN or infinite")  # in the last step, so no loss has seen it
        mean_loss, lr = sum(self.losses) / len(self.losses), self.lr
        speed, self.seconds, self.images = self.images / max(self.seconds, 1e-9), 0.0, 0
        self.epoch, self.step, self.losses = self.epoch + 1, 0, []
        value, best = None, False
        if self.epoch % self.config.eval_every == 0 or self.epoch == self.config.epochs:
            value = self.last_score = self.evaluate()
            best = value.miou > self.best_miou
            self.best_miou = max(self.best_miou, value.miou)
        return EpochResult(self.epoch, mean_loss, lr, value, best, speed)

    def evaluate(self) -> Score:
        """Each process scores its share of the validation pictures; the counts are added up."""
        config, device = self.config, self.accelerator.device
        mine, how = shard(self.splits.val, self.process, self.processes), EvalMode(input_shape=config.input_shape)
        total = Tally(config.num_classes, device=device).counts
        for _, counts in tallies(
            self.bare,
            mine,
            config.num_classes,
            how,
            device=device,
            batch_size=self.batch_size // self.processes,
            num_workers=config.num_workers,
        ):
            total += counts
        return score(self._summed(total), config.num_classes, len(self.splits.val))

    def state_is_due(self) -> bool:
        every = self.config.save_steps
        return bool(every) and self.step % every == 0 and self.step < self.steps_per_epoch

    def _weights(self) -> dict[str, Tensor]:
        return _copied(self.bare.state_dict())

    def state(self) -> TrainState:
        scaler = self.accelerator.scaler
        return TrainState(
            self.epoch,
            self.step,
            self.steps_done,
            self._weights() if self.own is None else self.own,
            {} if self.projections is None else _copied(self.projections.state_dict()),
            deepcopy(self.bare_optimizer.state_dict()),
            None if scaler is None else scaler.state_dict(),
            None if self.ema is None else self.ema.state_dict(),
            list(self.losses),
            self.best_miou,
            self.settings,
        )

    def _restore(self, state: TrainState) -> None:
        check_same_run(state.config, self.settings)
        self.bare.load_state_dict(state.model)
        if self.projections is not None:
            self.projections.load_state_dict(state.projections)
        self.bare_optimizer.load_state_dict(deepcopy(state.optimizer))
        if state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        if self.ema is not None and state.ema is not None:
            self.ema.load_state_dict(state.ema)
        self.epoch, self.step, self.losses = state.epoch, state.step, list(state.losses)
        self.best_miou = state.best_miou


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _frozen(teacher: nn.Module | None, accelerator: Accelerator) -> nn.Module | None:
    return None if teacher is None else teacher.to(accelerator.device).eval().requires_grad_(False)


def _projections(model: nn.Module, teacher: nn.Module | None, config: TrainConfig) -> Projections | None:
    """Of the student's maps to the teacher's widths; from torch's seed, whatever was drawn before."""
    if config.distillation is None or not config.distillation.feature:
        return None
    torch.manual_seed(config.seed)
    widths = [[stage.width for stage in network.spec.stages] for network in (model, teacher)]  # type: ignore[union-attr]
    return Projections(*widths)


def _encoder_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What freeze_epochs holds still; parameters that did not train anyway are left as they are."""
    encoder = getattr(model, "encoder", None)
    if encoder is None:
        raise ValueError(f"freeze_epochs needs a submodule `encoder`, which {type(model).__name__} lacks; set it to 0.")
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]
