"""Where a run stands: what is handed to callbacks, saved, and gone on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from torch import Tensor, nn

from segprune.data import Sample
from segprune.inference.metrics import Score


@dataclass(frozen=True)
class Splits:
    """The pictures that a run learns from and is scored on."""

    train: Sequence[Sample]
    val: Sequence[Sample]

    def fingerprint(self) -> str:
        """Another for other pictures or another order; a run is resumed only with the same."""
        names = "\n".join(sample.name for sample in [*self.train, *self.val])
        return sha256(f"{len(self.train)}\n{names}".encode()).hexdigest()[:16]


def fingerprint_of(teacher: nn.Module) -> str:
    """Another for other weights of the encoder, which, unlike the decode head's, are the same bits on every machine.

    A run is resumed only with the same teacher, wherever its file lies now.
    """
    digest = sha256()
    for name, tensor in teacher.state_dict().items():
        if name.startswith("encoder."):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


@dataclass
class TrainState:
    """All that a run needs to go on, in copies: `epoch` is the running one, `step` the batches done in it.

    Random numbers and the order of the pictures follow from seed, epoch and step, so these are their state.
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
        super().__init__(f"Training was interrupted in epoch {state.epoch + 1} after {state.step} batches.")
        self.state = state


class TrainingDiverged(ValueError):
    """The loss or a weight is no longer finite."""


def check_same_run(old: dict[str, Any], new: dict[str, Any]) -> None:
    """A run goes on only with the settings that decide its course."""
    old = _BEFORE_IT_WAS_SAID | old
    for name, value in new.items():
        before = old.get(name)
        if name in _MAY_CHANGE or _plain(before) == _plain(value):
            continue
        if name == "pictures":
            raise ValueError(
                "The run to resume had other pictures (names, number or order of the train and val lists); "
                "give it the same data, or start anew without --resume."
            )
        if name == "teacher" and name not in old:
            continue  # states of earlier versions do not say
        if name == "teacher":
            raise ValueError(
                "The run to resume had another teacher (its weights differ); give the same network as --teacher, or "
                "start anew without --resume."
            )
        words, before, value = _first_difference(name, before, value)
        raise ValueError(
            f"The run to resume had {words} {before}, now it is {value}; resume with the same settings, or start anew "
            "without --resume."
        )


_BEFORE_IT_WAS_SAID = {"tf32": False}  # what runs did whose states do not say
_MAY_CHANGE = {"num_workers", "eval_every", "save_steps"}


def _first_difference(words: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """What differs, in words, and both values; inside of groups of settings the first one that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        name = next(name for name in now if _plain(before.get(name)) != _plain(now[name]))
        return _first_difference(f"{words} {name}", before.get(name), now[name])
    return words, before, now


def _plain(value: Any) -> Any:
    """Tuples as the lists that they become in a file, however deep."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value
