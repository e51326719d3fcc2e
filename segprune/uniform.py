"""What the published classes can hold: stages of one width throughout; and a network in another tool's numerics.

Hugging Face's SegformerConfig and NVlabs' MixVisionTransformer know one width, number of heads and whole FFN ratio
per stage and one width in the decode head; mmsegmentation's also one width of a head and one FFN ratio for all stages.
Most numerics are no obstacle, since weights can make up for them exactly: a LayerNorm sees the same if its input is
scaled by the root of the ratio of the two eps, an attention scale moves into the queries, and a BatchNorm's eps, in
evaluation, into its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from segprune.spec import BlockSpec, Head, Numerics, Spec, StageSpec


def uniform_problem(spec: Spec, head: Head = "mlp") -> str | None:
    """What keeps the published classes from holding such a network, as half a sentence; None if nothing does.

    A folded decode head does not: it can be unfolded (fold.py). `head` is the kind of decode head that they have.
    """
    if spec.head != head:
        has, lacks = "a BatchNorm and a ReLU in each branch", "no BatchNorm and ReLU in its branches"
        return f"its decode head has {has if spec.head == 'conv' else lacks}"
    for s, stage in enumerate(spec.stages, 1):
        for b, block in enumerate(stage.blocks):
            problem = _block_problem(stage, block)
            if problem is not None:
                return f"block {b} of stage {s} has {problem}"
    if spec.branch_dims is not None and set(spec.branch_dims) != {spec.decoder_dim}:
        dims = " ".join(map(str, spec.branch_dims))
        return f"the decode head's branches have widths {dims} where it has {spec.decoder_dim}"
    return None


def mmseg_problem(spec: Spec) -> str | None:
    """The same for mmsegmentation's classes, whose arguments embed_dims (of a head) and mlp_ratio are all stages'."""
    problem = uniform_problem(spec, "conv")
    if problem is not None:
        return problem
    firsts = [(stage.width, stage.blocks[0]) for stage in spec.stages]
    for name, found in (
        ("its stages have heads of width", [width // block.num_heads for width, block in firsts]),
        ("its stages have FFNs of ratio", [block.ffn_dim // width for width, block in firsts]),
    ):
        if len(set(found)) > 1:
            return f"{name} {' '.join(map(str, found))} where theirs have one for all"
    return None


def _block_problem(stage: StageSpec, block: BlockSpec) -> str | None:
    width, first = stage.width, stage.blocks[0]
    if not (block.has_attention and block.has_ffn):
        return "no attention or no FFN"
    if block.num_heads != first.num_heads:
        return f"{block.num_heads} heads where block 0 has {first.num_heads}"
    if width % block.num_heads:
        return f"{block.num_heads} heads, which do not divide the stage's width {width}"
    expected = width // block.num_heads
    for name, found in (("queries and keys", block.qk_dim), ("values", block.v_dim)):
        if found != expected:
            return f"{name} of width {found} per head where the stage's width {width} asks for {expected}"
    if block.reduction_dim != (width if stage.reduction_ratio > 1 else None):
        return f"a reduction of width {block.reduction_dim} where the stage has {width}"
    if block.ffn_dim % width:
        return f"an FFN of width {block.ffn_dim}, which is no multiple of the stage's width {width}"
    if block.ffn_dim != first.ffn_dim:
        return f"an FFN of width {block.ffn_dim} where block 0 has {first.ffn_dim}"
    return None


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
        prefix = f"encoder.stages.{i}"
        factors |= {f"{prefix}.patch_embed.proj": embed, f"{prefix}.patch_embed.norm": stream}
        for j, block in enumerate(stage.blocks):
            inside = f"{prefix}.blocks.{j}"
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
