"""The training loop: steps over all images, a score after every epoch, a state to go on from at any time.

Runs on Hugging Face accelerate: one CPU, one GPU, or several processes started by torchrun. What is random (order of
the images, augmentation, dropout) follows from the seed and the step alone, so an interrupted run goes on where it
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
from segprune.spec import preprocessing_of
from segprune.timing import tf32_products
from segprune.training.learner import Learner
from segprune.training.objective import check_teacher
from segprune.training.options import TrainOptions, complete
from segprune.training.processes import check_processes, fit_batch_size
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

OnStep = Callable[
    [int, int, float, float], None
]  # steps done, steps in all, loss, learning rate
OnEpoch = Callable[[EpochResult, TrainState], None]
OnState = Callable[[TrainState], None]


def train(
    model: nn.Module,
    options: TrainOptions,
    splits: Splits,
    *,
    accelerator: Accelerator,
    teacher: nn.Module | None = None,
    state: TrainState | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    on_state: OnState | None = None,
) -> Score:
    """Trains `model` (logits B K H W) in place and returns its last score, which is taken in full precision.

    `teacher` is a SegFormer to learn from. `state` continues an earlier run with the same options and images.

    On the main process `on_epoch` is called after every epoch, while `model` has the weights that were scored (their
    average, with `ema`), and `on_state` before the first step and every `save_steps` within epochs; both get a state
    to save. Seeds torch's global generator before every step.

    Raises TrainingInterrupted on Ctrl-C and SIGTERM, after the running step; TrainingDiverged if the loss or a weight
    is no longer finite; ValueError for options that do not fit model, images, processes or `state`.
    """
    # Settle and check everything before the first batch is loaded.
    options = complete(options, accelerator.device)
    check_teacher(options, teacher, model)
    run = _Run(model, options, splits, accelerator, teacher, state)
    on_main = accelerator.is_main_process

    with ExitStack() as stack:
        # Undone in reverse: signal handlers, then BatchNorm, then what accelerate holds.
        stack.callback(run.learner.close)
        stack.enter_context(synced(model))
        stop = stack.enter_context(stop_flag())
        # A state before the first step lets a run that dies in epoch 1 be resumed, too.
        if on_state is not None and on_main and run.steps_done == 0:
            on_state(run.state())

        while run.epoch < options.epochs:
            # TF32 is for training alone; scores are taken in full precision, hence outside.
            with tf32_products(bool(options.tf32)):
                for loss in run.take_steps(stop):
                    if on_step is not None:
                        on_step(run.steps_done, run.total_steps, loss, run.learner.lr)
                    if on_state is not None and on_main and run.state_is_due():
                        on_state(run.state())

            # The callbacks save the network while it holds the weights that were scored.
            with run.averaged():
                result = run.end_epoch()
                if on_epoch is not None and on_main:
                    on_epoch(result, run.state())

        # A run that was resumed at its end has not been scored yet.
        with run.averaged():
            return run.last_score or run.evaluate()


class _Run:
    """What lives on from step to step."""

    def __init__(
        self,
        model: nn.Module,
        options: TrainOptions,
        splits: Splits,
        accelerator: Accelerator,
        teacher: nn.Module | None,
        state: TrainState | None,
    ) -> None:
        assert options.num_classes is not None
        assert options.num_workers is not None
        self.options = options
        self.num_classes = options.num_classes
        self.num_workers = options.num_workers
        self.splits = splits
        self.model, self.device = model, accelerator.device

        # Only training images are augmented; each draws from seed, epoch and its index.
        transform = TrainTransform(options.input_shape, scale=options.scale)
        self.data = SegmentationData(
            splits.train,
            self.num_classes,
            transform,
            seed=options.seed,
            preprocessing=preprocessing_of(model),
        )

        # Every process takes an equal share, or the others would wait for it for ever.
        self.process, self.processes = accelerator.process_index, accelerator.num_processes
        check_processes(options, accelerator)
        self.batch_size = fit_batch_size(options, len(self.data), self.processes)
        self.steps_per_epoch: int = len(self.data) // self.batch_size
        self.total_steps = self.steps_per_epoch * options.epochs

        # What a run that continues this one must have alike.
        self.settings = asdict(options) | {"pictures": splits.fingerprint()}
        if teacher is not None:
            self.settings["teacher"] = fingerprint_of(teacher)

        self.learner = Learner(model, options, accelerator, teacher)
        self.epoch = self.step = 0
        self.best_miou = -1.0
        self.losses: list[float] = []
        self.own: dict[str, Tensor] | None = (
            None  # the network's weights while their average stands in their place
        )
        self.seconds, self.images = (
            0.0,
            0,
        )  # of training in this epoch, since the run was started or resumed
        self.last_score: Score | None = None
        # Last, since it fills the optimiser and the average that the learner has built.
        if state is not None:
            self._restore(state)

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def take_steps(self, stop: threading.Event) -> Iterator[float]:
        """Takes the remaining steps of the running epoch and yields each one's loss. Ends with TrainingInterrupted."""
        # Set before the loader's processes start: each works on the copy it starts with.
        self.data.set_epoch(self.epoch)
        self.learner.prepare(self.epoch)
        start = time.perf_counter()
        # A resumed epoch skips the batches it has already seen.
        batches = load_batches(
            self.data,
            batch_sampler=self._draw_batches()[self.step :],
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )

        for pixels, labels in batches:
            # The seed follows from the step, so that a resumed run draws what the interrupted one would have drawn.
            torch.manual_seed(
                (self.options.seed * 1_000_003 + self.steps_done) * self.processes
                + self.process
            )
            x, y = (
                pixels.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
            try:
                loss, stopped = self.learner.step(x, y, self.steps_done, self.total_steps, stop)
            except FloatingPointError as error:
                raise self._diverged(str(error)) from error

            self.losses.append(loss)
            self.step += 1
            self.seconds += time.perf_counter() - start
            self.images += self.batch_size
            yield loss

            # Raised after the yield, so that the caller has logged the completed step.
            if stopped or (self.processes == 1 and stop.is_set()):
                raise TrainingInterrupted(self.state())
            # The clock leaves out what the caller does between two steps, such as saving.
            start = time.perf_counter()

    def _draw_batches(self) -> list[list[int]]:
        """Returns this process's share of the running epoch's batches; an incomplete last one is left out."""
        # One order for all processes, from seed and epoch, of which each takes slices.
        generator = torch.Generator().manual_seed(self.options.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.data), generator=generator).tolist()

        share = self.batch_size // self.processes
        # Batch by batch: process p takes the p-th part of every batch.
        starts = range(
            self.process * share, self.steps_per_epoch * self.batch_size, self.batch_size
        )
        return [order[start : start + share] for start in starts]

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what} in epoch {self.epoch + 1}, batch {self.step + 1} (step {self.steps_done + 1} of "
            f"{self.total_steps}); lower `lr` (it was {self.options.lr:g}) and start again."
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the network has the weights that are scored and saved; states keep its own."""
        if self.learner.ema is None:
            yield
            return

        # States saved meanwhile must hold the trained weights, not their average.
        self.own = self.learner.weights()
        try:
            with self.learner.ema.applied(self.model):
                yield
        finally:
            self.own = None

    def end_epoch(self) -> EpochResult:
        """Scores the network if that is due, and moves on to the next epoch."""
        # The last step's update has been seen by no loss.
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self._diverged("A weight became NaN or infinite")

        # Read these off before the counters are set back for the next epoch.
        mean_loss = sum(self.losses) / len(self.losses)
        images_per_second = self.images / max(self.seconds, 1e-9)
        lr = self.learner.lr

        # The epoch counts as done from here: a state saved below starts with the next.
        self.epoch, self.step = self.epoch + 1, 0
        self.losses = []
        self.seconds, self.images = 0.0, 0

        # The last epoch is always scored.
        value, best = None, False
        # The last epoch is always scored, so that every run ends with a score.
        if self.epoch % self.options.eval_every == 0 or self.epoch == self.options.epochs:
            value = self.last_score = self.evaluate()
            best = value.miou > self.best_miou
            self.best_miou = max(self.best_miou, value.miou)
        return EpochResult(self.epoch, mean_loss, lr, value, best, images_per_second)

    def evaluate(self) -> Score:
        """Scores this process's share of the validation images; the counts of all processes are added up."""
        # Only counts are exchanged: they add up exactly, whatever process saw which image.
        total = Tally(self.num_classes, device=self.device).counts
        for counts in tallies(
            self.model,
            shard(self.splits.val, self.process, self.processes),
            self.num_classes,
            EvalMode(input_shape=self.options.input_shape),
            device=self.device,
            batch_size=self.batch_size // self.processes,
            num_workers=self.num_workers,
        ):
            total += counts.sum(0)
        return score(self.learner.summed(total), self.num_classes, len(self.splits.val))

    def state_is_due(self) -> bool:
        every = self.options.save_steps
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
