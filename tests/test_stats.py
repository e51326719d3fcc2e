from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from segprune.model import SegFormer
from segprune.spec import (
    HEAD_FORMS,
    BlockSpec,
    HeadForm,
    Spec,
    StageSpec,
    list_kv_reductions,
    standard_spec,
    with_folded_head,
    with_kv_reductions,
)
from segprune.stats import Counts, count, layers, removed_shares


def narrowed(spec: Spec) -> Spec:
    """Widths as pruning leaves them: other ones in every block, some heads gone."""

    def block(old: BlockSpec, i: int) -> BlockSpec:
        return replace(
            old,
            num_heads=max(1, old.num_heads - i % 2),
            qk_dim=old.qk_dim - 3 - i % 5,
            v_dim=old.v_dim - 1 - i % 7,
            ffn_dim=old.ffn_dim // 2 + i,
            reduction_dim=None if old.reduction_dim is None else old.reduction_dim - 2 - i % 3,
        )

    def stage(old: StageSpec) -> StageSpec:
        return replace(
            old,
            width=old.width - 6,
            blocks=tuple(block(b, i) for i, b in enumerate(old.blocks)),
        )

    stages = (spec.stages[0], *(stage(s) for s in spec.stages[1:]))
    branch_dims = (
        None
        if spec.branch_dims is None
        else tuple(dim - 5 * i for i, dim in enumerate(spec.branch_dims))
    )
    return replace(
        spec, stages=stages, decoder_dim=spec.decoder_dim - 7, branch_dims=branch_dims
    )


def shallower(spec: Spec) -> Spec:
    """As removing branches leaves it: every stage's first block without attention, its last without FFN."""

    def stage(old: StageSpec) -> StageSpec:
        first, *_, last = old.blocks
        return replace(
            old, blocks=(first.without_attention(), *old.blocks[1:-1], last.without_ffn())
        )

    return replace(spec, stages=tuple(stage(s) for s in spec.stages))


def folded(spec: Spec) -> Spec:
    return replace(spec, branch_dims=None)


def conv(spec: Spec) -> Spec:
    return replace(spec, head="conv")


def coarser(spec: Spec) -> Spec:
    """Keys and values averaged over windows of 2 × 2 and 3 × 3, in turns."""
    names = list_kv_reductions(spec)
    return with_kv_reductions(spec, {name: 2 + i % 2 for i, name in enumerate(names)})


CHANGES = {
    "dense": lambda spec: spec,
    "folded": folded,
    "pruned": narrowed,
    "folded and pruned": lambda spec: narrowed(folded(spec)),
    "conv": conv,
    "conv and pruned": lambda spec: narrowed(conv(spec)),
    "without branches": shallower,
    "coarser": coarser,
    "folded, pruned and without branches": lambda spec: shallower(narrowed(folded(spec))),
}


MEASURED = [
    *(("b0", name, (353, 419)) for name in CHANGES),
    *(("b2", name, (512, 512)) for name in CHANGES),
    ("b5", "dense", (512, 512)),
]


@pytest.mark.parametrize(("variant", "change", "input_shape"), MEASURED)
def test_macs_equal_those_that_torch_counts(
    variant: str, change: str, input_shape: tuple[int, int]
) -> None:
    spec = CHANGES[change](standard_spec(variant, 150))
    with torch.device("meta"):  # where fused attention is counted too
        model, x = SegFormer(spec).eval(), torch.empty(1, 3, *input_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    counts = count(spec, input_shape)
    assert counts.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert counts.flops == 2 * counts.macs
    assert counts.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("variant", "giga_macs"), [("b0", 8.4), ("b2", 62.4)])
def test_macs_agree_with_the_paper(variant: str, giga_macs: float) -> None:
    assert count(standard_spec(variant, 150), (512, 512)).macs / 1e9 == pytest.approx(
        giga_macs, abs=0.1
    )


@pytest.mark.parametrize(
    "change", [lambda spec: spec, shallower, conv], ids=["dense", "without branches", "conv"]
)
def test_every_layer_is_named_and_costs_as_its_module(change) -> None:
    spec = change(standard_spec("b0", 8))
    model = SegFormer(spec)
    rows = [row for row in layers(spec, (64, 64)) if row.kind != "attention"]
    own = {
        name: sum(p.numel() for p in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    assert {row.name: row.cost("params") for row in rows} == own


@pytest.mark.parametrize("fuse", ["concatenated", "per_stage"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_further_form_of_decode_head_is_one_more_row(
    fuse: Any, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        HEAD_FORMS, "mlp", HeadForm("new", bias, True, fuse, "branches of another kind")
    )
    spec = narrowed(standard_spec("b0", 8))
    with torch.device("meta"):
        model, x = SegFormer(spec).eval(), torch.empty(1, 3, 64, 96)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    counts = count(spec, (64, 96))
    assert (counts.flops, counts.parameters) == (
        counter.get_total_flops(),
        sum(p.numel() for p in model.parameters()),
    )
    assert (
        with_folded_head(spec) == spec
    )  # a BatchNorm and a ReLU in each branch are not linear


def test_an_image_below_32_pixels_is_refused(small_spec: Spec) -> None:
    with pytest.raises(
        ValueError, match="The input is 16×64 pixels; both sides must be at least 32"
    ):
        count(small_spec, (16, 64))


def test_removed_shares_are_of_the_first_network() -> None:
    before, after = Counts(100, 1000, (64, 64)), Counts(25, 1500, (64, 64))
    assert removed_shares(before, after) == {"params": 0.75, "macs": -0.5}
