"""One training run: followed, written down, and left resumable however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from segprune.checkpoint.ours import check_extra, check_state, check_storages, expected_state
from segprune.data import Source
from segprune.files import parse_json
from segprune.inference.label_maps import EvalMode
from segprune.model import SegFormer
from segprune.runs.folder import RESUME, Fit, Journal, Saving, classes_of
from segprune.spec import Spec, spec_from_dict
from segprune.tensor_files import load_record
from segprune.training.loop import OnStep, train
from segprune.training.options import TrainOptions, complete
from segprune.training.state import (
    EpochResult,
    Splits,
    TrainingDiverged,
    TrainingInterrupted,
    TrainState,
)


@dataclass(frozen=True)
class Resumable:
    """A run read back from its folder: where it stood, and the settings that it was started with."""

    spec: Spec
    state: TrainState
    settings: dict[str, Any]
    epochs: list[dict[str, Any]]


class RunStopped(OSError):
    """A file of a run could not be written; the run can be resumed from its folder."""


def fit(
    model: SegFormer,
    options: TrainOptions,
    source: Source,
    saving: Saving,
    *,
    device: torch.device | str = "cpu",
    teacher: SegFormer | None = None,
    resumed: Resumable | None = None,
    on_step: OnStep | None = None,
    on_result: Callable[[EpochResult], None] | None = None,
) -> Fit:
    """Trains `model` on the source's train and val, and keeps the folder's files up to date after every epoch.

    `options` are complete but for what a machine decides. `on_step` and `on_result` are called after every step and
    epoch. Ctrl-C raises TrainingInterrupted, after the state was saved if the run is resumable.
    """
    # What the machine decides is settled first, since the folder's files state it.
    options = complete(options, torch.device(device))
    accelerator = Accelerator(
        cpu=torch.device(device).type == "cpu", mixed_precision=options.amp
    )
    splits = Splits(source.split("train"), source.split("val"))
    # Checkpointing computes the encoder's activations twice, which saves their memory.
    model.encoder.checkpointing = options.checkpointing

    # What is written, and what of it only one of several processes writes.
    state = None if resumed is None else resumed.state
    # Of several processes the main one alone writes.
    saving = replace(saving, tensorboard=saving.tensorboard and accelerator.is_main_process)
    saving = replace(
        saving, extra={**saving.extra, **classes_of(source, model.spec.num_classes)}
    )
    # A resumed run goes on in the same log, so that its curves have no gap.
    journal = Journal(
        model,
        saving,
        epochs=[] if resumed is None else resumed.epochs,
        step=0 if state is None else state.steps_done,
        has_state=state is not None,
    )

    def step_done(done: int, total: int, loss: float, lr: float) -> None:
        if on_step is not None:
            on_step(done, total, loss, lr)
        journal.step_done(done, total, loss, lr)

    # The epoch is written before it is shown, so that what is shown is on disk.
    def epoch_done(result: EpochResult, state: TrainState) -> None:
        # The files first: what is shown is then on the disk already.
        journal.epoch_done(result, state)
        if on_result is not None:
            on_result(result)

    try:
        with _left_resumable(journal, saving, accelerator):
            train(
                model,
                options,
                splits,
                accelerator=accelerator,
                teacher=teacher,
                state=state,
                on_step=step_done,
                on_epoch=epoch_done,
                on_state=journal.save_state,
            )
            # Still within, since a disk can be full here too.
            if accelerator.is_main_process:
                journal.draw(
                    splits.val,
                    source,
                    EvalMode(input_shape=options.input_shape),
                    accelerator.device,
                )
        # No process may read the results before the main one has written them.
        accelerator.wait_for_everyone()
        return journal.best()
    finally:
        journal.close()
        accelerator.end_training()


@contextmanager
def _left_resumable(
    journal: Journal, saving: Saving, accelerator: Accelerator
) -> Iterator[None]:
    """Saves the state of an interrupted run, and adds to errors where the last good weights are."""
    try:
        yield
    except TrainingInterrupted as interrupted:
        # The loop ended the running step before it raised, so this state is whole.
        if saving.resumable and accelerator.is_main_process:
            journal.save_state(interrupted.state)
        raise

    except TrainingDiverged as diverged:
        # The weights in memory are broken; those of the last epoch's file are not.
        raise ValueError(
            f"{str(diverged).removesuffix('.')}; {journal.last_good()}."
        ) from diverged

    except OSError as error:
        # Without a saved state nothing can be resumed, so the error is left as it is.
        if not saving.resumable or not journal.has_state:
            raise
        said = str(error).removesuffix(".")
        raise RunStopped(
            f"{said}; {journal.last_good()}, and the run can be resumed."
        ) from error


def load_resumable(folder: Path) -> tuple[Resumable, dict[str, Any]]:
    """Returns the run that stopped in `folder` and the extra of its checkpoints. FileNotFoundError if there is none."""
    path = folder / RESUME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so no run can be resumed there; give the `save_dir` of one."
        )
    record = load_record(path)
    # A file of another kind lacks these keys, and the tensors must fit the spec exactly.
    try:
        spec = spec_from_dict(parse_json(record["spec"]))
        state = TrainState(**record["state"])
        check_storages(state.model)
        check_state(state.model, expected_state(spec), "its spec")
        _check_counts(state, record["epochs"])
        settings = dict(record["settings"])
        return Resumable(spec, state, settings, record["epochs"]), check_extra(record["extra"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the state of a run; give the `save_dir` of one, or start anew."
        ) from error


def _check_counts(state: TrainState, epochs: Any) -> None:
    """Raises TypeError unless what the loop counts with is of the types that it saves."""
    counts = (state.epoch, state.step, state.steps_done)
    numbers = (state.best_miou, *state.losses)
    if (
        not all(type(number) is int and number >= 0 for number in counts)
        or not all(type(number) in (int, float) for number in numbers)
        or not isinstance(epochs, list)
        or not all(type(row["epoch"]) is int for row in epochs)
        or not all(isinstance(part, dict) for part in (state.optimizer, state.config))
    ):
        raise TypeError("a count is of another type")
