"""PruneOptions: what text says, what is meant where nothing is said, and what cannot be combined."""

from dataclasses import replace
from typing import Any

import pytest

from segprune.pruning.options import PruneOptions


@pytest.mark.parametrize(
    ("rate", "rate_of", "budgets", "by_name"),
    [
        (None, None, {"params": 0.5}, {}),
        (0.3, None, {"params": 0.3}, {}),
        ("0.3", "macs", {"macs": 0.3}, {}),
        ("params=0.5, macs=0.7", None, {"params": 0.5, "macs": 0.7}, {}),
        ("0.5,stages.3=0.7", None, {"params": 0.5}, {"stages.3": 0.7}),
        ("0.5,stages.3=0.7", "macs", {"macs": 0.5}, {"stages.3": 0.7}),
        ("head=0.6", None, {}, {"head": 0.6}),
        ({"latency": 0.4}, None, {"latency": 0.4}, {}),
    ],
)
def test_how_much_is_removed_can_be_said_in_several_ways(
    rate: Any, rate_of: Any, budgets: dict[str, float], by_name: dict[str, float]
) -> None:
    options = PruneOptions(pruning_rate=rate, rate_of=rate_of)
    assert (options.budgets, options.shares_by_name) == (budgets, by_name)
    assert replace(options, seed=3).budgets == budgets  # read once, and not again


def test_a_plan_leaves_no_rate_and_text_says_what_python_does() -> None:
    assert PruneOptions(plan={"a": 1}).budgets == {}
    assert (
        PruneOptions(max_rate="0.8").max_rate
        == PruneOptions(max_rate=0.8).max_rate
        == {"*": 0.8}
    )
    assert PruneOptions(ignore="a.*, b") == PruneOptions(ignore=["a.*", "b"])
    assert not PruneOptions(pruning_rate=0.1).removes_nothing
    assert PruneOptions(pruning_rate=0.0).removes_nothing


def test_what_keys_and_values_are_averaged_over_is_said_for_all_or_by_name() -> None:
    assert PruneOptions().kv_factors == {}
    assert PruneOptions(kv_reduction=2).kv_factors == {"": 2}
    named = PruneOptions(kv_reduction="2, stages.1=4")
    assert named.kv_factors == {"": 2, "stages.1": 4}
    assert replace(named, seed=3) == PruneOptions(kv_reduction=named.kv_factors, seed=3)
    assert PruneOptions(uniform=True, kv_reduction=1).kv_factors == {"": 1}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"pruning_method": "l3"}, "`pruning_method` is 'l3'"),
    ({"pruning_rate": 1.0}, "`pruning_rate` is 1; it must be at least 0 and below 1"),
    ({"pruning_rate": "macs=1.5"}, "`pruning_rate` is 1.5 for macs"),
    ({"pruning_rate": "0.5,params=0.4"}, "says twice how much of the params"),
    ({"pruning_rate": "macs=0.5", "rate_of": "params"}, "`rate_of` has no effect"),
    ({"max_rate": 1.0}, "`max_rate` is 1"),
    ({"round_to": 0}, "`round_to` is 0"),
    ({"price": "high"}, "`price` is 'high'"),
    ({"normalise": "sum"}, "`normalise` is 'sum'"),
    ({"input_shape": (16, 16)}, "must be at least 32"),
    ({"plan": {"a": 1}, "scope": "local"}, "`scope` has no effect with `plan`"),
    ({"plan": "plan.json", "pruning_rate": 0.5}, "`pruning_rate` has no effect with `plan`"),
    (
        {"pruning_rate": "head=0.5", "max_rate": 0.8},
        "`max_rate` has no effect where `pruning_rate` gives the share",
    ),
    ({"sensitivity": {"a": 0.0}}, "`sensitivity` is 0 for a; give factors above 0"),
    (
        {"scope": "local", "sensitivity": {"a": 1.0}},
        "`sensitivity` has no effect with `scope` local",
    ),
    (
        {"scope": "isomorphic", "normalise": "max"},
        "`normalise` has no effect with `scope` isomorphic",
    ),
    ({"kv_reduction": 0}, "`kv_reduction` is 0; it must be a whole number from 1 to 64"),
    ({"kv_reduction": "stages.0=1.5"}, "`kv_reduction` is 1.5 for stages.0"),
    ({"kv_reduction": "two"}, "`kv_reduction` is 'two'; write it as 2, or stages.0=2"),
    ({"kv_reduction": True}, "`kv_reduction` is True"),
    ({"kv_reduction": "65"}, "`kv_reduction` is 65; it must be a whole number from 1 to 64"),
    ({"kv_reduction": "inf"}, "`kv_reduction` is inf; it must be a whole number"),
    ({"kv_reduction": {"stages.0": float("nan")}}, "`kv_reduction` is nan for stages.0"),
    (
        {"uniform": True, "kv_reduction": 2},
        "`kv_reduction` above 1 cannot be combined with `uniform`",
    ),
    ({"uniform": True, "heads": True}, "`heads` cannot be combined with `uniform`"),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=[", ".join(changes) for changes, _ in REFUSED]
)
def test_what_is_out_of_range_or_contradicts_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"\.$") as refusal:
        PruneOptions(**changes)
    assert message in str(refusal.value)
