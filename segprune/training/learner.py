"""What learns, and one step of it: the network and its projections, their optimiser, the loss, the moving average.

A step shares its batch with the other processes and takes its part in pieces. The loop knows where a run stands, and
what is scored and saved.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from segprune.data import IGNORE_INDEX
from segprune.spec import preprocessing_of
from segprune.training.distill import Projections
from segprune.training.ema import Ema
from segprune.training.objective import Objective, Student
from segprune.training.optim import make_optimizer, parameter_groups
from segprune.training.options import TrainOptions
from segprune.training.state import TrainState


class Learner:
    """Trains `model` in place on the accelerator's device, until `close`."""

    def __init__(
        self,
        model: nn.Module,
        options: TrainOptions,
        accelerator: Accelerator,
        teacher: nn.Module | None,
    ) -> None:
        self.options = options
        self.accelerator = accelerator
        self.processes = accelerator.num_processes
        # `bare` is the network without DDP around it, which is averaged, scored and saved.
        self.bare = model.to(accelerator.device)
        self.encoder = _encoder_parameters(model) if options.freeze_epochs else []

        # What a step minimises.
        self.schedule = options.schedule()
        # Without a teacher there is nothing to distil; with one, it only answers.
        distillation = None if teacher is None else options.distillation()
        self.distilled = distillation is not None
        loss = options.segmentation_loss()
        self.objective = Objective(
            loss,
            distillation,
            _freeze(teacher, accelerator),
            accelerator.autocast,
            preprocessing_of(model),
        )

        # The projections learn beside the network, but no checkpoint keeps them.
        self.projections = _make_projections(model, teacher, options)
        assert options.lr is not None
        assert options.head_lr is not None
        self.highest_lr = options.lr
        # The decode head has a rate of its own; the projections always take the plain one.
        groups = parameter_groups(model, options.weight_decay, options.head_lr)
        if self.projections is not None:
            self.projections.to(accelerator.device)
            groups += parameter_groups(self.projections, options.weight_decay)
        # Optimiser and average hold the bare network, whose names do not depend on DDP.
        self.bare_optimizer = make_optimizer(
            options.optimizer, groups, options.lr, options.momentum
        )
        self.ema = Ema(model, options.ema) if options.ema else None
        self.wrapped = False

    @property
    def lr(self) -> float:
        """The run's learning rate, which each group multiplies by its own scale."""
        group = self.bare_optimizer.param_groups[0]
        return float(group["lr"] / group["lr_scale"])

    def prepare(self, epoch: int) -> None:
        """Hands the network to accelerate; again when the encoder is freed, since DDP looks at what trains."""
        self.bare.train()
        frozen = epoch < self.options.freeze_epochs
        # Wrapped once, and once more in the epoch in which the encoder starts to learn.
        if self.wrapped and not (self.encoder and epoch == self.options.freeze_epochs):
            return

        # Set what trains before wrapping: DDP puts its hooks on those parameters alone.
        for parameter in self.encoder:
            parameter.requires_grad_(not frozen)
        self._release()

        # Compiled in place, which leaves the names in the state dict as they are.
        student = Student(self.bare, self.projections, distilled=self.distilled)
        if self.options.compile:
            student.compile()
        self.student, self.optimizer = self.accelerator.prepare(student, self.bare_optimizer)
        self.wrapped = True

    def close(self) -> None:
        """Releases everything: a process group that something still holds can abort the interpreter's exit."""
        for parameter in self.encoder:
            parameter.requires_grad_(True)
        self.student = self.optimizer = None
        self._release()

    def _release(self) -> None:
        """Takes back what accelerate holds."""
        # Collecting garbage takes most of a second, so it is done only where a process group needs it.
        if self.processes > 1:
            self.accelerator.free_memory()
        else:
            self.accelerator._models.clear()
            self.accelerator._optimizers.clear()

    def step(
        self,
        pixels: Tensor,
        labels: Tensor,
        steps_done: int,
        total_steps: int,
        stop: threading.Event,
    ) -> tuple[float, bool]:
        """Takes one step on this process's share of the batch, B 3 H W and B H W.

        Returns the loss of the whole batch, and whether any process was told to stop. Raises FloatingPointError
        if the loss is not finite, before the weights are touched.
        """
        # The rate follows from the steps of the whole run, so a resumed one keeps it.
        self._set_lr(steps_done, total_steps)
        pieces = self.options.accumulate

        # Pixels are averaged, not images: pieces and processes may hold unlike numbers.
        # Divided by this number, the mean of the pieces' losses is the loss of the whole batch.
        labelled = self.summed((labels != IGNORE_INDEX).sum().float())
        num_labelled = labelled / (self.processes * pieces)

        # Only the last piece exchanges gradients between processes.
        self.optimizer.zero_grad()
        total = torch.zeros((), device=pixels.device)
        for number, (x, y) in enumerate(
            zip(pixels.chunk(pieces), labels.chunk(pieces), strict=True), start=1
        ):
            with nullcontext() if number == pieces else self.accelerator.no_sync(self.student):
                loss = self.objective(self.student, x, y, num_labelled) / pieces
                self.accelerator.backward(loss)
            total += loss.detach() / self.processes

        # The loss and the wish to stop are exchanged together, so that all processes stop after the same step.
        stops = total.new_full((), float(stop.is_set()))
        value, stopped = self.summed(torch.stack([total, stops])).tolist()
        if not math.isfinite(value):
            raise FloatingPointError(f"The loss became {value}")

        # Clip after the pieces are added up, as if the whole batch had been one.
        if self.options.clip_norm:
            self.accelerator.clip_grad_norm_(self.student.parameters(), self.options.clip_norm)
        self.optimizer.step()
        # The average follows the bare weights, which DDP keeps equal in every process.
        if self.ema is not None:
            self.ema.update(self.bare)
        return value, stopped > 0

    def _set_lr(self, steps_done: int, total_steps: int) -> None:
        factor = self.schedule.factor(steps_done, total_steps)
        for group in self.bare_optimizer.param_groups:
            group["lr"] = self.highest_lr * factor * group["lr_scale"]

    def summed(self, tensor: Tensor) -> Tensor:
        return tensor if self.processes == 1 else self.accelerator.reduce(tensor, "sum")

    def weights(self) -> dict[str, Tensor]:
        return _copied(self.bare.state_dict())

    def state(self) -> dict[str, Any]:
        """Returns copies of the fields of a TrainState that are not the loop's."""
        scaler = self.accelerator.scaler
        return {
            "projections": {}
            if self.projections is None
            else _copied(self.projections.state_dict()),
            "optimizer": deepcopy(self.bare_optimizer.state_dict()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def restore(self, state: TrainState) -> None:
        # All was built before, so loading replaces numbers only, and checks the names.
        self.bare.load_state_dict(state.model)
        if self.projections is not None:
            self.projections.load_state_dict(state.projections)
        # Copied, as the optimiser would go on with the very tensors of the saved state.
        self.bare_optimizer.load_state_dict(deepcopy(state.optimizer))
        if state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        if self.ema is not None and state.ema is not None:
            self.ema.load_state_dict(state.ema)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _freeze(teacher: nn.Module | None, accelerator: Accelerator) -> nn.Module | None:
    return (
        None if teacher is None else teacher.to(accelerator.device).eval().requires_grad_(False)
    )


def _make_projections(
    model: nn.Module, teacher: nn.Module | None, options: TrainOptions
) -> Projections | None:
    """Returns projections of the student's maps to the teacher's widths, drawn from the seed alone."""
    if teacher is None or not options.distillation().feature:
        return None

    torch.manual_seed(options.seed)
    widths = [[stage.width for stage in network.spec.stages] for network in (model, teacher)]  # type: ignore[union-attr]
    return Projections(*widths)


def _encoder_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that `freeze_epochs` freezes; those that are not trained anyway are left as they are."""
    encoder = getattr(model, "encoder", None)
    if encoder is None:
        name = type(model).__name__
        raise ValueError(
            f"`freeze_epochs` needs a submodule `encoder`, which {name} lacks; set it to 0."
        )
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]
