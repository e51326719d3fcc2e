import json
import re
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from segprune.checkpoint.dialects import NUMERICS
from segprune.spec import (
    DEPTHS,
    NUM_HEADS,
    VARIANTS,
    WIDTHS,
    Spec,
    check_variant,
    list_kv_reductions,
    spec_from_dict,
    spec_to_dict,
    standard_spec,
    with_folded_head,
    with_kv_reductions,
    with_unfolded_head,
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_standard_variant_has_the_published_shape(variant: str) -> None:
    spec = standard_spec(variant, 19)
    assert tuple(len(stage.blocks) for stage in spec.stages) == DEPTHS[variant]
    assert tuple(stage.width for stage in spec.stages) == WIDTHS[variant]
    for stage, num_heads in zip(spec.stages, NUM_HEADS, strict=True):
        for block in stage.blocks:
            assert block.num_heads == num_heads
            assert (
                block.num_heads * block.qk_dim == block.num_heads * block.v_dim == stage.width
            )
            assert block.ffn_dim == 4 * stage.width
            assert block.qk_scale == pytest.approx(block.qk_dim**-0.5)
            assert (block.reduction_dim is None) == (stage.reduction_ratio == 1)
    assert not spec.folded


def test_another_decoder_width_goes_to_every_branch() -> None:
    spec = standard_spec("b0", 2, decoder_dim=96)
    assert spec.decoder_dim == 96
    assert spec.branch_dims == (96,) * 4


@pytest.mark.parametrize("change", [{}, {"branch_dims": None}, {"head": "conv"}], ids=str)
def test_a_spec_survives_json(small_spec: Spec, change: dict[str, Any]) -> None:
    spec = replace(small_spec, **change)
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


def test_a_spec_from_before_heads_had_kinds_has_the_published_one(small_spec: Spec) -> None:
    old = _changed(spec_to_dict(small_spec), ("head",), ...)
    assert spec_from_dict(old) == small_spec


def test_a_spec_from_before_maps_could_be_coarser_has_factors_of_1(small_spec: Spec) -> None:
    old = spec_to_dict(small_spec)
    for stage in old["stages"]:
        for block in stage["blocks"]:
            del block["kv_reduction"]
    assert spec_from_dict(old) == small_spec
    coarse = with_kv_reductions(small_spec, {"encoder.stages.2.blocks.1.attn": 2})
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(coarse)))) == coarse
    assert list_kv_reductions(coarse) == dict.fromkeys(list_kv_reductions(coarse), 1) | {
        "encoder.stages.2.blocks.1.attn": 2
    }


def test_a_coarser_map_where_nothing_reads_it_is_refused(small_spec: Spec) -> None:
    bare = replace(small_spec.stages[2].blocks[0].without_attention(), kv_reduction=2)
    stages = list(small_spec.stages)
    stages[2] = replace(stages[2], blocks=(bare, *stages[2].blocks[1:]))
    with pytest.raises(ValueError, match="kv_reduction 2 in a block without attention"):
        spec_from_dict(spec_to_dict(replace(small_spec, stages=tuple(stages))))


def test_a_head_of_another_kind_and_a_conv_head_without_branches_are_refused(
    conv_spec: Spec,
) -> None:
    data = spec_to_dict(conv_spec)
    with pytest.raises(
        ValueError, match=r"has head 'uper', which must be mlp or conv; the file is damaged\.$"
    ):
        spec_from_dict(_changed(data, ("head",), "uper"))
    with pytest.raises(
        ValueError,
        match=r"^This segprune spec has a conv head without branches; the file is damaged",
    ):
        spec_from_dict(_changed(data, ("branch_dims",), None))


def test_only_the_published_head_folds(small_spec: Spec, conv_spec: Spec) -> None:
    assert with_folded_head(small_spec) == replace(small_spec, branch_dims=None)
    assert with_folded_head(conv_spec) == conv_spec


def test_a_head_is_of_one_form_and_unfolding_gives_it_branches_again(
    small_spec: Spec, conv_spec: Spec
) -> None:
    folded = with_folded_head(small_spec)
    assert [spec.head_form.name for spec in (small_spec, folded, conv_spec)] == [
        "mlp",
        "folded",
        "conv",
    ]
    assert folded.branch_widths == (folded.decoder_dim,) * 4
    assert with_unfolded_head(folded).head_form == small_spec.head_form
    assert with_unfolded_head(folded).branch_dims == folded.branch_widths
    assert with_unfolded_head(conv_spec) == conv_spec


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"Unknown variant 'b6'; choose one of b0, b1, b2, b3, b4, b5\."
    ):
        check_variant("b6")
    with pytest.raises(ValueError, match="Unknown variant 'B0'"):
        standard_spec("B0", 8)


def test_one_class_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="`num_classes` is 1; segmentation needs at least 2, background included",
    ):
        standard_spec("b0", 1)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("decoder_dim",), ...),
        (("extra",), 1),
        (("stages",), ...),
        (("stages",), None),
        (("stages", 0, "blocks"), ...),
        (("stages", 1, "blocks", 0, "qk_dim"), ...),
        (("stages", 1, "blocks", 0, "extra"), 1),
        (("numerics", "bn_eps"), ...),
        (("branch_dims",), ...),
    ],
)
def test_a_missing_or_unknown_key_is_refused(
    small_spec: Spec, path: tuple, value: object
) -> None:
    with pytest.raises(
        ValueError,
        match=r"This is not a segprune spec .*; write the file again with segprune\.save\.",
    ):
        spec_from_dict(_changed(spec_to_dict(small_spec), path, value))


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "8"])
@pytest.mark.parametrize(
    "path",
    [
        ("decoder_dim",),
        ("num_classes",),
        ("branch_dims", 2),
        ("stages", 0, "width"),
        ("stages", 2, "blocks", 1, "v_dim"),
        ("stages", 1, "blocks", 0, "reduction_dim"),
        ("stages", 3, "blocks", 0, "kv_reduction"),
    ],
)
def test_a_width_that_is_no_whole_number_from_1_up_is_refused(
    small_spec: Spec, path: tuple, value: object
) -> None:
    with pytest.raises(
        ValueError,
        match=f"has {re.escape(str(path[-1] if isinstance(path[-1], str) else path[0]))} {re.escape(repr(value))}, "
        r"which must be .*; the file is damaged\.$",
    ):
        spec_from_dict(_changed(spec_to_dict(small_spec), path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("variant",), "/tmp/elsewhere"),
        (("variant",), "../b0"),
        (("variant",), 5),
        (("num_classes",), 10**8),
        (("stages", 1, "width"), 2**63),
        (("stages", 1, "kernel_size"), "16"),
        (("stages", 1, "kernel_size"), -1),
        (("stages", 1, "kernel_size"), 64),
        (("stages", 0, "stride"), 0),
        (("stages", 0, "stride"), 17),
        (("stages", 0, "reduction_ratio"), 10**9),
        (("stages", 1, "blocks", 0, "qk_scale"), float("nan")),
        (("stages", 1, "blocks", 0, "qk_scale"), 1e308),
        (("stages", 1, "blocks", 0, "qk_scale"), "1"),
        (("stages", 1, "blocks", 0, "num_heads"), True),
        (("stages", 1, "blocks", 0, "reduction_dim"), None),
        (("stages", 1, "blocks", 0, "kv_reduction"), 65),
        (("numerics", "bn_eps"), 1e308),
        (("head",), 3),
    ],
    ids=str,
)
def test_a_value_that_no_network_has_is_refused_by_its_name(
    small_spec: Spec, path: tuple, value: object
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"has {path[-1]} {re.escape(repr(value))}, .*; the file is damaged\.$",
    ):
        spec_from_dict(_changed(spec_to_dict(small_spec), path, value))


def test_a_reduction_where_nothing_is_reduced_is_refused(small_spec: Spec) -> None:
    data = _changed(spec_to_dict(small_spec), ("stages", 3, "blocks", 0, "reduction_dim"), 48)
    with pytest.raises(ValueError, match="a reduction_dim where nothing is reduced"):
        spec_from_dict(data)


def test_more_or_fewer_stages_and_too_many_blocks_are_refused(small_spec: Spec) -> None:
    data = spec_to_dict(small_spec)
    stages = data["stages"]
    many = [*stages[:3], stages[3] | {"blocks": stages[3]["blocks"] * 257}]
    for odd, said in ((stages[:3], "3 entries"), ([*stages, stages[3]], "5"), (many, "257")):
        with pytest.raises(ValueError, match=f"not a segprune spec .*has {said}"):
            spec_from_dict({**data, "stages": odd})
    with pytest.raises(ValueError, match="branch_dims has 3 entries, allowed are 4"):
        spec_from_dict({**data, "branch_dims": (16, 16, 16)})


@pytest.mark.parametrize(
    "odd",
    [5, "stages", [1], torch.ones(4), {"stages": torch.ones(4)}, {"stages": [[], 1, 2, 3]}],
)
def test_what_is_no_spec_at_all_is_refused(odd: Any) -> None:
    with pytest.raises(ValueError, match="This is not a segprune spec"):
        spec_from_dict(odd)


def test_a_tensor_in_the_place_of_a_number_is_refused(small_spec: Spec) -> None:
    data = spec_to_dict(small_spec)
    with pytest.raises(ValueError, match=r"not a segprune spec .num_classes is a Tensor"):
        spec_from_dict({**data, "num_classes": torch.ones(4)})


@pytest.mark.parametrize("missing", ["attention", "ffn"])
def test_a_block_may_lack_one_branch_and_its_widths_are_then_0(
    small_spec: Spec, missing: str
) -> None:
    block = small_spec.stages[2].blocks[0]
    bare = block.without_attention() if missing == "attention" else block.without_ffn()
    assert (bare.has_attention, bare.has_ffn) == (missing != "attention", missing != "ffn")
    if missing == "attention":
        assert (bare.num_heads, bare.qk_dim, bare.v_dim, bare.reduction_dim, bare.qk_scale) == (
            0,
            0,
            0,
            None,
            0.0,
        )
        assert bare.ffn_dim == block.ffn_dim
    else:
        assert bare == replace(block, ffn_dim=0)
    stages = list(small_spec.stages)
    stages[2] = replace(stages[2], blocks=(bare, stages[2].blocks[1]))
    spec = replace(small_spec, stages=tuple(stages))
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


@pytest.mark.parametrize("name", ["num_heads", "qk_dim", "v_dim"])
def test_half_an_attention_is_refused(small_spec: Spec, name: str) -> None:
    data = _changed(spec_to_dict(small_spec), ("stages", 2, "blocks", 0, name), 0)
    with pytest.raises(
        ValueError,
        match=r"which must be .*; the file is damaged",
    ):
        spec_from_dict(data)


def test_a_block_without_branches_and_a_stage_without_blocks_are_refused(
    small_spec: Spec,
) -> None:
    empty = asdict(small_spec.stages[1].blocks[0].without_attention().without_ffn())
    for path, value, said in (
        (("stages", 1, "blocks", 0), empty, "a block without attention and FFN"),
        (("stages", 1, "blocks"), [], "blocks has 0 entries, allowed are 1 to 256"),
    ):
        with pytest.raises(ValueError, match=said):
            spec_from_dict(_changed(spec_to_dict(small_spec), path, value))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("gelu", "exact", "none or tanh"),
        ("gelu", None, "none or tanh"),
        ("head_dropout_kind", "1d", "2d or plain"),
        ("head_dropout_kind", 2, "2d or plain"),
        ("align_corners", 1, "true or false"),
        ("align_corners", "false", "true or false"),
        ("norm_eps", 0, "a number above 0 and up to 1"),
        ("norm_eps", float("inf"), "a number above 0 and up to 1"),
        ("embed_norm_eps", -1e-5, "a number above 0 and up to 1"),
        ("bn_eps", float("nan"), "a number above 0 and up to 1"),
        ("bn_eps", "1e-5", "a number above 0 and up to 1"),
        ("bn_eps", True, "a number above 0 and up to 1"),
        ("bn_momentum", -0.1, "a number from 0 to below 1"),
        ("head_dropout", 1.0, "a number from 0 to below 1"),
        ("drop_path", None, "a number from 0 to below 1"),
    ],
)
def test_numerics_that_no_network_has_are_refused(
    small_spec: Spec, name: str, value: object, allowed: str
) -> None:
    message = f"This segprune spec has {name} {value!r}, which must be {allowed}; the file is damaged."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        spec_from_dict(_changed(spec_to_dict(small_spec), ("numerics", name), value))


def test_the_numerics_of_every_dialect_survive_json(small_spec: Spec) -> None:
    for numerics in NUMERICS.values():
        spec = replace(small_spec, numerics=numerics)
        assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


def _changed(data: dict, path: tuple, value: object) -> dict:
    """A copy with `value` at the path of keys; `...` removes the key."""
    data = json.loads(json.dumps(data))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data
