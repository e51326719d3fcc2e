import copy
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.budget.costs import Costs, loss_weights
from segprune.pruning.budget.rate import TOLERANCE, Limit, solve
from segprune.pruning.groups import Group, Member, find_groups
from segprune.pruning.importance import score_channels
from segprune.pruning.options import PruneOptions
from segprune.pruning.plan import Plan
from segprune.pruning.surgery import cut_channels, read_spec
from segprune.spec import standard_spec
from segprune.stats import Layer, count, layers

SHAPE = (512, 512)
RATES = ("params", "macs", "channels")
PROTECTED = {"encoder.stages.0.patch_embed.proj", "decode_head.classifier"}


@pytest.fixture(scope="module")
def b0() -> tuple[SegFormer, tuple[Group, ...], dict[str, np.ndarray]]:
    torch.manual_seed(0)
    model = fold_decoder(SegFormer(standard_spec("b0", 8)))
    groups = find_groups(model, torch.zeros(1, 3, 64, 64), PROTECTED, heads=True).groups
    return model, groups, score_channels(model, groups)


def costs_of(model: SegFormer, groups: tuple[Group, ...], rate_of: str) -> Costs:
    return Costs(layers(model.spec, SHAPE), groups, rate_of)


def solved(
    costs: Costs,
    scores,
    rate: float,
    *,
    rate_of: str = "params",
    whole: float | None = None,
    **options,
) -> Plan:
    weights = loss_weights(costs.layers, costs.groups, rate_of)
    return solve(
        [Limit(costs, rate, rate_of, whole)],
        costs.groups,
        scores,
        weights,
        PruneOptions(**options),
    )


def widths_of(groups: tuple[Group, ...], plan: Plan) -> np.ndarray:
    return np.array([len(plan.keep[group.name]) // group.parts for group in groups])


def chain(*widths: int) -> tuple[list[Layer], list[Group]]:
    """Linear layers in a row; between two of them lies a group."""
    rows = [
        Layer(f"l{i}", "product", a, b, 1, bias=False)
        for i, (a, b) in enumerate(pairwise(widths))
    ]
    groups = []
    for i, width in enumerate(widths[1:-1]):
        every = np.arange(width)
        members = (
            Member(f"l{i}", "out", every, every),
            Member(f"l{i + 1}", "in", every, every),
        )
        groups.append(Group(f"g{i}", "other", width, members))
    return rows, groups


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_costs_of_any_widths_are_those_of_the_cut_network(
    b0, seed: int, heads: bool
) -> None:
    model, groups, _ = b0
    groups = tuple(group for group in groups if heads or group.kind != "head")
    rng = np.random.default_rng(seed)
    widths = np.array([rng.integers(1, group.slots + 1) for group in groups])
    keep = {
        g.name: tuple(part * g.slots + slot for part in range(g.parts) for slot in range(width))
        for g, width in zip(groups, widths.tolist(), strict=True)
    }
    pruned = copy.deepcopy(model)
    cut_channels(pruned, groups, Plan(keep))
    counts = count(read_spec(pruned), SHAPE)
    assert costs_of(model, groups, "params").total(widths) == counts.parameters
    assert costs_of(model, groups, "params").total(widths) == sum(
        p.numel() for p in pruned.parameters()
    )
    assert costs_of(model, groups, "macs").total(widths) == pytest.approx(counts.macs)


def test_full_widths_cost_the_whole_network(b0) -> None:
    model, groups, _ = b0
    counts = count(model.spec, SHAPE)
    assert (
        costs_of(model, groups, "params").total(np.array([g.slots for g in groups]))
        == counts.parameters
    )
    assert costs_of(model, groups, "macs").total(
        np.array([g.slots for g in groups])
    ) == pytest.approx(counts.macs)


def test_channels_are_counted_once_per_group(b0) -> None:
    model, groups, _ = b0
    groups = tuple(group for group in groups if group.kind != "head")
    costs = costs_of(model, groups, "channels")
    assert costs.total(costs.full) == sum(group.num_channels for group in groups)


@pytest.mark.parametrize("scope", ["global", "local", "isomorphic"])
@pytest.mark.parametrize("rate_of", RATES)
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
def test_the_rate_is_met(b0, rate: float, round_to: int, rate_of: str, scope: str) -> None:
    model, groups, scores = b0
    groups = tuple(group for group in groups if group.kind != "head")
    costs = costs_of(model, groups, rate_of)
    plan = solved(costs, scores, rate, rate_of=rate_of, round_to=round_to, scope=scope)
    assert plan.removed[rate_of] == pytest.approx(rate, abs=TOLERANCE)
    assert plan.removed[rate_of] == pytest.approx(
        1 - costs.total(widths_of(groups, plan)) / costs.total(costs.full)
    )
    for group, width in zip(groups, widths_of(groups, plan).tolist(), strict=True):
        assert width == group.slots or width % round_to == 0
        assert width >= group.slots / 10


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_the_channels_that_stay_have_the_highest_scores_of_their_head(b0, rate: float) -> None:
    model, groups, scores = b0
    plan = solved(costs_of(model, groups, "params"), scores, rate)
    for group in groups:
        kept = set(plan.keep[group.name])
        assert plan.keep[group.name] == tuple(sorted(kept))
        parts = [set(range(p * group.slots, (p + 1) * group.slots)) for p in range(group.parts)]
        assert len({len(part & kept) for part in parts}) == 1
        for part in parts:
            worst_kept = min(scores[group.name][c] for c in part & kept)
            assert all(scores[group.name][c] <= worst_kept for c in part - kept)


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.7])
def test_local_scope_takes_the_same_share_of_every_group(b0, rate: float) -> None:
    model, groups, scores = b0
    groups = tuple(group for group in groups if group.kind != "head")
    plan = solved(costs_of(model, groups, "params"), scores, rate, round_to=1, scope="local")
    shares = [
        width / group.slots
        for group, width in zip(groups, widths_of(groups, plan).tolist(), strict=True)
    ]
    assert max(shares) < 1
    assert max(shares) - min(shares) <= 1.5 / min(group.slots for group in groups)


@pytest.mark.parametrize("scope", ["global", "local", "isomorphic"])
def test_a_higher_rate_leaves_less(b0, scope: str) -> None:
    model, groups, scores = b0
    costs = costs_of(model, groups, "params")
    removed = [
        solved(costs, scores, rate, scope=scope).removed["params"]
        for rate in (0.1, 0.25, 0.4, 0.55, 0.7)
    ]
    assert removed == sorted(removed)


def test_equal_scores_do_not_remove_too_much() -> None:
    rows, groups = chain(16, 200, 200, 16)
    scores = {group.name: np.ones(group.num_channels) for group in groups}
    for rate in (0.1, 0.5, 0.9):
        plan = solved(Costs(rows, groups, "params"), scores, rate, round_to=1)
        assert plan.removed["params"] == pytest.approx(rate, abs=TOLERANCE)


def test_of_equal_scores_the_first_channels_stay() -> None:
    rows, groups = chain(8, 10, 8)
    scores = {"g0": np.array([1.0] * 9 + [0.5])}
    assert solved(Costs(rows, groups, "params"), scores, 0.3, round_to=1).keep["g0"] == tuple(
        range(7)
    )


def test_a_slot_weighs_as_much_as_the_mean_of_its_channels_in_all_heads() -> None:
    rows, (heads, other) = chain(16, 80, 80, 16)
    groups = [replace(heads, parts=2), other]
    costs, rng = Costs(rows, groups, "params"), np.random.default_rng(0)
    low, high, rest = (
        np.sort(rng.uniform(0.1, 1, 40)),
        np.sort(rng.uniform(2, 9, 40)),
        rng.uniform(0.5, 2, 80),
    )
    unequal = {"g0": np.concatenate([rng.permutation(low), rng.permutation(high)]), "g1": rest}
    equal = {"g0": np.tile((low + high) / 2, 2), "g1": rest}
    plans = [solved(costs, scores, 0.4, round_to=1) for scores in (unequal, equal)]
    widths = [{name: len(keep) for name, keep in plan.keep.items()} for plan in plans]
    assert widths[0] == widths[1]


def test_no_group_loses_its_last_channel() -> None:
    rows, groups = chain(50, 3, 50, 50)
    scores = {"g0": np.ones(3), "g1": np.ones(50)}
    plan = solved(Costs(rows, groups, "params"), scores, 0.89, round_to=1)
    assert len(plan.keep["g0"]) == 1


def test_the_budget_counts_from_the_whole_that_is_given() -> None:
    rows, groups = chain(100, 100, 100)
    costs = Costs(rows, groups, "params")
    plan = solved(costs, {"g0": np.arange(1.0, 101)}, 0.6, whole=40_000, round_to=1)
    assert plan.removed["params"] == pytest.approx(0.6, abs=TOLERANCE)
    assert costs.total(np.array([len(plan.keep["g0"])])) == pytest.approx(16_000, rel=0.02)


def test_what_lies_in_no_listed_layer_counts_but_stays() -> None:
    rows, groups = chain(100, 100, 100)
    costs = Costs(rows, groups, "params", rest=20_000)
    assert costs.total(costs.full) == 40_000
    assert len(solved(costs, {"g0": np.arange(1.0, 101)}, 0.25, round_to=1).keep["g0"]) == 50


@pytest.mark.parametrize("rate_of", RATES)
@pytest.mark.parametrize("round_to", [1, 8])
def test_a_rate_out_of_reach_is_refused_with_the_nearest_which_works(
    b0, rate_of: str, round_to: int
) -> None:
    model, groups, scores = b0
    costs = costs_of(model, groups, rate_of)
    with pytest.raises(
        ValueError, match=r"Rate 0\.999 is out of reach; the most that can be removed"
    ) as refusal:
        solved(costs, scores, 0.999, rate_of=rate_of, round_to=round_to)
    nearest = nearest_in(str(refusal.value))
    assert solved(costs, scores, nearest, rate_of=rate_of, round_to=round_to).removed[
        rate_of
    ] == pytest.approx(nearest, abs=0.01)


def test_a_rate_between_two_coarse_steps_is_refused_with_the_nearest_which_works() -> None:
    rows, groups = chain(8, 32, 8)
    costs, scores = Costs(rows, groups, "params"), {"g0": np.arange(1.0, 33)}
    message = r"Rate 0\.4 of the params cannot be met within 1% in steps of 8 channels; .*with `round_to` 1\."
    with pytest.raises(ValueError, match=message) as refusal:
        solved(costs, scores, 0.4)  # of 4 steps, one removes a quarter and two a half
    assert nearest_in(str(refusal.value)) == 0.5
    assert solved(costs, scores, 0.5).removed["params"] == 0.5
    assert solved(costs, scores, 0.4, round_to=1).removed["params"] == pytest.approx(
        0.4, abs=TOLERANCE
    )


def test_finer_steps_are_not_advised_where_there_are_none() -> None:
    rows, groups = chain(8, 10, 8)
    with pytest.raises(
        ValueError, match=r"cannot be met within 1% in steps of 1 channels; [^`]*$"
    ):
        solved(Costs(rows, groups, "params"), {"g0": np.arange(1.0, 11)}, 0.45, round_to=1)


def test_a_rate_that_would_remove_nothing_is_refused() -> None:
    rows, groups = chain(8, 100, 8)
    costs, scores = Costs(rows, groups, "params"), {"g0": np.arange(1.0, 101)}
    with pytest.raises(
        ValueError,
        match=r"Rate 0\.002 is too small to remove even one step of 8 channels; ask for a",
    ):
        solved(costs, scores, 0.002)


def test_a_rate_below_what_folding_saved_is_refused() -> None:
    rows, groups = chain(100, 100, 100)
    costs, scores = Costs(rows, groups, "params"), {"g0": np.arange(1.0, 101)}
    with pytest.raises(
        ValueError,
        match=r"Rate 0\.2 is less than folding the decode head alone removes \(0\.500\)",
    ):
        solved(costs, scores, 0.2, whole=40_000)


def nearest_in(message: str) -> float:
    """The rate that a refusal names as the one to ask for."""
    found = re.search(
        r"(?:that can be removed here is|ask for the nearest,) (\d+(?:\.\d+)?)", message
    )
    assert found, message
    return float(found[1])


@settings(deadline=None, derandomize=True, database=None)
@given(
    widths=st.lists(st.integers(2, 60), min_size=3, max_size=5),
    rate=st.floats(0.01, 0.99),
    round_to=st.sampled_from([1, 2, 8]),
    levels=st.integers(1, 20),
    seed=st.integers(0, 10),
)
def test_a_plan_meets_its_rate_or_is_refused(
    widths: list[int], rate: float, round_to: int, levels: int, seed: int
) -> None:
    """Few levels of scores make many ties."""
    rows, groups = chain(*widths)
    rng = np.random.default_rng(seed)
    scores = {
        group.name: rng.integers(0, levels, group.num_channels) / levels for group in groups
    }
    costs = Costs(rows, groups, "params")
    plan, message = None, ""
    try:
        plan = solved(costs, scores, rate, round_to=round_to)
    except ValueError as refusal:
        message = str(refusal)
    if plan is None:
        assert (
            "is too small" in message
            or (nearest := nearest_in(message)) == 0
            or solved(costs, scores, nearest, round_to=round_to)
        )
        return
    left = widths_of(tuple(groups), plan)
    assert abs(1 - costs.total(left) / costs.total(costs.full) - rate) <= TOLERANCE
    for group, width in zip(groups, left.tolist(), strict=True):
        assert width == group.slots or (width % round_to == 0 and width >= group.slots / 10)
