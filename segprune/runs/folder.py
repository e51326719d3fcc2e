"""The folder of a training run, kept up to date after every epoch.

best_epoch_weights.pth          the weights of the epoch with the highest validation mIoU
last_epoch_weights.pth          the weights after the last epoch
ep###-loss…-miou….pth           with --keep N, those of the N latest epochs
training_results.json           settings, every epoch's loss and score
training_log.csv                the same as a table
epoch_loss.png, epoch_miou.png  curves, at the end
contact_sheet.png               validation pictures with ground truth, prediction and where they differ, at the end
tensorboard/                    with --tensorboard, scalars of every step and epoch, and the contact sheet
resume.pth                      all that `segprune train --resume` needs
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
from segprune.data import Sample
from segprune.files import atomic_path, save_record, write_csv, write_json
from segprune.inference.evaluate import EvalMode, Score
from segprune.inference.label_maps import Network, label_maps, prepare
from segprune.model import SegFormer
from segprune.runs.records import environment, score_from_record, score_record
from segprune.spec import spec_to_dict
from segprune.training.state import EpochResult, TrainState

BEST, LAST, RESULTS, LOG, RESUME, SHEET = (
    "best_epoch_weights.pth",
    "last_epoch_weights.pth",
    "training_results.json",
    "training_log.csv",
    "resume.pth",
    "contact_sheet.png",
)
KEPT = re.compile(r"ep(\d{3,})-loss[^-]*(-miou\d\.\d{4})?\.pth")  # not the VOC scripts' ep001-loss0.1-val_loss0.2.pth
SHEET_PICTURES = 8
LOGGED = ("epoch", "loss", "lr", "miou", "mean_accuracy", "pixel_accuracy", "images_per_second", "best")


@dataclass(frozen=True)
class Fit:
    """What came of a run: the best epoch's number and score, and the file that holds its weights."""

    epoch: int
    score: Score
    path: Path


class Journal:
    """Writes the files above; `epochs` are the rows of an earlier part of the run, `step` is how far that came.

    `resumable` says whether the state in the folder is this run's.
    """

    def __init__(
        self,
        model: SegFormer,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        extra: Mapping[str, Any],
        epochs: list[dict[str, Any]],
        step: int,
        resumable: bool = False,
        keep: int = 0,
        tensorboard: bool = False,
    ) -> None:
        self.model = model
        self.folder = folder
        self.settings = dict(settings)
        self.extra = dict(extra)
        self.epochs = epochs
        self.step = step
        self.resumable = resumable
        self.last_epoch = epochs[-1]["epoch"] if epochs else 0  # whose weights LAST holds
        self.keep = keep
        self.board = _board(folder / "tensorboard", step) if tensorboard else None

    def step_done(self, done: int, total: int, loss: float, lr: float) -> None:
        self.step = done
        if self.board is not None:
            self.board.add_scalar("train/loss", loss, done)
            self.board.add_scalar("train/lr", lr, done)

    def epoch_done(self, result: EpochResult, state: TrainState) -> None:
        row: dict[str, Any] = {"epoch": result.epoch, "loss": result.loss, "lr": result.lr, "best": result.best}
        if result.score is not None:
            row |= score_record(result.score)
        extra = self.extra | {"epoch": row}
        self.epochs.append(row | {"images_per_second": round(result.images_per_second, 2)})
        if result.best:
            save(self.model, self.folder / BEST, extra=extra)
        save(self.model, self.folder / LAST, extra=extra)
        self.last_epoch = result.epoch
        if self.keep:
            self._keep(result, extra)
        record = {"settings": self.settings, "epochs": self.epochs, "environment": environment()}
        write_json(record, self.folder / RESULTS)
        write_csv([LOGGED, *([row.get(name, "") for name in LOGGED] for row in self.epochs)], self.folder / LOG)
        self.save_state(state)
        if self.board is not None and result.score is not None:
            for name in ("miou", "mean_accuracy", "pixel_accuracy"):
                self.board.add_scalar(f"val/{name}", getattr(result.score, name), self.step)

    def _keep(self, result: EpochResult, extra: Mapping[str, Any]) -> None:
        """This epoch's own file; of the older ones the latest stay, and those of a part that is run again go."""
        score = "" if result.score is None else f"-miou{result.score.miou:.4f}"
        path = self.folder / f"ep{result.epoch:03d}-loss{result.loss:.3f}{score}.pth"
        save(self.model, path, extra=extra)
        for other in self.folder.glob("ep*.pth"):
            name = KEPT.fullmatch(other.name)
            if name and other != path and not 0 < result.epoch - int(name[1]) < self.keep:
                other.unlink()

    def save_state(self, state: TrainState) -> None:
        spec = json.dumps(spec_to_dict(self.model.spec))
        record = {"spec": spec, "settings": self.settings, "extra": self.extra, "epochs": self.epochs}
        save_record(record | {"state": vars(state)}, self.folder / RESUME)
        self.resumable = True

    def best(self) -> Fit:
        """Read off the results, which only the main process has written."""
        epochs = json.loads((self.folder / RESULTS).read_text(encoding="utf-8"))["epochs"]
        row = [row for row in epochs if row["best"]][-1]
        return Fit(row["epoch"], score_from_record(row), self.folder / BEST)

    def last_good(self) -> str:
        """Where to go back to after a failure, as a sentence's end."""
        if not self.last_epoch:
            return "no epoch had been completed"
        return f"the last good checkpoint is {self.folder / LAST} of epoch {self.last_epoch}"

    def draw(
        self, val: Sequence[Sample], how: EvalMode, names: Sequence[str], palette: Sequence[int], device: torch.device
    ) -> None:
        """The curves, and a sheet of validation pictures spread over the split, as the best epoch sees them."""
        from segprune import plots  # here, since drawing takes a second to import
        from segprune.inference.draw import contact_sheet

        plots.curves(self.epochs, self.folder)
        chosen = [val[i] for i in np.linspace(0, len(val) - 1, min(SHEET_PICTURES, len(val))).round().astype(int)]
        model = load(self.folder / BEST, device=device)
        network = Network(model, model.spec.num_classes, device, 1)
        rows = []
        for sample in chosen:
            image, labels = sample.load()
            with torch.inference_mode():
                (predicted,) = label_maps(network, [prepare(image, how)], how)
            labels = np.where(labels < model.spec.num_classes, labels, 255).astype(np.uint8)
            rows.append((sample.name, image, labels, predicted.cpu().numpy().astype(np.uint8)))
        sheet = contact_sheet(rows, palette, names)
        with atomic_path(self.folder / SHEET) as temporary:
            sheet.save(temporary, format="PNG")
        if self.board is not None:
            self.board.add_image("val/contact_sheet", np.asarray(sheet), self.step, dataformats="HWC")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def check_not_overwritten(folder: Path, *inputs: str) -> None:
    """ValueError where a checkpoint that a run reads is one that it will write; an empty name is none."""
    for written in (BEST, LAST):
        check_kept(folder / written, *inputs, save_dir=folder)


def check_kept(written: Path, *inputs: str, save_dir: Path) -> None:
    """The same for one file that will be written; `save_dir` is what the flag was."""
    for name in inputs:
        if name and Path(name).resolve() == written.resolve():
            raise ValueError(f"{name} would be written over by this run; give another --save_dir than {save_dir}.")


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer; what an earlier run wrote beyond `step` is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "--tensorboard needs TensorBoard, which is not installed; run: pip install tensorboard"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)
