"""Keys and values from a coarser map: attention reads averages over windows of k × k of what it read before.

Queries remain, so every position still gets an answer of its own. No weights are removed or needed; the keys, and with
them attention's two products, become fewer by k². Published without training as "reduced key-value tokens" for
SegFormer, arXiv 2407.17261. Averages are taken behind the stage's own reduction and its LayerNorm: before it they lost
as little on a trained network, but would leave small inputs no key in the first stage (docs/log.md).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from segprune.model import Attention, SegFormer
from segprune.pruning.patterns import matching_names
from segprune.spec import Spec, list_kv_reductions, with_kv_reductions
from segprune.stats import count

LEAST_SAVING = 0.05  # of the network's MACs, for a stage to be worth it


def choose_factors(
    spec: Spec, wanted: Mapping[str, int], input_shape: tuple[int, int]
) -> dict[str, int]:
    """Returns the factor of each attention by name, from factors by pattern; of several patterns the last one holds.

    The pattern "" stands for all stages where it saves at least `LEAST_SAVING` of the MACs at `input_shape` (H, W); 1,
    which undoes it, for all. Raises ValueError for a pattern that matches nothing, and where no stage is worth it.
    """
    factors = list_kv_reductions(spec)
    names = list(factors)
    for pattern, factor in wanted.items():
        patterns = [pattern] if pattern else _worthwhile(spec, factor, input_shape)
        matched = matching_names(patterns, names, "kv_reduction")
        factors |= dict.fromkeys(matched, factor)
    return factors


def _worthwhile(spec: Spec, factor: int, input_shape: tuple[int, int]) -> set[str]:
    """Returns the attention of all stages in which the factor saves enough."""
    own = list_kv_reductions(spec)
    if factor == 1:
        return set(own)

    worthwhile: set[str] = set()
    before = count(with_kv_reductions(spec, dict.fromkeys(own, 1)), input_shape).macs
    for i in range(len(spec.stages)):
        here = {name for name in own if name.startswith(f"encoder.stages.{i}.")}
        coarser = dict.fromkeys(own, 1) | dict.fromkeys(here, factor)
        saved = before - count(with_kv_reductions(spec, coarser), input_shape).macs
        if saved >= LEAST_SAVING * before:
            worthwhile |= here

    if not worthwhile:
        raise ValueError(
            f"`kv_reduction` {factor} saves less than {LEAST_SAVING:.0%} of the MACs in every stage at "
            f"{input_shape[0]}×{input_shape[1]}; give a larger `input_shape`, or name stages, as stages.0={factor}."
        )
    return worthwhile


def with_factors(model: SegFormer, factors: Mapping[str, int]) -> SegFormer:
    """Returns a copy with these factors, by the attention's name; the weights are the same."""
    result = copy.deepcopy(model)
    for name, factor in factors.items():
        attention = result.get_submodule(name)
        assert isinstance(attention, Attention)
        attention.kv_reduction = factor
    result.spec = with_kv_reductions(result.spec, factors)
    return result
