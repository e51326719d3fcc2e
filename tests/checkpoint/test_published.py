"""What published classes can hold, and the same network in other numerics."""

from dataclasses import replace

import pytest

from segprune.checkpoint.published import fitting_options, mmseg_problem, uniform_problem
from segprune.spec import BlockSpec, Spec, standard_spec, with_widths


def changed(spec: Spec, **widths: int | None) -> Spec:
    """The last block of stage 2 with other widths."""
    stage = spec.stages[1]
    block: BlockSpec = replace(stage.blocks[-1], **widths)
    stages = (
        spec.stages[0],
        replace(stage, blocks=(*stage.blocks[:-1], block)),
        *spec.stages[2:],
    )
    return replace(spec, stages=stages)


@pytest.mark.parametrize("variant", ["b0", "b2"])
def test_dense_networks_are_uniform_folded_or_not(variant: str) -> None:
    spec = standard_spec(variant, 5)
    assert uniform_problem(spec) is None
    assert uniform_problem(replace(spec, branch_dims=None)) is None


@pytest.mark.parametrize(
    ("widths", "problem"),
    [
        (
            {"qk_dim": 24},
            "queries and keys of width 24 per head where the stage's width 64 asks for 32",
        ),
        ({"v_dim": 24}, "values of width 24 per head where the stage's width 64 asks for 32"),
        ({"reduction_dim": 56}, "a reduction of width 56 where the stage has 64"),
        ({"ffn_dim": 200}, "an FFN of width 200, which is no multiple of the stage's width 64"),
        ({"ffn_dim": 192}, "an FFN of width 192 where block 0 has 256"),
        ({"num_heads": 1}, "1 heads where block 0 has 2"),
        ({"ffn_dim": 0}, "no attention or no FFN"),
        (
            {"kv_reduction": 2},
            "keys and values of a map that is averaged over windows (kv_reduction 2)",
        ),
    ],
)
def test_what_is_in_the_way_is_said(widths: dict[str, int], problem: str) -> None:
    assert (
        uniform_problem(changed(standard_spec("b0", 5), **widths))
        == f"block 1 of stage 2 has {problem}"
    )


def test_what_makes_a_network_fit_is_named() -> None:
    spec = standard_spec("b0", 5)
    assert fitting_options(changed(spec, kv_reduction=2), uniform_problem) == "`kv_reduction` 1"
    assert fitting_options(changed(spec, qk_dim=8), uniform_problem) == "`uniform`"
    both = changed(spec, kv_reduction=2, qk_dim=8)
    assert fitting_options(both, uniform_problem) == "`uniform` and `kv_reduction` 1"
    assert fitting_options(replace(both, head="conv"), mmseg_problem) is None


def test_heads_have_to_divide_the_width_and_branches_to_be_as_wide_as_the_head() -> None:
    spec = standard_spec("b0", 5)
    odd = replace(
        spec, stages=(spec.stages[0], replace(spec.stages[1], width=63), *spec.stages[2:])
    )
    assert (
        uniform_problem(odd)
        == "block 0 of stage 2 has 2 heads, which do not divide the stage's width 63"
    )
    problem = "the decode head's branches have widths 8 8 8 256 where it has 256"
    assert uniform_problem(replace(spec, branch_dims=(8, 8, 8, 256))) == problem


def test_the_kind_of_decode_head_has_to_be_theirs() -> None:
    spec = standard_spec("b0", 5)
    conv = replace(spec, head="conv")
    assert (
        uniform_problem(conv)
        == "its decode head has a BatchNorm and a ReLU in each branch, not linear branches"
    )
    assert mmseg_problem(conv) is None
    assert (
        mmseg_problem(spec)
        == "its decode head has linear branches, not a BatchNorm and a ReLU in each branch"
    )


def test_mmsegmentation_has_one_width_of_heads_and_one_ratio_for_all_stages() -> None:
    conv = replace(standard_spec("b0", 5), head="conv")
    narrow = (*conv.stages[:3], with_widths(conv.stages[3], 128, 8, 512))
    problem = "its stages have heads of width 32 32 32 16 where theirs have one for all"
    assert mmseg_problem(replace(conv, stages=narrow)) == problem
    short = (*conv.stages[:3], with_widths(conv.stages[3], 256, 8, 512))
    problem = "its stages have FFNs of ratio 4 4 4 2 where theirs have one for all"
    assert mmseg_problem(replace(conv, stages=short)) == problem
    fewer = (*conv.stages[:3], with_widths(conv.stages[3], 128, 4, 512))
    assert mmseg_problem(replace(conv, stages=fewer)) is None
    assert mmseg_problem(changed(conv, qk_dim=24)) is not None
