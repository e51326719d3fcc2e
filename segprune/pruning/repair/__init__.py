"""Repair: the layers that read removed channels, solved anew from a few unlabelled images, without any training.

Layer by layer in order of execution, each layer reads what the repaired network so far puts out and is solved, by
regularised least squares in closed form, for what the dense network puts out at that place ("Channel Pruning for
Accelerating Very Deep Neural Networks", arXiv 1707.06168). Where only the number of channels matters, what is kept is
chosen anew: queries with keys, values with the output product, and normalised streams (stage widths, reductions) keep
their leading directions and not the planned channels (attention.py, basis.py).

Memory: the activations of one stage's residual stream in both networks, a few times over, and the stages' maps;
everything else is streamed. The same inputs give the same weights, to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from segprune.model import SegFormer
from segprune.pruning.groups import Group
from segprune.pruning.images import checked_images
from segprune.pruning.plan import Plan
from segprune.pruning.repair.basis import Reads
from segprune.pruning.repair.head import repair_head
from segprune.pruning.repair.layers import Pairs, Removed
from segprune.pruning.repair.stages import repair_stage
from segprune.pruning.surgery import cut_channels, read_spec, removed_positions
from segprune.pruning.trace import eval_mode
from segprune.shapes_only import without_weights
from segprune.spec import list_kv_reductions, stage_name, with_kv_reductions
from segprune.timing import tf32_products

# Share of the mean variance of what a layer reads; 1e-4 to 1e-2 make little difference.
DAMPING = 3e-3


@torch.no_grad()
def repair(
    pruned: SegFormer,
    dense: SegFormer,
    groups: Iterable[Group],
    plan: Plan,
    batches: Iterable[Tensor],
    *,
    damping: float = DAMPING,
    progress: Callable[[int, int], None] | None = None,
) -> SegFormer:
    """Returns a network with the widths of `pruned` and logits nearer those of `dense`; both are left as they were.

    `dense` is what was cut with `groups` and `plan` to become `pruned`: for a folded head the folded network. Only the
    map that keys and values come from may be coarser in `pruned`.
    `batches` are normalised images B 3 H W, without labels; they are kept in memory. Solved in float64. `progress`
    is called with the steps done (blocks, and the head) and their number. Every layer but depth-wise convolutions is
    solved anew, whether or not it was cut itself. Raises ValueError for no image, images of another shape, values that
    are not finite, networks that do not belong together, and damping that is not above 0.
    """
    groups = list(groups)
    if not damping > 0.0:
        raise ValueError(f"The repair's damping is {damping:g}; it must be above 0.")
    _check_networks(pruned, dense, groups, plan)

    # Activations in half precision would be too coarse to solve from.
    dtype = dense.decode_head.classifier.weight.dtype
    result, reference = copy.deepcopy(pruned), dense
    if dtype not in (torch.float32, torch.float64):
        result, reference = result.float(), copy.deepcopy(dense).float()
    result.spec = read_spec(pruned)

    images = checked_images(reference, batches)
    if not images:
        raise ValueError(
            "Repair needs images, and there are none; give a few dozen, labels are not needed."
        )

    # TF32 has as few digits as half precision.
    with eval_mode(reference), eval_mode(result), tf32_products(False):
        _repair(result, reference, removed_positions(groups, plan), images, damping, progress)
    return result.to(dtype)


def _repair(
    result: SegFormer,
    reference: SegFormer,
    removed: Removed,
    images: list[Tensor],
    damping: float,
    progress: Callable[[int, int], None] | None,
) -> None:
    # One step for each block, and one for the head.
    total = sum(len(stage.blocks) for stage in reference.spec.stages) + 1
    steps = count(1)

    def step() -> None:
        if progress is not None:
            progress(next(steps), total)

    # Each stage reads the maps of the one before it, which may lie in other coordinates in the pruned network.
    maps, into = Pairs(images, images, []), Reads()
    all_maps, all_reads = [], []
    for i, (dense, pruned) in enumerate(
        zip(reference.list_stages(), result.list_stages(), strict=True)
    ):
        maps, into = repair_stage(
            stage_name(i), dense, pruned, into, removed, maps, damping, step
        )
        all_maps.append(maps)
        all_reads.append(into)

    # The head reads the maps of all stages, each in its own coordinates.
    repair_head(
        reference.decode_head, result.decode_head, all_reads, removed, all_maps, damping
    )
    step()


def _check_networks(
    pruned: SegFormer, dense: SegFormer, groups: list[Group], plan: Plan
) -> None:
    # Cuts a network without weights by the plan, and compares its widths with the pruned one's.
    with without_weights():
        factors = list_kv_reductions(pruned.spec)
        expected = SegFormer(with_kv_reductions(dense.spec, factors))

    if {group.name for group in groups} == plan.keep.keys():
        # Groups of another network name layers, or channels, that this one does not have.
        with suppress(AttributeError, IndexError):
            cut_channels(expected, groups, plan)
            if read_spec(expected) == replace(read_spec(pruned), numerics=dense.spec.numerics):
                return

    raise ValueError(
        "The pruned network is not what the plan makes of the dense one; give the network that was cut (folded, if the "
        "pruned one is) with its own groups and plan."
    )
