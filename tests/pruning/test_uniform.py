"""Uniform plans: what stock classes can hold, at the rate asked for, by the steps that lose least."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from segprune.checkpoint.published import uniform_problem
from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.budget.uniform import start_search
from segprune.pruning.pruner import Pruner
from segprune.pruning.pruner_l1 import L1Pruner
from segprune.spec import Spec, standard_spec, with_widths
from segprune.stats import count
from tests.dialects import Fill

X = torch.zeros(1, 3, 64, 64)
SHAPE = (64, 64)


@pytest.fixture
def dense(trained_like: Fill) -> SegFormer:
    """A uniform network small enough to be cut often: widths 16 32 40 64."""
    spec = standard_spec("b0", 5)
    widths = zip(spec.stages, (16, 32, 40, 64), (1, 2, 5, 8), (64, 128, 160, 256), strict=True)
    stages = tuple(with_widths(*row) for row in widths)
    model = trained_like(
        SegFormer(replace(spec, stages=stages, decoder_dim=64, branch_dims=(64,) * 4)).eval()
    )
    assert isinstance(model, SegFormer)
    return model


def removed(pruned: nn.Module, dense: SegFormer) -> tuple[float, float]:
    assert isinstance(pruned, SegFormer)
    left, whole = count(pruned.spec, SHAPE), count(dense.spec, SHAPE)
    assert left.parameters == sum(p.numel() for p in pruned.parameters())
    return 1 - left.parameters / whole.parameters, 1 - left.macs / whole.macs


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.7])
def test_a_uniform_plan_meets_its_rate_and_every_rule(rate: float, dense: SegFormer) -> None:
    pruner = Pruner(dense, rate, uniform=True, repair=False)
    pruned = pruner.prune(X)
    assert removed(pruned, dense)[0] == pytest.approx(rate, abs=0.02)
    assert isinstance(pruned, SegFormer)
    assert uniform_problem(pruned.spec) is None
    assert pruned.spec.branch_dims == (pruned.spec.decoder_dim,) * 4
    assert pruned.spec.stages[0].width == 16  # the first convolution's outputs are protected
    assert all(stage.width % 8 == 0 for stage in pruned.spec.stages)
    assert pruner.plan is not None
    assert (pruner.plan.removed["params"], pruner.plan.removed["macs"]) == pytest.approx(
        removed(pruned, dense)
    )


def test_rates_of_macs_and_several_at_once_are_met(dense: SegFormer) -> None:
    assert removed(
        Pruner(dense, 0.6, rate_of="macs", uniform=True, repair=False).prune(X), dense
    )[1] == pytest.approx(0.6, abs=0.02)
    params, macs = removed(
        Pruner(dense, {"params": 0.3, "macs": 0.6}, uniform=True, repair=False).prune(X), dense
    )
    assert params > 0.28
    assert macs > 0.58
    assert min(params - 0.3, macs - 0.6) < 0.02


def test_a_uniform_cut_equals_zeroing_where_no_stage_gets_narrower(dense: SegFormer) -> None:
    """Head and FFNs alone: the logits are the dense network's with those channels zeroed, the head unfolded again."""
    ignore = ["encoder.stages.*.patch_embed"]
    pruner = Pruner(dense, 0.3, uniform=True, repair=False, ignore=ignore)
    pruned = pruner.prune(X)
    prepared = Pruner(dense, 0.3, uniform=True, repair=False, ignore=ignore).prepare(X)
    assert pruner.plan is not None
    folded = fold_decoder(dense)
    for group in prepared.groups:
        gone = sorted(set(range(group.num_channels)) - set(pruner.plan.keep[group.name]))
        outs = [member.layer for member in group.members if member.side == "out"]
        for layer in outs:
            for parameter in folded.get_submodule(layer).parameters():
                parameter.data[gone] = 0.0
    x = torch.randn(1, 3, *SHAPE)
    with torch.inference_mode():
        torch.testing.assert_close(pruned(x), folded(x), rtol=0, atol=1e-4)


def test_the_costs_of_the_search_are_those_of_the_unfolded_network(dense: SegFormer) -> None:
    pruner = Pruner(dense, 0.5, uniform=True, repair=False)
    prepared = pruner.prepare(X)
    space, search = start_search(prepared, pruner.score(prepared), pruner.options)
    choice = space.widest()
    assert search.removed(choice) == {"params": 0.0, "macs": 0.0}
    for _ in range(4):
        choice = list(space.steps(choice))[-2]
    pruned = Pruner(dense, uniform=True, repair=False, plan=space.widths(choice)).prune(X)
    found = search.removed(choice)
    assert (found["params"], found["macs"]) == pytest.approx(removed(pruned, dense))


def test_a_step_narrows_one_thing_with_nothing_in_between(dense: SegFormer) -> None:
    pruner = Pruner(dense, 0.5, uniform=True, repair=False)
    prepared = pruner.prepare(X)
    space, _ = start_search(prepared, pruner.score(prepared), pruner.options)
    start = space.widest()
    assert (start.stages, start.decoder_dim) == (((16, 4), (32, 4), (40, 4), (64, 4)), 64)
    steps = list(space.steps(start))
    assert all(
        sum(a != b for a, b in zip(start.stages, step.stages, strict=True))
        + (step.decoder_dim != 64)
        == 1
        for step in steps
    )
    assert {step.stages[1] for step in steps} == {(32, 4), (32, 3), (24, 5), (16, 8)}
    assert {step.stages[2] for step in steps} == {
        (40, 4),
        (40, 3),
    }  # 5 heads and steps of 8 leave 40 alone
    assert {step.decoder_dim for step in steps} == {64, 56}


def test_a_uniform_network_is_priced_by_its_parameters_unless_told_otherwise(
    dense: SegFormer,
) -> None:
    assert Pruner(dense).options.group_price == "both"
    specs = {}
    for price in (None, "params", "both"):
        pruned = Pruner(dense, 0.5, uniform=True, repair=False, price=price).prune(X)  # type: ignore[arg-type]
        assert isinstance(pruned, SegFormer)
        specs[price] = pruned.spec
    assert specs[None] == specs["params"] != specs["both"]


def test_repair_comes_nearer_and_stays_uniform(dense: SegFormer) -> None:
    images = [torch.randn(2, 3, 64, 64) for _ in range(2)]
    plain = Pruner(dense, 0.5, uniform=True, repair=False).prune(X)
    repaired = Pruner(dense, 0.5, uniform=True, images=images).prune(X)
    assert isinstance(repaired, SegFormer)
    assert uniform_problem(repaired.spec) is None
    with torch.inference_mode():
        far, near = (
            (model(images[0]) - dense(images[0])).square().mean() for model in (plain, repaired)
        )
    assert near < 0.5 * far


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"heads": True}, "`heads`"),
        ({"keep_decoder": True}, "`keep_decoder`"),
        ({"pruning_rate": {"params": 0.5, "head": 0.5}}, "names in `pruning_rate`"),
        ({"scope": "local"}, "`scope`"),
        ({"price": "none"}, "price none"),
        ({"rate_of": "channels"}, "channels as a unit"),
        ({"rate_of": "latency"}, "latency as a unit"),
    ],
)
def test_what_has_no_meaning_for_uniform_stages_is_refused(
    options: dict[str, object], name: str, dense: SegFormer
) -> None:
    with pytest.raises(ValueError, match=f"^{name}.* cannot be combined with `uniform`"):
        Pruner(dense, uniform=True, repair=False, **options)  # type: ignore[arg-type]


def test_a_rate_that_uniform_stages_cannot_meet_is_refused_with_the_nearest(
    dense: SegFormer,
) -> None:
    message = r"Rate 0\.97 of the params cannot be met within 2% by uniform stages; ask for the nearest, 0\.\d+, or prune"
    with pytest.raises(ValueError, match=message):
        Pruner(dense, 0.97, uniform=True, repair=False).prune(X)


def test_a_plan_that_is_not_uniform_is_refused(dense: SegFormer) -> None:
    plan, groups = Pruner(dense, 0.5, uniform=True, repair=False).make_plan(X)
    widths = {group.name: len(plan.keep[group.name]) // group.parts for group in groups}
    widths["encoder.stages.3.blocks.1.mlp.ffn"] -= 1
    with pytest.raises(
        ValueError,
        match=r"The plan is not uniform, since block 1 of stage 4 has an FFN of width .*; edit",
    ):
        Pruner(dense, uniform=True, repair=False, plan=widths).prune(X)


def test_stages_that_cannot_be_uniform_are_refused(dense: SegFormer, small_spec: Spec) -> None:
    message = r"Stage 1 cannot be made uniform, since its layers are too narrow, or protected at other widths; prune wi"
    with pytest.raises(ValueError, match=message):
        Pruner(SegFormer(small_spec), 0.5, uniform=True, repair=False).prune(X)
    stage = dense.spec.stages[2]
    bare = replace(stage, blocks=(stage.blocks[0].without_ffn(), stage.blocks[1]))
    spec = replace(dense.spec, stages=(*dense.spec.stages[:2], bare, dense.spec.stages[3]))
    with pytest.raises(
        ValueError,
        match="Stage 3 has blocks without attention or FFN, or with different numbers of heads",
    ):
        Pruner(SegFormer(spec), 0.5, uniform=True, repair=False).prune(X)
    with pytest.raises(
        ValueError, match="Sequential is not a stock SegFormer; only those have uniform stages"
    ):
        L1Pruner(nn.Sequential(dense), 0.5, uniform=True, repair=False).prune(X)
