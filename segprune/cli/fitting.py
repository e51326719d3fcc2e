"""One training run in a folder: bar, history, best and last checkpoint, and the state to resume from.

best_epoch_weights.pth   the weights of the epoch with the highest validation mIoU
last_epoch_weights.pth   the weights after the last epoch
training_results.json    settings, every epoch's loss and score
resume.pth               all that `segprune train --resume` needs
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from segprune.checkpoint import load_record, save, save_record, write_json
from segprune.cli.common import console, progress_bar
from segprune.model import SegFormer
from segprune.report import environment, score_from_record, score_record
from segprune.spec import Spec, spec_from_dict, spec_to_dict
from segprune.training.evaluate import Score
from segprune.training.loop import EpochResult, TrainConfig, TrainingInterrupted, TrainState, train

BEST, LAST, RESULTS, RESUME = (
    "best_epoch_weights.pth",
    "last_epoch_weights.pth",
    "training_results.json",
    "resume.pth",
)


@dataclass(frozen=True)
class Fit:
    """What came of a run: the best epoch's number and score, and the file that holds its weights."""

    epoch: int
    score: Score
    path: Path


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
    folder: Path,
    *,
    cuda: bool,
    settings: Mapping[str, Any],
    extra: Mapping[str, Any],
    resumed: Resumable | None = None,
) -> Fit:
    """Train `model` and keep the folder's files up to date after every epoch.

    `settings` is saved for --resume and with the results, `extra` inside the checkpoints. Ctrl-C leaves
    resume.pth and raises KeyboardInterrupt with the command that goes on.
    """
    accelerator = Accelerator(cpu=not cuda, mixed_precision=config.mixed_precision)
    keeper = _Keeper(model, folder, settings, extra, [] if resumed is None else resumed.epochs)
    try:
        with progress_bar("training") as advance:
            train(
                model,
                config,
                accelerator=accelerator,
                state=None if resumed is None else resumed.state,
                on_step=_shown(advance),
                on_epoch=keeper.epoch_done,
            )
    except TrainingInterrupted as interrupted:
        if accelerator.is_main_process:
            keeper.save_state(interrupted.state)
        command = f"python -m segprune train --resume --save_dir {shlex.quote(str(folder))}"
        raise KeyboardInterrupt(f"{interrupted} Go on with: {command}") from interrupted
    return keeper.best()


def _shown(advance: Callable[..., None]) -> Callable[[int, int, float, float], None]:
    def on_step(done: int, total: int, loss: float, lr: float) -> None:
        advance(done, total, f"loss {loss:.3f}  lr {lr:.1e}")

    return on_step


class _Keeper:
    """The folder's files, written anew after each epoch."""

    def __init__(
        self,
        model: SegFormer,
        folder: Path,
        settings: Mapping[str, Any],
        extra: Mapping[str, Any],
        epochs: list[dict[str, Any]],
    ) -> None:
        self.model = model
        self.folder = folder
        self.settings = dict(settings)
        self.extra = dict(extra)
        self.epochs = epochs

    def epoch_done(self, result: EpochResult, state: TrainState) -> None:
        row: dict[str, Any] = {"epoch": result.epoch, "loss": result.loss, "best": result.best}
        line = f"epoch {result.epoch}: loss {result.loss:.4f}"
        if result.score is not None:
            row |= score_record(result.score)
            line += f", val mIoU {result.score.miou:.4f}" + (" (best so far)" if result.best else "")
        self.epochs.append(row)
        extra = self.extra | {"epoch": row}
        if result.best:
            save(self.model, self.folder / BEST, extra=extra)
        save(self.model, self.folder / LAST, extra=extra)
        record = {"settings": self.settings, "epochs": self.epochs, "environment": environment()}
        write_json(record, self.folder / RESULTS)
        self.save_state(state)
        console.print(line)

    def save_state(self, state: TrainState) -> None:
        spec = json.dumps(spec_to_dict(self.model.spec))
        record = {"spec": spec, "settings": self.settings, "extra": self.extra, "epochs": self.epochs}
        save_record(record | {"state": vars(state)}, self.folder / RESUME)

    def best(self) -> Fit:
        row = [row for row in self.epochs if row["best"]][-1]
        return Fit(row["epoch"], score_from_record(row), self.folder / BEST)


def load_resumable(folder: Path) -> tuple[Resumable, dict[str, Any]]:
    """The run that stopped in `folder`, and the extra its checkpoints carry; FileNotFoundError if there is none."""
    path = folder / RESUME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so no run can be resumed there; give the --save_dir of one.")
    record = load_record(path)
    try:
        spec = spec_from_dict(json.loads(record["spec"]))
        state = TrainState(**record["state"])
        return Resumable(spec, state, record["settings"], record["epochs"]), record["extra"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the state of a run; give the --save_dir of one, or start anew.") from error
