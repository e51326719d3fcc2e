"""Where a run stands: what callbacks get, what is saved, and what a run continues from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from torch import Tensor, nn

from segprune.data import Sample
from segprune.inference.metrics import Score


@dataclass(frozen=True)
class Splits:
    """The images that a run learns from and is scored on."""

    train: Sequence[Sample]
    val: Sequence[Sample]

    def fingerprint(self) -> str:
        """Returns a text that differs for other images or another order; a run is resumed only with the same."""
        # The number of training images marks where train ends and val begins.
        names = "\n".join(sample.name for sample in [*self.train, *self.val])
        return sha256(f"{len(self.train)}\n{names}".encode()).hexdigest()[:16]


def fingerprint_of(network: nn.Module, *, prefix: str = "encoder.") -> str:
    """Returns a text that differs for other weights, of the encoder alone unless `prefix` is "".

    A run is resumed only with the same teacher. There the decode head is left out: once folded, its weights are not
    the same bits on every machine.
    """
    # Name and shape go in too, so that equal bytes in another layer differ.
    digest = sha256()
    for name, tensor in network.state_dict().items():
        if name.startswith(prefix):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


@dataclass
class TrainState:
    """All that a run needs to continue, in copies: `epoch` is the running one, `step` the batches done in it.

    Random numbers and the order of the images follow from seed, epoch and step, so these are their state.
    """

    epoch: int
    step: int
    steps_done: int  # in all epochs
    model: dict[str, Tensor]
    projections: dict[str, Tensor]  # of distillation
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None  # of the loss, in mixed precision fp16
    ema: dict[str, Any] | None
    losses: list[float]  # of the running epoch's batches
    best_miou: float
    config: dict[str, Any]


@dataclass(frozen=True)
class EpochResult:
    """`score` is None in epochs without evaluation; `best` says whether it is the highest so far."""

    epoch: int
    loss: float
    lr: float
    score: Score | None
    best: bool
    images_per_second: float = field(compare=False)  # while training, without scoring


class TrainingInterrupted(Exception):
    """Ctrl-C or SIGTERM came; `state` is where the run stood after its last whole step."""

    def __init__(self, state: TrainState) -> None:
        super().__init__(
            f"Training was interrupted in epoch {state.epoch + 1} after {state.step} batches."
        )
        self.state = state


class TrainingDiverged(ValueError):
    """The loss or a weight is no longer finite."""


# What runs did whose states do not say: those of earlier versions.
_UNSAID = {"tf32": False}
_MAY_CHANGE = {"num_workers", "eval_every", "save_steps", "checkpointing"}


def check_same_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ValueError unless a run continues with the settings that decide its course.

    Settings that the state of an earlier version lacks are taken as alike.
    """
    old = _UNSAID | dict(old)
    for name, now in new.items():
        unsaid = name not in old or isinstance(
            old[name], dict
        )  # earlier versions saved the loss as a dict
        # Values are compared as they come out of a file, where tuples have become lists.
        if name in _MAY_CHANGE or unsaid or _as_saved(old[name]) == _as_saved(now):
            continue

        # Data and teacher have fingerprints for values, which would tell a reader nothing.
        if name == "pictures":
            raise ValueError(
                "The run to resume had other images (names, number or order of the train and val lists); "
                "give it the same data, or start anew without `resume`."
            )
        if name == "teacher":
            raise ValueError(
                "The run to resume had another teacher (its weights differ); give the same network as `teacher`, or "
                "start anew without `resume`."
            )
        raise ValueError(
            f"The run to resume had `{name}` {_word(old[name])}, now it is {_word(now)}; resume with the same "
            "settings, or start anew without `resume`."
        )


def _word(value: Any) -> str:
    return "not given" if value is None else str(value)


def _as_saved(value: Any) -> Any:
    """Returns a tuple as the list that it becomes in a file."""
    return list(value) if isinstance(value, tuple) else value
