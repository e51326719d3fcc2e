from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.budget.costs import loss_weights
from segprune.pruning.budget.latency import (
    LatencyCosts,
    LatencyTable,
    Shape,
    costs,
    decider,
    default_folder,
    dense_in_predicted_ms,
    measure_shapes,
    meet,
    steps,
    target,
)
from segprune.pruning.budget.latency.steps import Place, build_step
from segprune.pruning.budget.rate import AIM, Limit, solve
from segprune.pruning.groups import Group, find_groups
from segprune.pruning.importance import score_channels
from segprune.pruning.plan import Plan
from segprune.pruning.pruner import Pruner
from segprune.spec import Spec, standard_spec, with_kv_reductions
from segprune.stats import layers
from segprune.timing import Latency, summarise
from tests.pruning.cutting import STEM, cut_copy

SHAPE = (64, 96)
PROTECTED = {STEM, "decode_head.classifier"}
HERE = Place(torch.device("cpu"), "fp32")


def bilinear_ms(shape: Shape) -> float:
    """Grows with every width and is linear in each, so that interpolation has to give it exactly."""
    return prod(shape.sizes) * (1.0 + sum(shape.dims) + 0.1 * prod(shape.dims)) * 1e-9


@dataclass
class Fake:
    """Stands in for measuring: times by formula, and a list of what was asked."""

    formula: Callable[[Shape], float] = bilinear_ms
    asked: list[Shape] = field(default_factory=list)

    def __call__(
        self, shapes: Sequence[Shape], place: Place, progress: object = None
    ) -> list[float]:
        self.asked += shapes
        return [self.formula(shape) for shape in shapes]


@pytest.fixture(scope="module", params=["folded", "conv"])
def b0(request: pytest.FixtureRequest) -> tuple[SegFormer, tuple[Group, ...]]:
    torch.manual_seed(0)
    spec = standard_spec("b0", 8)
    model = fold_decoder(
        SegFormer(spec if request.param == "folded" else replace(spec, head="conv"))
    )
    return model, find_groups(model, torch.zeros(1, 3, 64, 64), PROTECTED, heads=True).groups


def costs_of(
    b0: tuple[SegFormer, tuple[Group, ...]], formula: Callable[[Shape], float] = bilinear_ms
) -> LatencyCosts:
    return LatencyCosts(b0[0].spec, b0[1], LatencyTable(measure=Fake(formula)), SHAPE)


HEADS = ({}, {"branch_dims": None}, {"head": "conv"})


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_every_layer_that_works_is_a_side_of_a_step(
    small_spec: Spec, head: dict[str, Any]
) -> None:
    spec = replace(small_spec, **head)
    named = {name for step in steps(spec, SHAPE) for name, _ in step.sides}
    assert {row.name for row in layers(spec, SHAPE) if row.kind != "norm"} <= named
    # the other norms belong to the step of the convolution before them
    inside = ("patch_embed.norm", "attn.norm")
    assert {row.name for row in layers(spec, SHAPE) if not row.name.endswith(inside)} >= named
    kinds = [step.shape.kind for step in steps(spec, SHAPE)]
    assert kinds.count("add") == 2 * sum(len(stage.blocks) for stage in spec.stages)
    assert kinds.count("sum") == (3 if head else 0)
    assert kinds.count("upsample") == 4


def test_keys_and_values_of_a_coarser_map_are_averaged_in_a_step_of_their_own(
    small_spec: Spec,
) -> None:
    name = "encoder.stages.0.blocks.0.attn"
    coarse = with_kv_reductions(small_spec, {name: 2})
    before, after = steps(small_spec, (96, 160)), steps(coarse, (96, 160))
    (pool,) = [step for step in after if step.shape.kind == "pool"]
    assert len(after) == len(before) + 1
    assert pool.shape == Shape("pool", (1, 3, 5, 2), (16,))  # from 24 × 40 by 8
    assert build_step(pool.shape, HERE)().shape == (1, 2 * 3, 16)
    (attention,) = [
        step for step in after if (name, 0) in step.sides and "attention" in str(step.shape)
    ]
    assert attention.shape.sizes == (1, 1, 24 * 40, 2 * 3)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_step_by_itself_gives_the_shape_and_layout_that_its_layer_gives_in_the_network(
    small_spec: Spec, head: dict[str, Any]
) -> None:
    model = SegFormer(replace(small_spec, **head)).eval()
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _x, out, name=name: seen.update({name: out}))
    last = {
        "embed": ("proj", "norm"),
        "reduction": ("sr", "norm"),
        "depthwise": ("dwconv", "act"),
    }
    with torch.inference_mode():
        model(torch.randn(2, 3, *SHAPE))
        for step in steps(model.spec, SHAPE, batch=2):
            name, kind = step.sides[0][0], step.shape.kind
            out = build_step(step.shape, HERE)()
            if kind in ("linear", "norm", "pointwise", *last):
                there = seen[
                    name.removesuffix(last[kind][0]) + last[kind][1] if kind in last else name
                ]
                assert (out.shape, out.stride()) == (there.shape, there.stride()), (name, kind)
            elif kind == "attention":
                assert out.shape[:2] == seen[f"{name}.q"].shape[:2]
            elif kind == "add":
                assert out.shape == seen[name].shape
            elif kind == "activation":
                assert (out.shape, out.stride()) == (seen[name].shape, seen[name].stride())
            elif kind == "upsample" and name.endswith("classifier"):
                assert (out.shape, out.stride()) == (seen[""].shape, seen[""].stride())


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_latency_of_any_widths_is_the_sum_over_the_cut_network_s_steps(
    b0, seed: int, heads: bool
) -> None:
    model, groups = b0
    groups = tuple(group for group in groups if heads or group.kind != "head")
    rng = np.random.default_rng(seed)
    lowest = [
        -(-g.slots // 2) if g.kind in ("head", "qk", "v") else max(8, g.slots // 4)
        for g in groups
    ]
    widths = np.array(
        [rng.integers(low, g.slots + 1) for low, g in zip(lowest, groups, strict=True)]
    )
    keep = {
        g.name: tuple(part * g.slots + slot for part in range(g.parts) for slot in range(width))
        for g, width in zip(groups, widths.tolist(), strict=True)
    }
    spec = cut_copy(model, list(groups), Plan(keep)).spec
    predicted = LatencyCosts(model.spec, groups, LatencyTable(measure=Fake()), SHAPE).total(
        widths
    )
    assert predicted == pytest.approx(
        sum(bilinear_ms(step.shape) for step in steps(spec, SHAPE))
    )


def test_full_widths_take_the_sum_over_all_steps(b0) -> None:
    found = costs_of(b0)
    times = [found.table.time_ms(step.shape) for step in steps(b0[0].spec, SHAPE)]
    assert found.total(found.full) == pytest.approx(sum(times))


def test_at_measured_widths_a_step_takes_what_was_measured() -> None:
    """A hundred times a curve that is not linear: exact on the grid, on the chord between its points."""
    grid = np.array([[[8, 16, 32, 48, 64, 65], [1, 2, 3, 4, 5, 6]]], dtype=float)
    curve = np.array([1.0, 2.0, 5.0, 10.0, 17.0, 17.0])
    values = np.repeat(curve[None, :, None], 6, axis=2)
    one = np.array([1.0])
    at = [
        float(costs._interpolate(grid, values, np.array([float(x)]), one)[0])
        for x in (4, 8, 16, 24, 32, 48, 56, 64)
    ]
    assert at == [1.0, 1.0, 2.0, 3.5, 5.0, 10.0, 13.5, 17.0]


def test_two_widths_are_interpolated_as_a_bilinear_patch() -> None:
    grid = np.array([[[8, 16, 32], [10, 20, 40]]], dtype=float)
    values = np.array([[[1.0, 2.0, 3.0], [4.0, 8.0, 9.0], [5.0, 10.0, 20.0]]])
    x, y = np.array([12.0]), np.array([15.0])
    assert costs._interpolate(grid, values, x, y)[0] == pytest.approx((1 + 2 + 4 + 8) / 4)
    assert costs._interpolate(grid, values, np.array([16.0]), np.array([40.0]))[0] == 9.0


@pytest.mark.parametrize("seed", range(3))
def test_nothing_gets_slower_by_becoming_narrower_however_measurements_scatter(
    b0, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    found = costs_of(b0, lambda shape: float(rng.uniform(1.0, 2.0)))
    widths = found.full.copy()
    while (widths > 1).any():
        narrower = np.maximum(1, widths - rng.integers(0, 20, len(widths)))
        assert found.total(narrower) <= found.total(widths) + 1e-9
        widths = narrower


def test_a_grid_stays_coarse_and_protected_widths_are_measured_once(b0) -> None:
    model, groups = b0
    fake = Fake()
    LatencyCosts(model.spec, groups, LatencyTable(measure=fake), SHAPE)
    assert len(fake.asked) == len(set(fake.asked)) < 600
    stems = [shape for shape in fake.asked if shape.kind == "embed" and shape.dims[0] == 3]
    assert [shape.dims for shape in stems] == [(3, 32)]
    hidden = {
        shape.dims[0]
        for shape in fake.asked
        if shape.kind == "depthwise" and shape.sizes[1:3] == (16, 24)
    }
    assert hidden == {16, 32, 64, 96, 128}


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_a_plan_meets_a_rate_of_the_latency(b0, rate: float) -> None:
    model, groups = b0
    found = costs_of(b0)
    weights = loss_weights(layers(model.spec, SHAPE), groups, "latency")
    plan = solve(
        [Limit(found, rate, "latency")], groups, score_channels(model, groups), weights
    )
    widths = np.array([len(plan.keep[group.name]) // group.parts for group in groups])
    assert plan.removed["latency"] == pytest.approx(rate, abs=AIM)
    assert plan.removed["latency"] == pytest.approx(
        1.0 - found.total(widths) / found.total(found.full)
    )


SHAPES = [
    Shape("linear", (1, 4), (8, 16)),
    Shape("norm", (1, 4), (8,)),
    Shape("norm", (1, 9), (8,)),
]


def test_what_a_table_holds_is_not_measured_again(tmp_path: Path) -> None:
    first, second = Fake(), Fake(lambda shape: 99.0)
    table = LatencyTable(folder=tmp_path, measure=first)
    table.require(SHAPES[:2])
    table.require(SHAPES[:2])
    assert sorted(map(str, first.asked)) == sorted(map(str, SHAPES[:2]))
    again = LatencyTable(folder=tmp_path, measure=second)
    again.require(SHAPES)
    assert second.asked == SHAPES[2:]
    assert [again.time_ms(shape) for shape in SHAPES] == [*map(bilinear_ms, SHAPES[:2]), 99.0]
    assert [path.name for path in tmp_path.iterdir()] == [again.path.name]


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    LatencyTable(measure=Fake()).require(SHAPES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["device", "precision", "threads", "torch"])
def test_a_table_of_another_device_precision_threads_or_torch_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    LatencyTable(folder=tmp_path, measure=Fake()).require(SHAPES)
    if other == "threads":
        torch.set_num_threads(2)
    if other == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0.1")
    place = (
        {"device": "meta"}
        if other == "device"
        else {"precision": "bf16"}
        if other == "precision"
        else {}
    )
    fake = Fake()
    LatencyTable(**place, folder=tmp_path, measure=fake).require(SHAPES)
    assert len(fake.asked) == len(SHAPES)
    assert len(list(tmp_path.iterdir())) == 2


def _with(**changes: object) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | changes)


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut off": lambda text: text[:-9],
    "a list": lambda text: "[]",
    "no times": _with(times_ms=None),
    "a time of 0": _with(times_ms={"norm 1x4 8": 0.0}),
    "no number": _with(times_ms={"norm 1x4 8": "fast"}),
    "not finite": _with(times_ms={"norm 1x4 8": float("nan")}),
    "another format": _with(format=0),
    "another device": _with(device="abacus"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_measured_anew_and_written_over(tmp_path: Path, damage: str) -> None:
    table = LatencyTable(folder=tmp_path, measure=Fake())
    table.require(SHAPES)
    good = table.path.read_text(encoding="utf-8")
    table.path.write_text(DAMAGES[damage](good), encoding="utf-8")
    fake = Fake()
    LatencyTable(folder=tmp_path, measure=fake).require(SHAPES)
    assert len(fake.asked) == len(SHAPES)
    assert table.path.read_text(encoding="utf-8") == good


def test_bytes_that_are_no_text_are_a_damaged_table_too(tmp_path: Path) -> None:
    table = LatencyTable(folder=tmp_path, measure=Fake())
    tmp_path.joinpath(table.path.name).write_bytes(b"\xff\xfe\x00")
    LatencyTable(folder=tmp_path, measure=Fake()).require(SHAPES)
    assert json.loads(table.path.read_text(encoding="utf-8"))["times_ms"].keys() == set(
        map(str, SHAPES)
    )


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    fake = Fake()
    with pytest.raises(OSError, match="could not be written") as caught:
        LatencyTable(folder=tmp_path / "file", measure=fake).require(SHAPES)
    assert str(caught.value).count(". ") == 0
    assert fake.asked == []


def test_a_shape_that_was_never_required_is_not_guessed() -> None:
    with pytest.raises(KeyError):
        LatencyTable(measure=Fake()).time_ms(SHAPES[0])


def test_tables_lie_where_the_system_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "segprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "segprune"


def test_measuring_times_every_kind_of_step_and_moves_no_random_state(small_spec: Spec) -> None:
    coarse = with_kv_reductions(small_spec, {"encoder.stages.0.blocks.0.attn": 2})
    shapes = [
        step.shape
        for spec in (coarse, replace(small_spec, branch_dims=None))
        for step in steps(spec, SHAPE)
    ]
    by_kind = list({shape.kind: shape for shape in shapes}.values())
    assert len(by_kind) == 13
    state, calls = torch.get_rng_state(), []
    times = measure_shapes(by_kind, HERE, lambda done, total: calls.append((done, total)))
    assert all(0.0 < ms < 1e4 for ms in times)
    assert calls[0][0] == 1
    assert calls[-1][0] == calls[-1][1]
    assert torch.equal(torch.get_rng_state(), state)


def test_predictions_are_tied_to_what_is_measured_of_the_same_network(
    b0, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dense, found = b0[0], nn.Identity(), costs_of(b0)
    predicted = found.total(found.full)

    def measured(
        models: Sequence[nn.Module], shape: tuple[int, int], **options: object
    ) -> list[Latency]:
        assert (shape, options["device"], options["precision"]) == (
            SHAPE,
            torch.device("cpu"),
            "fp32",
        )
        return [
            took(1.3 * predicted * (2.0 if network is dense else 1.0)) for network in models
        ]

    monkeypatch.setattr(costs, "measure_latency", measured)
    assert dense_in_predicted_ms(dense, model, found) == pytest.approx(2.0 * predicted)


def took(ms: float) -> Latency:
    return summarise([ms] * 3, batch=1, precision="fp32", threads=1)


class Timed(nn.Module):
    def __init__(self, ms: float) -> None:
        super().__init__()
        self.ms = ms


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's latency is what it says."""

    def measure(models: Sequence[Timed], shape: tuple[int, int], **_: object) -> list[Latency]:
        return [took(model.ms) for model in models]

    monkeypatch.setattr(target, "measure_latency", measure)


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_constant_that_no_cut_removes_and_a_factor_are_corrected_by_measuring(
    share: float,
) -> None:
    asked = []

    def prune(target_ms: float) -> tuple[nn.Module, float]:
        asked.append(target_ms)
        return Timed(4.0 + 1.2 * target_ms), target_ms

    met = meet(share, Timed(100.0), 100.0, prune, SHAPE, HERE)
    assert met.share == pytest.approx(share, rel=0.05)
    assert (met.pruned.median_ms, met.dense.median_ms) == (met.network.ms, 100.0)
    assert 1 < met.tries == len(asked) <= 3
    assert asked[0] == pytest.approx(100.0 * share)
    assert met.predicted_ms == asked[-1]


@pytest.mark.usefixtures("timed")
def test_what_the_dense_network_would_be_predicted_is_all_that_the_first_plan_needs() -> None:
    met = meet(0.5, Timed(100.0), 80.0, lambda ms: (Timed(1.25 * ms), ms), SHAPE, HERE)
    assert (met.tries, met.predicted_ms, met.share) == (1, 40.0, 0.5)


@pytest.mark.usefixtures("timed")
def test_a_target_that_is_never_measured_is_refused_with_the_least_and_the_rate_that_reaches_it() -> (
    None
):
    with pytest.raises(ValueError, match="could not be met") as caught:
        meet(0.2, Timed(100.0), 100.0, lambda ms: (Timed(max(30.0, 2 * ms)), ms), SHAPE, HERE)
    for fact in (
        "0.200",
        "within 5%",
        "in 3 measured tries",
        "0.300 of it",
        "30.00 of 100.00 ms",
        "a rate of 0.700",
    ):
        assert fact in str(caught.value)


@pytest.mark.usefixtures("timed")
def test_where_nothing_gets_faster_no_rate_below_zero_is_named() -> None:
    with pytest.raises(ValueError, match="could not be met") as caught:
        meet(0.5, Timed(100.0), 100.0, lambda ms: (Timed(101.0), ms), SHAPE, HERE)
    said = str(caught.value)
    assert "101.00 of 100.00 ms" in said
    assert "a rate of params or macs" in said
    assert "-" not in said


@pytest.mark.usefixtures("timed")
def test_a_correction_out_of_the_plan_s_reach_is_refused_with_what_was_reached() -> None:
    def prune(target_ms: float) -> tuple[nn.Module, float]:
        if target_ms < 40.0:
            raise ValueError("Rate 0.7 is out of reach.")
        return Timed(1.5 * target_ms), target_ms

    with pytest.raises(
        ValueError, match=r"in 1 measured try; .* 0\.750 of it, .* a rate of 0\.250"
    ):
        meet(0.5, Timed(100.0), 100.0, prune, SHAPE, HERE)
    with pytest.raises(ValueError, match=r"Rate 0\.7 is out of reach"):
        meet(0.3, Timed(100.0), 100.0, prune, SHAPE, HERE)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, 2.0])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(
        ValueError, match=f"is {share:g} of the dense network's; give a share between 0 and 1"
    ):
        meet(share, Timed(1.0), 1.0, lambda ms: (Timed(ms), ms), SHAPE, HERE)


@pytest.mark.parametrize("budgets", [{"latency": 0.3}, {"latency": 0.1, "params": 0.6}])
def test_the_pruner_meets_a_latency_alone_and_beside_other_budgets(
    b0, budgets: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, table = SegFormer(b0[0].spec).train(), LatencyTable(measure=Fake())

    def ms(model: SegFormer) -> float:
        whole = LatencyCosts(model.spec, (), table, SHAPE)
        return whole.total(whole.full)

    def measure(models: Sequence[SegFormer], *_: object, **__: object) -> list[Latency]:
        return [took(1.1 * ms(model)) for model in models]

    monkeypatch.setattr(decider, "dense_in_predicted_ms", lambda dense, model, costs: ms(dense))
    monkeypatch.setattr(target, "measure_latency", measure)
    work = Pruner(dense, budgets, latency_table=table, repair=False)
    pruned = work.prune(torch.empty(1, 3, *SHAPE, device="meta"))
    left = {"latency": ms(pruned) / ms(dense)}
    left["params"] = sum(p.numel() for p in pruned.parameters()) / sum(
        p.numel() for p in dense.parameters()
    )
    for unit, rate in budgets.items():
        assert left[unit] < 1 - rate + 0.05
        assert work.plan.removed[unit] == pytest.approx(1 - left[unit], abs=0.02)
    assert any(
        left[unit] == pytest.approx(1 - rate, abs=0.05) for unit, rate in budgets.items()
    )
    assert dense.training  # left as it was


def test_the_latency_of_a_network_that_is_no_segformer_is_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4))
    with pytest.raises(
        ValueError,
        match=r"Sequential is not a stock SegFormer; its latency cannot be predicted: ask",
    ):
        Pruner(network, 0.5, rate_of="latency").prune(torch.zeros(1, 4))
