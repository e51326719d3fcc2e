"""One forward pass of any network, watched: what its layers cost and which attention we do not know.

A stock SegFormer needs none of this, its spec says it all. A user's own network is run once on the example
inputs; every linear layer, convolution and normalisation is recorded with its number of output positions, and
every product of two activations (that is what attention is made of) with the module that took it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segprune.model import Attention
from segprune.stats import Layer

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)


@dataclass
class Trace:
    """`layers` in order of execution; `unknown_attention` maps module names to class names."""

    layers: list[Layer] = field(default_factory=list)
    unknown_attention: dict[str, str] = field(default_factory=dict)


def is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, CONVS)
        and module.groups == module.out_channels == module.in_channels > 1
    )


def width_of(module: nn.Module, side: str) -> int:
    """Returns the channels on one side ("in", "out") of a linear layer, a convolution or a normalisation."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0]
    if isinstance(module, NORMS):
        name = "num_features"
    else:
        name = f"{side}_features" if isinstance(module, nn.Linear) else f"{side}_channels"
    return int(getattr(module, name))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode for a while; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run(model: nn.Module, example_inputs: Any) -> Any:
    """Calls the network the way `example_inputs` is shaped: a dict by name, a tuple or list one by one."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


def tensors_in(output: Any) -> list[Tensor]:
    """Returns all tensors in nested dicts, lists and tuples, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())

    tensors: list[Tensor] = []
    if isinstance(output, tuple | list):
        for item in output:
            tensors += tensors_in(item)
    return tensors


def trace(model: nn.Module, example_inputs: Any) -> Trace:
    """Runs `model` once without gradients, in evaluation mode, and records it. Costs are for one sample."""
    result = Trace()

    # Hooks know which module is running, and what each layer takes and puts out.
    stack: list[tuple[str, nn.Module]] = []
    hooks = []
    for name, module in model.named_modules():
        # A scripted module takes no hooks; what lies around it is held to the original later.
        if isinstance(module, torch.jit.ScriptModule):
            continue
        hooks.append(module.register_forward_pre_hook(_pusher(stack, name)))
        hooks.append(
            module.register_forward_hook(_popper(stack, name, result), with_kwargs=True)
        )

    try:
        with eval_mode(model), torch.no_grad(), _Products(stack, result):
            run(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return result


def _pusher(stack: list[tuple[str, nn.Module]], name: str) -> Callable[..., None]:
    def push(module: nn.Module, inputs: Any) -> None:
        stack.append((name, module))

    return push


def _popper(
    stack: list[tuple[str, nn.Module]], name: str, result: Trace
) -> Callable[..., None]:
    def pop(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        stack.pop()

        # Layers are recorded when they end, with their inputs by position and by name alike.
        layer = _layer(name, module, (*inputs, *named.values()), output)
        if layer is not None:
            result.layers.append(layer)

    return pop


def _layer(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Layer | None:
    # Output positions of one sample: all numbers, divided by the batch and by the width.
    if isinstance(module, nn.Linear):
        positions = output.numel() // output.shape[0] // module.out_features
        bias = module.bias is not None
        return Layer(
            name, "product", module.in_features, module.out_features, positions, 1, bias
        )
    if isinstance(module, CONVS + TRANSPOSED_CONVS):
        kernel, bias = math.prod(module.kernel_size), module.bias is not None

        # A transposed convolution has one product per input position.
        positions = math.prod(
            (inputs[0] if isinstance(module, TRANSPOSED_CONVS) else output).shape[2:]
        )
        if module.groups == 1:
            return Layer(
                name,
                "product",
                module.in_channels,
                module.out_channels,
                positions,
                kernel,
                bias,
            )

        # In a grouped convolution an output reads the inputs of its own group only.
        kernel *= module.in_channels // module.groups
        return Layer(
            name, "depthwise", module.out_channels, module.out_channels, positions, kernel, bias
        )

    # A normalisation has parameters, but its MACs are not counted: no positions.
    if isinstance(module, NORMS) and module.weight is not None and module.weight.dim() == 1:
        dim = module.weight.shape[0]
        return Layer(name, "norm", dim, dim, 0, bias=module.bias is not None)
    return None


class _Products(TorchFunctionMode):
    """Sees every product of two activations and charges it to the innermost running module."""

    def __init__(self, stack: list[tuple[str, nn.Module]], result: Trace) -> None:
        super().__init__()
        self.stack = stack
        self.result = result

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS:
            # A product with a parameter is a layer's work, and not attention.
            tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
            activations = [t for t in tensors if not isinstance(t, nn.Parameter)]
            if len(activations) >= 2 and self.stack:
                self._record(name, activations)
        return output

    def _record(self, name: str, activations: list[Tensor]) -> None:
        owner, module = self.stack[-1]
        if type(module) is not Attention:
            self.result.unknown_attention[owner] = type(module).__name__

        # Any product names its owner; only the fused call shows which operand is which.
        if name != "scaled_dot_product_attention":
            return

        # The widths of all heads together. Our own attention may have filled up the narrower of the two.
        q, k, v = activations[:3]
        heads = math.prod(q.shape[1:-2])
        widths = heads * q.shape[-1], heads * v.shape[-1]
        if type(module) is Attention:
            widths = module.q.out_features, module.v.out_features
        layer = Layer(owner, "attention", *widths, q.shape[-2], k.shape[-2])
        self.result.layers.append(layer)


_PRODUCTS = {
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "bmm",
    "baddbmm",
    "einsum",
}
