"""A network in another tool's numerics, with the same logits.

Most numerics are no obstacle, since weights can make up for them exactly: a LayerNorm sees the same if its input is
scaled by the root of the ratio of the two eps, an attention scale moves into the queries, and a BatchNorm's eps, in
evaluation, into its weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from segprune.model import SegFormer
from segprune.spec import RGB, Numerics, Spec, StageSpec, block_name, stage_name


def with_numerics(
    state_dict: Mapping[str, Tensor], spec: Spec, numerics: Numerics
) -> tuple[dict[str, Tensor], Spec]:
    """Returns weights and spec that give the same logits with other eps and with attention scaled by its head's width.

    In our names, for a whole network whose blocks are whole. `numerics` replaces the spec's but for the rates of
    dropout. In evaluation the logits are the same to rounding, before the last upsampling; training has the same
    function to start from. Raises ValueError for another GELU, which no weights make up for.
    """
    old = spec.numerics
    if numerics.gelu != old.gelu:
        words = {"none": "exact", "tanh": "tanh-approximated"}
        raise ValueError(
            f"The network has the {words[old.gelu]} GELU where theirs is the {words[numerics.gelu]} one, which no "
            "weights make up for; write hf instead, which has both."
        )

    state = dict(state_dict)
    for name, factor in _layer_factors(spec, numerics).items():
        for key in (f"{name}.weight", f"{name}.bias"):
            # A stage without reduction has no such layer.
            if key in state and factor != 1.0:
                state[key] = _multiply(state[key], factor)

    # A BatchNorm divides by √(variance + eps), so its weight takes the ratio of the two roots.
    for key in [key for key in state if key.endswith(".running_var")]:
        variance, weight = state[key].double(), f"{key.removesuffix('running_var')}weight"
        ratio = (variance + numerics.bn_eps) / (variance + old.bn_eps)
        state[weight] = _multiply(state[weight], ratio.sqrt())

    # Dropout only acts in training, so the network keeps its own rates.
    numerics = replace(numerics, drop_path=old.drop_path, head_dropout=old.head_dropout)
    return state, replace(
        spec, stages=tuple(map(_with_standard_scales, spec.stages)), numerics=numerics
    )


def _layer_factors(spec: Spec, numerics: Numerics) -> dict[str, float]:
    """Returns what each layer's weight and bias are multiplied with, so that every LayerNorm sees the same.

    A LayerNorm of √r times the input with r times the eps is the same; so all that writes to a stream takes √r.
    """
    old = spec.numerics
    stream = (numerics.norm_eps / old.norm_eps) ** 0.5  # the residual stream of a stage
    embed = (
        numerics.embed_norm_eps / old.embed_norm_eps
    ) ** 0.5  # what a patch embedding or a reduction normalises

    factors = {}
    for i, stage in enumerate(spec.stages):
        factors[f"{stage_name(i)}.patch_embed.proj"] = embed

        # What this norm puts out is the start of the residual stream.
        factors[f"{stage_name(i)}.patch_embed.norm"] = stream
        for j, block in enumerate(stage.blocks):
            name = block_name(i, j)

            # Both branches add to the stream, so both are scaled like it.
            factors[f"{name}.attn.proj"] = stream
            factors[f"{name}.mlp.fc2"] = stream
            factors[f"{name}.attn.sr"] = embed
            factors[f"{name}.attn.q"] = (
                block.qk_scale * block.qk_dim**0.5
            )  # theirs divide by the root of the width
    return factors


def with_rgb(model: SegFormer) -> SegFormer:
    """Returns a network with the same answers that takes RGB; it is the network itself if that does so already."""
    own = model.spec.preprocessing
    if own.channels == "rgb":
        return model

    # The first convolution's input channels change places, and the numbers of each with it.
    model = copy.deepcopy(model)
    weight = model.list_stages()[0].patch_embed.proj.weight
    order = [2, 1, 0, *range(RGB, model.spec.in_channels)]
    weight.data = weight.data[:, order]
    turned = replace(
        own,
        mean=tuple(own.mean[i] for i in order),
        std=tuple(own.std[i] for i in order),
        channels="rgb",
    )
    model.spec = replace(model.spec, preprocessing=turned)
    return model


def _multiply(tensor: Tensor, factor: Tensor | float) -> Tensor:
    # In double, so that it is rounded once.
    return (tensor.detach().to(torch.float64) * factor).to(tensor.dtype)


def _with_standard_scales(stage: StageSpec) -> StageSpec:
    blocks = (replace(block, qk_scale=block.qk_dim**-0.5) for block in stage.blocks)
    return replace(stage, blocks=tuple(blocks))
