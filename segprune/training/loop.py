"""The training loop: steps over all pictures, a score after every epoch, a state to go on from at any time.

Runs on Hugging Face accelerate: one CPU, one GPU, or several processes started by torchrun. What is random (order of
the pictures, augmentation, dropout) follows from the seed and the step alone, so an interrupted run goes on where it
stopped: on one CPU to the same bits. Several processes share each batch of the one-process run, its statistics of
BatchNorm and its count of labelled pixels, so without dropout they take the same steps, to rounding.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from segprune.data import SegmentationData, TrainTransform
from segprune.data.loading import load_batches
from segprune.inference.evaluate import EvalMode, Score, Tally, score, shard, tallies
from segprune.timing import tf32_products
from segprune.training.config import TrainConfig
from segprune.training.learner import Learner
from segprune.training.objective import check_teacher
from segprune.training.processes import check_processes, fitting_batch
from segprune.training.state import (
    EpochResult,
    Splits,
    TrainingDiverged,
    TrainingInterrupted,
    TrainState,
    check_same_run,
    fingerprint_of,
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
        stack.callback(run.learner.close)
        stack.enter_context(synced(model))
        stop = stack.enter_context(stop_flag())
        if on_state is not None and accelerator.is_main_process and run.steps_done == 0:
            on_state(run.state())
        while run.epoch < config.epochs:
            with tf32_products(config.tf32):
                for loss in run.steps(stop):
                    if on_step is not None:
                        on_step(run.steps_done, run.total_steps, loss, run.learner.lr)
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
        self.splits = splits
        transform = TrainTransform(config.input_shape, scale=config.scale)
        self.data = SegmentationData(splits.train, config.num_classes, transform, seed=config.seed)
        self.process, self.processes = accelerator.process_index, accelerator.num_processes
        check_processes(config, accelerator)
        self.batch_size = fitting_batch(config, len(self.data), self.processes)
        self.steps_per_epoch: int = len(self.data) // self.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs
        self.settings = asdict(config) | {"pictures": splits.fingerprint()}
        if teacher is not None:
            self.settings["teacher"] = fingerprint_of(teacher)
        self.model, self.device = model, accelerator.device
        self.learner = Learner(model, config, accelerator, teacher)
        self.epoch = self.step = 0
        self.best_miou = -1.0
        self.losses: list[float] = []
        self.own: dict[str, Tensor] | None = None  # the network's weights while their average stands in their place
        self.seconds, self.images = 0.0, 0  # of training in this epoch, since the run was started or resumed
        self.last_score: Score | None = None
        if state is not None:
            self._restore(state)

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def steps(self, stop: threading.Event) -> Iterator[float]:
        """The remaining steps of the running epoch; yields each step's loss. Ends with TrainingInterrupted."""
        self.data.set_epoch(self.epoch)
        self.learner.prepare(self.epoch)
        start = time.perf_counter()
        batches = load_batches(
            self.data,
            batch_sampler=self._batches()[self.step :],
            num_workers=self.config.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        for pixels, labels in batches:
            torch.manual_seed((self.config.seed * 1_000_003 + self.steps_done) * self.processes + self.process)
            x, y = (tensor.to(self.device, non_blocking=True) for tensor in (pixels, labels))
            try:
                loss, stopped = self.learner.step(x, y, self.steps_done, self.total_steps, stop)
            except FloatingPointError as error:
                raise self._diverged(str(error)) from error
            self.losses.append(loss)
            self.step += 1
            self.seconds += time.perf_counter() - start
            self.images += self.batch_size
            yield loss
            if stopped or (self.processes == 1 and stop.is_set()):
                raise TrainingInterrupted(self.state())
            start = time.perf_counter()

    def _batches(self) -> list[list[int]]:
        """This process's share of the running epoch's batches; an incomplete last one is left for other epochs."""
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.data), generator=generator).tolist()
        share = self.batch_size // self.processes
        starts = range(self.process * share, self.steps_per_epoch * self.batch_size, self.batch_size)
        return [order[start : start + share] for start in starts]

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what} in epoch {self.epoch + 1}, batch {self.step + 1} (step {self.steps_done + 1} of "
            f"{self.total_steps}); lower --lr (it was {self.config.lr:g}) and start again."
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the network has the weights that are scored and saved; states keep its own."""
        if self.learner.ema is None:
            yield
            return
        self.own = self.learner.weights()
        try:
            with self.learner.ema.applied(self.model):
                yield
        finally:
            self.own = None

    def end_epoch(self) -> EpochResult:
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self._diverged("A weight became NaN or infinite")  # in the last step, so no loss has seen it
        mean_loss, lr = sum(self.losses) / len(self.losses), self.learner.lr
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
        config = self.config
        mine, how = shard(self.splits.val, self.process, self.processes), EvalMode(input_shape=config.input_shape)
        total = Tally(config.num_classes, device=self.device).counts
        for _, counts in tallies(
            self.model,
            mine,
            config.num_classes,
            how,
            device=self.device,
            batch_size=self.batch_size // self.processes,
            num_workers=config.num_workers,
        ):
            total += counts
        return score(self.learner.summed(total), config.num_classes, len(self.splits.val))

    def state_is_due(self) -> bool:
        every = self.config.save_steps
        return bool(every) and self.step % every == 0 and self.step < self.steps_per_epoch

    def state(self) -> TrainState:
        return TrainState(
            self.epoch,
            self.step,
            self.steps_done,
            model=self.learner.weights() if self.own is None else self.own,
            losses=list(self.losses),
            best_miou=self.best_miou,
            config=self.settings,
            **self.learner.state(),
        )

    def _restore(self, state: TrainState) -> None:
        check_same_run(state.config, self.settings)
        self.learner.restore(state)
        self.epoch, self.step, self.losses = state.epoch, state.step, list(state.losses)
        self.best_miou = state.best_miou
