"""int8 that holds: layers ranked by what quantising each of them alone costs, the worst of them left in float32.

Ranking happens in PyTorch, whatever the format: weights symmetric per channel in 7 bits, a layer's input in 8 bits
between the smallest and largest value seen. What it says is only which layers come first: how many of them are left
in float32 is searched with the files themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segprune.data.transforms import normalise
from segprune.export.job import Job
from segprune.export.network import Deployed
from segprune.spec import preprocessing_of

NUM_RANKED = 8  # images: enough to tell layers apart
WEIGHT_LEVELS = 63  # on either side of zero
INPUT_LEVELS = 255


@dataclass(frozen=True)
class LayerCost:
    """What quantising one layer alone does to the logits: root mean square of the change over that of the logits."""

    name: str
    distance: float


def rank_layers(job: Job) -> list[LayerCost]:
    """Returns the cost of every convolution and product with weights, the highest first."""
    network = _network_of(job)
    own = preprocessing_of(job)
    images = [normalise(image, own)[None] for image in job.images[:NUM_RANKED]]
    layers = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            layers[name] = module

    with torch.no_grad():
        ranges = {name: _Range(layer) for name, layer in layers.items()}
        expected = [network.parts(image)[1] for image in images]
        for observed in ranges.values():
            observed.hook.remove()

        costs = []
        for name, layer in layers.items():
            weight = layer.weight.data
            layer.weight.data = _round_weight(weight)
            hook = layer.register_forward_pre_hook(ranges[name].round_input)
            outputs = [network.parts(image)[1] for image in images]
            hook.remove()
            layer.weight.data = weight

            change = sum(
                float((output - logits).square().sum())
                for output, logits in zip(outputs, expected, strict=True)
            )
            size = sum(float(logits.square().sum()) for logits in expected)
            costs.append(LayerCost(name, (change / size) ** 0.5))

    return sorted(costs, key=lambda cost: -cost.distance)


def find_fewest(number: int, holds: Callable[[int], bool]) -> int | None:
    """Returns the smallest count from 1 to `number` that holds, taking it that more never hold less; None: none."""
    low, high = 0, number
    if not holds(number):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def find_kept(job: Job, weights: dict[str, Any]) -> list[str]:
    """Returns which of the graph's nodes belong to the layers left in float32; `weights` are the nodes' arrays.

    A format names nodes as it likes, so a layer is found again by the numbers in its weight, transposed or not.
    """
    network = _network_of(job)
    kept = set()
    for name in job.manifest.float32:
        weight = network.get_submodule(name).weight.detach().numpy()
        kept |= {weight.tobytes(), weight.reshape(len(weight), -1).T.tobytes()}
    return [name for name, array in weights.items() if np.asarray(array).tobytes() in kept]


class _Range:
    """The smallest and largest input of a layer, recorded until the hook is removed, and inputs rounded to it."""

    def __init__(self, layer: nn.Module) -> None:
        self.low = self.high = 0.0  # zero is exact in every runtime
        self.hook = layer.register_forward_pre_hook(self._record)

    def _record(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        low, high = inputs[0].aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def round_input(self, _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        scale = max((self.high - self.low) / INPUT_LEVELS, torch.finfo(torch.float32).tiny)
        zero = round(-self.low / scale)
        return torch.fake_quantize_per_tensor_affine(inputs[0], scale, zero, 0, INPUT_LEVELS)


def _round_weight(weight: Tensor) -> Tensor:
    largest = weight.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    zeros = torch.zeros_like(largest, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(
        weight, largest / WEIGHT_LEVELS, zeros, 0, -WEIGHT_LEVELS, WEIGHT_LEVELS
    )


def _network_of(job: Job) -> Any:
    assert isinstance(job.network, Deployed)
    return job.network.network
