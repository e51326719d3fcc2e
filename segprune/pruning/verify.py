"""A traced network held to what its plan says: parameters counted again, and every layer compared.

A cut has to equal zeros: in the network as it was, with the removed channels set to zero where they are written and
read, every layer puts out what the cut one does. A LayerNorm takes its statistics over the channels that are kept.
Where a tracer misreads a network (channels that are flipped, rolled, sliced, picked by their index), the two differ.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segprune.pruning.budget.costs import Costs
from segprune.pruning.groups import Group
from segprune.pruning.options import PruneOptions
from segprune.pruning.plan import Plan, keep_best, widths_of
from segprune.pruning.prepare import Prepared, check_some, summarise
from segprune.pruning.surgery import cut_channels, removed_positions
from segprune.pruning.trace import (
    CONVS,
    NORMS,
    TRANSPOSED_CONVS,
    eval_mode,
    is_depthwise,
    run,
    tensors_in,
)
from segprune.timing import tf32_products

COUNT_TOLERANCE = 1e-3  # of parameters, as a share of all
TOLERANCE = 1e-3  # of what a layer puts out, as a share of its largest channel
HALF_TOLERANCE = 0.1  # the same where numbers have 11 bits or fewer

Seen = list[tuple[str, Tensor]]  # layers as they run, each with two numbers per channel: 2 C


def leave_misread(prepared: Prepared, options: PruneOptions) -> Prepared:
    """Returns it without the groups that tracing misreads, after a warning that names them.

    Half of every group is cut on trial; only if that fails is each group tried by itself.
    """
    groups = prepared.groups
    if prepared.stock or _find_fault(prepared, _halve(groups, options)) is None:
        return prepared

    misread = [
        group
        for group in groups
        if _find_fault(prepared, _halve(groups, options, only=group)) is not None
    ]
    names = {
        group.members[0].layer: type(
            prepared.model.get_submodule(group.members[0].layer)
        ).__name__
        for group in misread
    }
    if names:
        # Four frames up is the line that calls Pruner.prune.
        warnings.warn(
            "Left as it is, since tracing does not see where its channels are read: "
            f"{summarise(names)}.",
            stacklevel=4,
        )
    kept = tuple(group for group in groups if group not in misread)
    return replace(prepared, groups=check_some(kept, prepared.model))


def check_cut(prepared: Prepared, plan: Plan, pruned: nn.Module) -> None:
    """Raises ValueError, with a layer's name, where a traced network was not cut as planned."""
    if prepared.stock:
        return
    fault = _find_fault(prepared, plan, pruned)
    if fault is not None:
        raise ValueError(
            f"{type(pruned).__name__} {fault}; something in it depends on its channels in a way that tracing does "
            "not see: name the layers that write them in `ignored_layers`."
        )


def _halve(groups: Sequence[Group], options: PruneOptions, only: Group | None = None) -> Plan:
    """Returns a plan that removes half of every group, or of one alone: random channels, which no order can hide."""
    rng = np.random.default_rng(0)
    scores = {group.name: rng.random(group.num_channels) for group in groups}

    # Multiples of `round_to` where there are any, as the real plan will have.
    widths = []
    for group in groups:
        step = options.round_to if group.slots >= 2 * options.round_to else 1
        half = max(1, group.slots // 2 // step * step)
        widths.append(half if only is None or group is only else group.slots)
    return keep_best(groups, scores, np.array(widths, dtype=np.int64))


def _find_fault(prepared: Prepared, plan: Plan, pruned: nn.Module | None = None) -> str | None:
    """Returns what is wrong with the cut network (by default one cut here), or None."""
    try:
        # A network of the user's own may raise anything once it is narrower.
        if pruned is None:
            pruned = copy.deepcopy(prepared.model)
            cut_channels(pruned, prepared.groups, plan)
        inputs = _fill_zeros(prepared.example_inputs)
        kept_all, narrow = _watch(pruned, inputs)
    except Exception as error:
        return f"no longer runs once its channels are cut ({type(error).__name__}: {error})"

    # What the plan promised is a formula of its layers, which may have been misread too.
    costs = Costs(prepared.rows, prepared.groups, "params", prepared.rest)
    expected = costs.total(widths_of(plan, prepared.groups))
    parameters = sum(parameter.numel() for parameter in pruned.parameters())
    if abs(parameters - expected) > COUNT_TOLERANCE * costs.total(costs.full):
        return f"has {parameters:,} parameters once its channels are cut, and {expected:,.0f} were planned"

    zeroed = _set_zero(prepared.model, prepared.groups, plan)
    removed = removed_positions(prepared.groups, plan)
    outputs, wide = _watch(
        zeroed,
        inputs,
        {layer: gone for (layer, side), gone in removed.items() if side == "out"},
    )
    for (name, cut_values), (_, values) in zip(narrow, wide, strict=False):
        if not _are_close(cut_values, values):
            return f"computes something else in {name} once its channels are cut"
    if len(narrow) != len(wide) or not all(map(_are_close, kept_all, outputs)):
        return "puts out something else once its channels are cut"
    return None


def _set_zero(model: nn.Module, groups: Sequence[Group], plan: Plan) -> nn.Module:
    """Returns a copy whose removed channels are zero where they are written, and are read with weights of zero."""
    zeroed = copy.deepcopy(model)
    for (name, side), removed in removed_positions(groups, plan).items():
        layer = zeroed.get_submodule(name)
        if isinstance(layer, nn.LayerNorm):
            _normalise_kept(layer, removed)
            continue

        # Outputs come first in a weight, but in a transposed convolution inputs do.
        one_sided = isinstance(layer, NORMS) or is_depthwise(layer)
        last = not one_sided and (side == "in") != isinstance(layer, TRANSPOSED_CONVS)
        index = torch.tensor(sorted(removed))
        for leaf, parameter in layer.named_parameters(recurse=False):
            if leaf == "weight":
                parameter.data.index_fill_(int(last), index.to(parameter.device), 0.0)
            elif side == "out":
                parameter.data.index_fill_(0, index.to(parameter.device), 0.0)
    return zeroed


def _normalise_kept(norm: nn.LayerNorm, removed: set[int]) -> None:
    """From now on the LayerNorm sees only the channels that are kept, and puts out zeros for the others."""
    width = norm.normalized_shape[0]
    keep = torch.tensor(sorted(set(range(width)) - removed))
    weight, bias = (None if p is None else p.detach()[keep] for p in (norm.weight, norm.bias))

    def replace_output(_: nn.Module, inputs: Any, named: Any, output: Tensor) -> Tensor:
        (x,) = tensors_in((*inputs, *named.values()))
        dim = _channel_dim(norm, output)
        narrow = x.movedim(dim, -1)[..., keep]
        normal = nn.functional.layer_norm(narrow, (len(keep),), weight, bias, norm.eps)

        whole = torch.zeros_like(output.movedim(dim, -1))
        whole[..., keep] = normal.to(whole)
        return whole.movedim(-1, dim)

    norm.register_forward_hook(replace_output, with_kwargs=True)


def _channel_dim(layer: nn.Module, output: Tensor) -> int:
    """Returns the dimension of a layer's output that its channels are numbered in."""
    if isinstance(layer, nn.LayerNorm):
        # Subclasses for maps B C H W are common, and turn them for the norm.
        of_maps = type(layer) is not nn.LayerNorm and output.dim() == 4
        return 1 if of_maps and output.shape[1] == layer.normalized_shape[0] else -1
    if isinstance(layer, CONVS + TRANSPOSED_CONVS):
        return 1 - layer.weight.dim()  # a sample without a batch has one dimension less
    return -1 if isinstance(layer, nn.Linear) else 1


def _watch(
    model: nn.Module, inputs: Any, left_out: dict[str, set[int]] | None = None
) -> tuple[list[Tensor], Seen]:
    """Runs the network and returns its outputs, and of every layer that runs the mean and size of each channel.

    `left_out` has by layer the channels that are not looked at.
    """
    seen: Seen = []
    hooks = []

    def watch(name: str) -> Any:
        def record(layer: nn.Module, _: Any, output: Tensor) -> None:
            channels = output.detach().movedim(_channel_dim(layer, output), -1).float()
            removed = (left_out or {}).get(name, set())
            keep = sorted(set(range(channels.shape[-1])) - removed)
            values = channels.flatten(0, -2)[:, keep]  # positions × C
            statistics = torch.stack([values.mean(0), values.square().mean(0).sqrt()])
            seen.append((name, statistics.to(output.dtype)))

        return record

    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, *CONVS, *TRANSPOSED_CONVS, *NORMS)):
            hooks.append(layer.register_forward_hook(watch(name)))
    try:
        # What is drawn while it runs is drawn alike in both networks.
        with torch.random.fork_rng(devices=[]), eval_mode(model), torch.no_grad():
            torch.default_generator.manual_seed(0)
            with tf32_products(False):
                outputs = tensors_in(run(model, inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return [output for output in outputs if output.is_floating_point()], seen


def _are_close(first: Tensor, second: Tensor) -> bool:
    """Returns whether two outputs or their statistics agree to what their numbers can hold."""
    if first.shape != second.shape:
        return False
    share = HALF_TOLERANCE if torch.finfo(second.dtype).bits < 32 else TOLERANCE
    largest = second.float().abs().nan_to_num().max() if second.numel() else 0.0
    return torch.allclose(
        first.float(), second.float(), rtol=0.0, atol=float(share * largest), equal_nan=True
    )


def _fill_zeros(inputs: Any) -> Any:
    """Returns the inputs with noise for every tensor of zeros, which would hide what a network does with its channels."""
    if isinstance(inputs, dict):
        return {name: _fill_zeros(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return [_fill_zeros(value) for value in inputs]
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and not inputs.any():
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
        return noise.to(inputs)
    return inputs
