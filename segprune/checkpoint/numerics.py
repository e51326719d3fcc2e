"""A network in another tool's numerics, with the same logits.

Most numerics are no obstacle, since weights can make up for them exactly: a LayerNorm sees the same if its input is
scaled by the root of the ratio of the two eps, an attention scale moves into the queries, and a BatchNorm's eps, in
evaluation, into its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from segprune.spec import Numerics, Spec, StageSpec, block_name, stage_name


def with_numerics(state_dict: Mapping[str, Tensor], spec: Spec, numerics: Numerics) -> tuple[dict[str, Tensor], Spec]:
    """The weights that give the same logits with other eps and with attention scaled by its head's width.

    In our names, for a whole network whose blocks are whole. `numerics` replaces the spec's but for the rates of
    dropout. In evaluation the logits are the same to rounding, before the last upsampling; training has the same
    function to start from. ValueError for another GELU, which no weights make up for.
    """
    old = spec.numerics
    if numerics.gelu != old.gelu:
        words = {"none": "exact", "tanh": "tanh-approximated"}
        raise ValueError(
            f"The network has the {words[old.gelu]} GELU where theirs is the {words[numerics.gelu]} one, which no "
            "weights make up for; write --to hf, which has both."
        )
    factors: dict[str, Tensor | float] = {}
    stream = (numerics.norm_eps / old.norm_eps) ** 0.5  # what writes to a stage's residual stream
    embed = (numerics.embed_norm_eps / old.embed_norm_eps) ** 0.5  # what a patch embedding or reduction normalises
    for i, stage in enumerate(spec.stages):
        prefix = stage_name(i)
        factors |= {f"{prefix}.patch_embed.proj": embed, f"{prefix}.patch_embed.norm": stream}
        for j, block in enumerate(stage.blocks):
            inside = block_name(i, j)
            factors |= {f"{inside}.attn.proj": stream, f"{inside}.mlp.fc2": stream, f"{inside}.attn.sr": embed}
            factors[f"{inside}.attn.q"] = block.qk_scale * block.qk_dim**0.5
    state = dict(state_dict)
    for key in [key for key in state if key.endswith(".running_var")]:
        variance, weight = state[key].double(), f"{key.removesuffix('running_var')}weight"
        state[weight] = _scaled(state[weight], ((variance + numerics.bn_eps) / (variance + old.bn_eps)).sqrt())
    for name, factor in factors.items():
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in state and factor != 1.0:
                state[key] = _scaled(state[key], factor)
    numerics = replace(numerics, drop_path=old.drop_path, head_dropout=old.head_dropout)
    return state, replace(spec, stages=tuple(map(_standard_scales, spec.stages)), numerics=numerics)


def _scaled(tensor: Tensor, factor: Tensor | float) -> Tensor:
    return (tensor.detach().to(torch.float64) * factor).to(tensor.dtype)


def _standard_scales(stage: StageSpec) -> StageSpec:
    blocks = (replace(block, qk_scale=block.qk_dim**-0.5) for block in stage.blocks)
    return replace(stage, blocks=tuple(blocks))
