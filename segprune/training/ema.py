"""Exponential moving average of a network's weights and buffers, to be scored and saved in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """Averages of all tensors in the model's state dict; integers, such as counters, are the latest.

    After n updates the next one keeps min(`decay`, (1 + n) / (10 + n)) of the average, so that the first weights are
    soon forgotten. Holds one more copy of the network, where the network lies.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"The average's decay is {decay}; it must be from 0 to below 1.")
        self.decay = decay
        self.num_updates = 0
        self.averages = _copies(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the model's weights; called once after every step of the optimiser."""
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n))

        # Integers, such as counters, are copied.
        now = _tensors(model)
        floating = [
            name for name, average in self.averages.items() if average.is_floating_point()
        ]
        if floating:
            average_all = get_ema_multi_avg_fn(decay)
            average_all(
                [self.averages[name] for name in floating], [now[name] for name in floating], n
            )
        for name in self.averages.keys() - set(floating):
            self.averages[name].copy_(now[name])

        self.num_updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within it `model` has the averages; afterwards its own weights again, to the bit, whatever happened."""
        # The network's tensors are overwritten in place, so its own weights are copied.
        own = _copies(model)
        try:
            _write(self.averages, model)
            yield
        finally:
            _write(own, model)

    def state_dict(self) -> dict[str, Any]:
        """Returns copies, for torch.save; `weights_only=True` reads them back."""
        return {
            "num_updates": self.num_updates,
            "averages": {name: average.clone() for name, average in self.averages.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, exactly. ValueError if it is another network's."""
        theirs: dict[str, Tensor] = state["averages"]
        ours = self.averages
        # Compare the names first: shapes can be compared only where both have the tensor.
        wrong = sorted(ours.keys() ^ theirs.keys()) or [
            k for k in ours if ours[k].shape != theirs[k].shape
        ]
        if wrong:
            raise ValueError(
                f"The saved averages are another network's ({len(wrong)} tensors differ, {wrong[0]} first); "
                "resume with the network they were taken of."
            )
        # Copied in place, so that the averages stay on the device of the network.
        for name, average in ours.items():
            average.copy_(theirs[name])
        self.num_updates = int(state["num_updates"])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    }


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in _tensors(model).items()}


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    # In place: the optimiser, DDP and compiled graphs hold these very tensors.
    for name, tensor in _tensors(model).items():
        tensor.copy_(tensors[name])
