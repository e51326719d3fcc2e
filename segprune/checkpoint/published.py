"""What the published classes can hold: stages of one width throughout.

Hugging Face's SegformerConfig and NVlabs' MixVisionTransformer know one width, number of heads and whole FFN ratio
per stage and one width in the decode head; mmsegmentation's also one width of a head and one FFN ratio for all stages.
"""

from __future__ import annotations

from collections.abc import Callable

from segprune.spec import (
    HEAD_FORMS,
    BlockSpec,
    Head,
    Spec,
    StageSpec,
    list_kv_reductions,
    with_kv_reductions,
)


def uniform_problem(spec: Spec, head: Head = "mlp") -> str | None:
    """Returns what keeps the published classes from holding such a network, as half a sentence; None if nothing does.

    A folded decode head does not: it can be unfolded (fold.py). `head` is the kind of decode head that they have.
    """
    if spec.head != head:
        return f"its decode head has {HEAD_FORMS[spec.head].branches}, not {HEAD_FORMS[head].branches}"

    for s, stage in enumerate(spec.stages, 1):
        for b, block in enumerate(stage.blocks):
            problem = _block_problem(stage, block)
            if problem is not None:
                return f"block {b} of stage {s} has {problem}"

    # Theirs have one width for the branches and for what joins them.
    if spec.branch_dims is not None and set(spec.branch_dims) != {spec.decoder_dim}:
        dims = " ".join(map(str, spec.branch_dims))
        return f"the decode head's branches have widths {dims} where it has {spec.decoder_dim}"
    return None


def mmseg_problem(spec: Spec) -> str | None:
    """Returns the same for mmsegmentation's classes, whose head width and FFN ratio hold for all stages."""
    problem = uniform_problem(spec, "conv")
    if problem is not None:
        return problem

    # Their stage's width is the width of one head times the number of heads.
    head_dims = [stage.width // stage.blocks[0].num_heads for stage in spec.stages]
    if len(set(head_dims)) > 1:
        return f"its stages have heads of width {' '.join(map(str, head_dims))} where theirs have one for all"
    ratios = [stage.blocks[0].ffn_dim // stage.width for stage in spec.stages]
    if len(set(ratios)) > 1:
        return f"its stages have FFNs of ratio {' '.join(map(str, ratios))} where theirs have one for all"
    return None


def fitting_options(spec: Spec, problem_of: Callable[[Spec], str | None]) -> str | None:
    """Returns the options of pruning that make a network fit such classes, in words; None where none do.

    `problem_of` is one of the functions above.
    """
    plain = with_kv_reductions(spec, dict.fromkeys(list_kv_reductions(spec), 1))
    fits = problem_of(plain) is None
    if not fits and not spec.head_form.linear:
        return None
    options = [] if fits else ["`uniform`"]
    if plain != spec:
        options.append("`kv_reduction` 1")
    return " and ".join(options)


def _block_problem(stage: StageSpec, block: BlockSpec) -> str | None:
    """Returns what keeps one block from being as its stage asks."""
    width, first = stage.width, stage.blocks[0]

    if not (block.has_attention and block.has_ffn):
        return "no attention or no FFN"
    if block.num_heads != first.num_heads:
        return f"{block.num_heads} heads where block 0 has {first.num_heads}"
    if width % block.num_heads:
        return f"{block.num_heads} heads, which do not divide the stage's width {width}"

    # All attention is as wide as the stage.
    expected = width // block.num_heads
    for name, dim in (("queries and keys", block.qk_dim), ("values", block.v_dim)):
        if dim != expected:
            return f"{name} of width {dim} per head where the stage's width {width} asks for {expected}"
    if block.reduction_dim != (width if stage.reduction_ratio > 1 else None):
        return f"a reduction of width {block.reduction_dim} where the stage has {width}"
    if block.kv_reduction > 1:
        return f"keys and values of a map that is averaged over windows (kv_reduction {block.kv_reduction})"

    # FFNs are a whole multiple of the stage's width, the same in all its blocks.
    if block.ffn_dim % width:
        return f"an FFN of width {block.ffn_dim}, which is no multiple of the stage's width {width}"
    if block.ffn_dim != first.ffn_dim:
        return f"an FFN of width {block.ffn_dim} where block 0 has {first.ffn_dim}"
    return None
