"""The folder of a training run, kept up to date after every epoch.

best_epoch_weights.pth          the weights of the epoch with the highest validation mIoU
last_epoch_weights.pth          the weights after the last epoch
ep###-loss…-miou….pth           with `keep` N, those of the N latest epochs
training_results.json           settings, every epoch's loss and score
training_log.csv                the same as a table
epoch_loss.png, epoch_miou.png  curves, at the end
contact_sheet.png               validation images with ground truth, prediction and where they differ, at the end
tensorboard/                    with `tensorboard`, scalars of every step and epoch, and the contact sheet
resume.pth                      all that is needed to resume the run
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segprune.checkpoint import load, save
from segprune.data import Sample, Source
from segprune.files import atomic_path, is_same_path, write_csv, write_json
from segprune.inference.evaluate import EvalMode, Score
from segprune.inference.label_maps import label_maps, make_network, prepare
from segprune.model import SegFormer
from segprune.runs.records import environment, score_from_record, score_record
from segprune.spec import spec_to_dict
from segprune.tensor_files import save_record
from segprune.training.state import EpochResult, TrainState

BEST, LAST, RESULTS, LOG, RESUME, SHEET = (
    "best_epoch_weights.pth",
    "last_epoch_weights.pth",
    "training_results.json",
    "training_log.csv",
    "resume.pth",
    "contact_sheet.png",
)
KEPT = re.compile(
    r"ep(\d{3,})-loss[^-]*(-miou\d\.\d{4})?\.pth"
)  # not the VOC scripts' ep001-loss0.1-val_loss0.2.pth
SHEET_IMAGES = 8
LOGGED = (
    "epoch",
    "loss",
    "lr",
    "miou",
    "mean_accuracy",
    "pixel_accuracy",
    "images_per_second",
    "best",
)


@dataclass(frozen=True)
class Saving:
    """What is saved of a run, and where.

    `settings` are saved with the results and for resuming, `extra` inside the checkpoints. A run that is not
    `resumable` is a part of something larger that has to begin again.
    """

    folder: Path
    settings: Mapping[str, Any]
    extra: Mapping[str, Any]
    keep: int = 0
    tensorboard: bool = False
    resumable: bool = True


@dataclass(frozen=True)
class Fit:
    """How a run ended: the number and score of its best epoch, and the file that holds that epoch's weights."""

    epoch: int
    score: Score
    path: Path


class Journal:
    """Writes the files above.

    `epochs` are the rows of an earlier part of the run, of `step` steps; `has_state` says that RESUME is this run's.
    """

    def __init__(
        self,
        model: SegFormer,
        saving: Saving,
        epochs: list[dict[str, Any]],
        step: int,
        has_state: bool = False,
    ) -> None:
        self.model = model
        self.folder = saving.folder
        self.settings = dict(saving.settings)
        self.extra = dict(saving.extra)
        self.keep = saving.keep

        # The rows of the epochs before a resume are written again with the new ones.
        self.epochs = epochs
        self.step = step
        self.last_epoch = epochs[-1]["epoch"] if epochs else 0  # whose weights LAST holds
        self.has_state = has_state
        self.board = (
            _open_board(self.folder / "tensorboard", step) if saving.tensorboard else None
        )

    def step_done(self, done: int, total: int, loss: float, lr: float) -> None:
        self.step = done
        if self.board is not None:
            self.board.add_scalar("train/loss", loss, done)
            self.board.add_scalar("train/lr", lr, done)

    def epoch_done(self, result: EpochResult, state: TrainState) -> None:
        # Checkpoints hold this row too, but not the speed, which is no fact about weights.
        row: dict[str, Any] = {
            "epoch": result.epoch,
            "loss": result.loss,
            "lr": result.lr,
            "best": result.best,
        }
        if result.score is not None:
            row |= score_record(result.score)
        extra = self.extra | {"epoch": row}
        self.epochs.append(row | {"images_per_second": round(result.images_per_second, 2)})

        # The weights.
        if result.best:
            save(self.model, self.folder / BEST, extra=extra)
        save(self.model, self.folder / LAST, extra=extra)
        self.last_epoch = result.epoch
        if self.keep:
            self._keep(result, extra)

        # The results, the log and the state.
        record = {
            "settings": self.settings,
            "epochs": self.epochs,
            "environment": environment(),
        }
        write_json(record, self.folder / RESULTS)
        rows = [[epoch.get(name, "") for name in LOGGED] for epoch in self.epochs]
        write_csv([LOGGED, *rows], self.folder / LOG)
        # Last: a resumed run relies on the files of all epochs that its state counts.
        self.save_state(state)

        if self.board is not None and result.score is not None:
            for name in ("miou", "mean_accuracy", "pixel_accuracy"):
                self.board.add_scalar(f"val/{name}", getattr(result.score, name), self.step)

    def _keep(self, result: EpochResult, extra: Mapping[str, Any]) -> None:
        """Saves this epoch's own file, and removes those of epochs that are too old or are being run again."""
        score = "" if result.score is None else f"-miou{result.score.miou:.4f}"
        path = self.folder / f"ep{result.epoch:03d}-loss{result.loss:.3f}{score}.pth"
        save(self.model, path, extra=extra)

        # A resumed run repeats epochs; files of later ones hold weights it gave up.
        for other in self.folder.glob("ep*.pth"):
            name = KEPT.fullmatch(other.name)
            if name and other != path and not 0 < result.epoch - int(name[1]) < self.keep:
                other.unlink()

    def save_state(self, state: TrainState) -> None:
        spec = json.dumps(spec_to_dict(self.model.spec))
        record = {
            "spec": spec,
            "settings": self.settings,
            "extra": self.extra,
            "epochs": self.epochs,
        }
        save_record(record | {"state": vars(state)}, self.folder / RESUME)
        self.has_state = True

    def best(self) -> Fit:
        """Reads the best epoch off the results, since only the main process has seen it."""
        epochs = json.loads((self.folder / RESULTS).read_text(encoding="utf-8"))["epochs"]
        row = [row for row in epochs if row["best"]][-1]
        return Fit(row["epoch"], score_from_record(row), self.folder / BEST)

    def last_good(self) -> str:
        """Returns the end of a sentence: where to go back to after a failure."""
        if not self.last_epoch:
            return "no epoch had been completed"
        return f"the last good checkpoint is {self.folder / LAST} of epoch {self.last_epoch}"

    def draw(
        self, val: Sequence[Sample], source: Source, how: EvalMode, device: torch.device
    ) -> None:
        """Draws the curves, and a sheet of images spread over the split, as the best epoch's network sees them."""
        # Drawing takes a second to import.
        from segprune import plots
        from segprune.inference.draw import contact_sheet

        plots.curves(self.epochs, self.folder)

        # The model in memory is the last epoch's, so read the best one's.
        model = load(self.folder / BEST, device=device)
        num_classes = model.spec.num_classes
        network = make_network(model, num_classes, device, 1, model.spec.preprocessing)
        chosen = np.linspace(0, len(val) - 1, min(SHEET_IMAGES, len(val))).round().astype(int)
        rows = []
        for i in chosen:
            image, labels = val[i].load()
            with torch.inference_mode():
                (predicted,) = label_maps(network, [prepare(image, how)], how)
            # Labels that are no class were ignored in training, and are drawn so.
            labels = np.where(labels < num_classes, labels, 255).astype(np.uint8)
            rows.append((val[i].name, image, labels, predicted.cpu().numpy().astype(np.uint8)))

        sheet = contact_sheet(rows, source.palette, source.class_names)
        with atomic_path(self.folder / SHEET) as temporary:
            sheet.save(temporary, format="PNG")
        if self.board is not None:
            self.board.add_image(
                "val/contact_sheet", np.asarray(sheet), self.step, dataformats="HWC"
            )

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def classes_of(source: Source, num_classes: int) -> dict[str, Any]:
    """Returns what a checkpoint's extra says of its classes; nothing unless the data names each of them."""
    if len(source.class_names) != num_classes:
        return {}
    return {"class_names": list(source.class_names), "palette": list(source.palette)}


def check_not_overwritten(folder: Path, *inputs: str) -> None:
    """Raises ValueError if a run in `folder` would overwrite one of its own input checkpoints; "" is ignored."""
    for written in (BEST, LAST):
        check_kept(folder / written, *inputs, save_dir=folder)


def check_kept(written: Path, *inputs: str, save_dir: Path) -> None:
    """The same for one file that will be written below `save_dir`."""
    for name in inputs:
        if name and is_same_path(name, written):
            raise ValueError(
                f"{name} would be overwritten by this run; give another `save_dir` than {save_dir}."
            )


def _open_board(folder: Path, step: int) -> Any:
    """Opens TensorBoard's writer; what an earlier run wrote beyond `step` is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "`tensorboard` needs TensorBoard, which is not installed; run: pip install tensorboard"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)
