"""Tensors as other tools leave them, made plain: masks of torch.nn.utils.prune multiplied in, sparse ones filled up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segprune.checkpoint.ours import check_storages

MOST_NUMBERS = 1 << 28  # that sparse tensors may be filled up to; a b5 has 85 million
_WHOLE, _MASK = "_orig", "_mask"


def make_plain(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the state dict with one dense tensor for each weight, and notes on what was done for it.

    Raises ValueError for a mask that does not fit, and where dense tensors would take far more memory than any network.
    """
    state, notes = dict(state_dict), []

    sparse = [
        name
        for name, value in state.items()
        if isinstance(value, Tensor) and not value.is_meta and value.layout != torch.strided
    ]
    if sum(state[name].numel() for name in sparse) > MOST_NUMBERS:
        raise ValueError(
            f"{sparse[0]} is a sparse tensor that is too large to be filled up; give a SegFormer's checkpoint."
        )
    for name in sparse:
        state[name] = state[name].to_dense()
    if sparse:
        notes.append(f"{len(sparse)} sparse tensors were made dense.")

    # torch.nn.utils.prune keeps the whole tensor and what is left of it as ones.
    masked = [
        name.removesuffix(_WHOLE)
        for name in state
        if name.endswith(_WHOLE) and name.removesuffix(_WHOLE) + _MASK in state
    ]
    for name in masked:
        pair = {name + end: state.pop(name + end) for end in (_WHOLE, _MASK)}
        check_storages(pair)
        whole, mask = pair.values()
        if whole.shape != mask.shape:
            raise ValueError(
                f"{name}{_MASK} has another shape than {name}{_WHOLE}; save the network again after "
                "torch.nn.utils.prune.remove."
            )
        state[name] = whole * mask
    if masked:
        notes.append(
            f"The masks of {len(masked)} tensors (torch.nn.utils.prune) were multiplied in."
        )
    return state, tuple(notes)
