"""One training run from the command line: watched, written down, and left resumable however it ends."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from segprune.checkpoint.ours import check_state, expected_state
from segprune.data import Source
from segprune.files import load_record
from segprune.inference.evaluate import EvalMode
from segprune.model import SegFormer
from segprune.runs.folder import RESUME, Fit, Journal
from segprune.spec import Spec, spec_from_dict
from segprune.training.config import TrainConfig
from segprune.training.loop import OnStep, train
from segprune.training.state import EpochResult, Splits, TrainingDiverged, TrainingInterrupted, TrainState


@dataclass(frozen=True)
class Resumable:
    """A run read back from its folder: where it stood and what the commands around it had set."""

    spec: Spec
    state: TrainState
    settings: dict[str, Any]
    epochs: list[dict[str, Any]]


def fit(
    model: SegFormer,
    config: TrainConfig,
    source: Source,
    folder: Path,
    *,
    cuda: bool,
    settings: Mapping[str, Any],
    extra: Mapping[str, Any],
    teacher: SegFormer | None = None,
    partial: bool = False,
    resumed: Resumable | None = None,
    keep: int = 0,
    tensorboard: bool = False,
    on_step: OnStep | None = None,
    on_result: Callable[[EpochResult], None] | None = None,
) -> Fit:
    """Train `model` on the source's train and val, and keep the folder's files up to date after every epoch.

    `settings` is saved for --resume and with the results, `extra` inside the checkpoints. Ctrl-C leaves
    resume.pth and raises KeyboardInterrupt with the command that goes on.
    `partial` says that the run is a part of another command, which has to be begun again.
    """
    accelerator = Accelerator(cpu=not cuda, mixed_precision=config.mixed_precision)
    splits = Splits(source.split("train"), source.split("val"))
    state, epochs = (None, []) if resumed is None else (resumed.state, resumed.epochs)
    journal = Journal(
        model,
        folder,
        settings=settings,
        extra=extra,
        epochs=epochs,
        step=0 if state is None else state.steps_done,
        resumable=state is not None,
        keep=keep,
        tensorboard=tensorboard and accelerator.is_main_process,
    )

    def step_done(done: int, total: int, loss: float, lr: float) -> None:
        if on_step is not None:
            on_step(done, total, loss, lr)
        journal.step_done(done, total, loss, lr)

    def epoch_done(result: EpochResult, state: TrainState) -> None:
        journal.epoch_done(result, state)
        if on_result is not None:
            on_result(result)

    try:
        with _told(journal, folder, accelerator, partial=partial):
            train(
                model,
                config,
                splits,
                accelerator=accelerator,
                teacher=teacher,
                state=state,
                on_step=step_done,
                on_epoch=epoch_done,
                on_state=journal.save_state,
            )
            if accelerator.is_main_process:
                how = EvalMode(input_shape=config.input_shape)
                journal.draw(splits.val, how, source.class_names, source.palette, accelerator.device)
        accelerator.wait_for_everyone()
        return journal.best()
    finally:
        journal.close()
        accelerator.end_training()


@contextmanager
def _told(journal: Journal, folder: Path, accelerator: Accelerator, *, partial: bool) -> Iterator[None]:
    """What ends a run early, with where it can go on from; an interrupted one's state is saved first."""
    resume = f"python -m segprune train --resume --save_dir {shlex.quote(str(folder))}"
    try:
        yield
    except TrainingInterrupted as interrupted:
        if partial:
            raise KeyboardInterrupt(f"{interrupted} Begin again with the same command.") from interrupted
        if accelerator.is_main_process:
            journal.save_state(interrupted.state)
        raise KeyboardInterrupt(f"{interrupted} Go on with: {resume}") from interrupted
    except TrainingDiverged as diverged:
        raise ValueError(f"{str(diverged).removesuffix('.')}; {journal.last_good()}.") from diverged
    except OSError as error:
        if partial or not journal.resumable:
            raise
        raise OSError(f"{str(error).removesuffix('.')}; then {resume} goes on, and {journal.last_good()}.") from error


def load_resumable(folder: Path) -> tuple[Resumable, dict[str, Any]]:
    """The run that stopped in `folder`, and the extra its checkpoints carry; FileNotFoundError if there is none."""
    path = folder / RESUME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so no run can be resumed there; give the --save_dir of one.")
    record = load_record(path)
    try:
        spec = spec_from_dict(json.loads(record["spec"]))
        state = TrainState(**record["state"])
        check_state(state.model, expected_state(spec), "its spec")
        return Resumable(spec, state, record["settings"], record["epochs"]), record["extra"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the state of a run; give the --save_dir of one, or start anew.") from error
