from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segprune.fold import fold_decoder
from segprune.model import Attention, SegFormer
from segprune.pruning.budget.allocation import allocate
from segprune.pruning.budget.costs import Costs, mix_costs
from segprune.pruning.budget.curves import choose_widths
from segprune.pruning.budget.rate import Limit
from segprune.pruning.budget.work import time_costs
from segprune.pruning.curves import Curve, measure_curves
from segprune.pruning.curves.elimination import eliminate
from segprune.pruning.curves.losses import Statistics, work_out_losses
from segprune.pruning.curves.places import Place, find_places, probe_logits, watch
from segprune.pruning.groups import Group, find_groups
from segprune.pruning.options import PruneOptions
from segprune.pruning.plan import plan_rows
from segprune.pruning.pruner import Pruner
from segprune.stats import layers
from tests.pruning.cutting import STEM


def groups_of(model: SegFormer, *, heads: bool = False) -> tuple[Group, ...]:
    x = torch.zeros(1, 3, 64, 64).to(model.decode_head.classifier.weight)
    return find_groups(model, x, {STEM}, heads=heads).groups


@pytest.fixture
def model(small_model: SegFormer) -> SegFormer:
    return fold_decoder(small_model)


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(4, 3, 64, 64).double(), torch.randn(2, 3, 64, 96).double()]


@pytest.mark.parametrize("kind", ["mlp", "folded", "conv"])
def test_a_curve_is_zero_at_the_full_width_and_never_falls_towards_narrower_ones(
    kind: str, small_model: SegFormer, conv_model: SegFormer, batches: list[Tensor]
) -> None:
    model = {"mlp": small_model, "folded": fold_decoder(small_model), "conv": conv_model}[kind]
    groups = groups_of(model)
    widths = [range(1, group.slots + 1) for group in groups]
    for group, curve in zip(
        groups, measure_curves(model, groups, batches, widths), strict=True
    ):
        assert curve.widths[-1] == group.slots
        assert curve.losses[-1] == 0.0
        assert curve.losses[0] > 0.0, group.name
        assert list(curve.losses) == sorted(curve.losses, reverse=True)


def test_curves_are_the_same_for_the_same_images_and_the_model_stays_as_it_was(
    model: SegFormer, batches: list[Tensor]
) -> None:
    groups = groups_of(model)
    widths = [(group.slots // 2, group.slots) for group in groups]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls: list[tuple[int, int]] = []
    first = measure_curves(
        model, groups, batches, widths, progress=lambda done, total: calls.append((done, total))
    )
    assert first == measure_curves(model, groups, batches, widths)
    assert calls == [(i + 1, 6) for i in range(6)]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_of_large_images_a_part_is_looked_at(
    model: SegFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [group for group in groups_of(model) if group.kind == "decoder"]
    batches = [torch.randn(3, 3, 96, 160).double()]
    widths = [(group.slots // 2, group.slots) for group in groups]
    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr("segprune.pruning.curves.measure.CROP", 64)

    def parts(x: Tensor) -> tuple[list[Tensor], Tensor]:
        sizes.append(tuple(x.shape[2:]))
        return SegFormer.parts(model, x)

    monkeypatch.setattr(model, "parts", parts)
    measure_curves(model, groups, batches, widths)
    assert set(sizes) == {(64, 64)}


def test_whole_heads_have_no_curve_and_are_refused_by_name(
    model: SegFormer, batches: list[Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"heads.*kind head.*protect"):
        find_places(model, groups_of(model, heads=True))


def seen_at(
    model: SegFormer, places: Sequence[Place], batches: list[Tensor]
) -> tuple[dict[Place, Statistics], ...]:
    """Statistics of every place, and what passed there, as rows."""
    statistics = {place: Statistics() for place in places}
    rows: dict[Place, list[tuple[Tensor, Tensor | None]]] = {place: [] for place in places}
    with watch(model, places) as passing:
        for image in torch.cat([batch[..., :64] for batch in batches]).split(1):
            logits = model.parts(image.requires_grad_())[1]
            gradients = probe_logits(logits, passing, torch.Generator().manual_seed(0))
            for place, item in passing.items():
                statistics[place].add(model, place, item, gradients[place])
                rows[place].append((item.x[0], None if item.keys is None else item.keys[0]))
    return statistics, rows  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["ffn", "v", "decoder", "reduction", "stage"])
def test_what_is_lost_of_a_layer_is_what_least_squares_leaves(
    kind: str, model: SegFormer, batches: list[Tensor]
) -> None:
    group = next(group for group in groups_of(model) if group.kind == kind)
    places = find_places(model, [group])
    statistics, rows = seen_at(model, places, batches)
    width = group.slots // 2
    losses = work_out_losses(
        model, group, places, [statistics[p] for p in places], [width], damping=1e-9
    )
    for place, lost in zip(places, losses.lost, strict=True):
        x = torch.cat([x for x, _ in rows[place]])
        x = x - x.mean(0)
        error = x @ lost[0].double().T  # N out
        # What is lost of each output is uncorrelated with what is kept: the map times the covariance has that rank.
        explained = x.T @ error
        rank = int(torch.linalg.matrix_rank(lost[0].double(), rtol=1e-4))
        assert rank <= x.shape[1] - (width * group.parts - (kind in ("stage", "reduction")))
        if losses.order is not None:
            kept = list(losses.order[-width:])
            assert explained[kept].abs().max() < 1e-4 * explained.abs().max()
            best = torch.linalg.lstsq(x[:, kept], x).solution
            weight = model.get_submodule(place.layer).weight.detach().flatten(1)  # type: ignore[union-attr, operator]
            wanted = (x - x[:, kept] @ best) @ weight.T
            assert torch.allclose(error, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_what_is_lost_of_queries_is_what_the_truncated_products_lack(
    model: SegFormer, batches: list[Tensor]
) -> None:
    group = next(group for group in groups_of(model) if group.kind == "qk" and group.parts > 1)
    (place,) = find_places(model, [group])
    statistics, rows = seen_at(model, [place], batches)
    lost = (
        work_out_losses(
            model, group, [place], [statistics[place]], range(1, group.slots + 1), 1e-9
        )
        .lost[0]
        .double()
    )
    attention = model.get_submodule(place.layer)
    assert isinstance(attention, Attention)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(1, (attention.num_heads, -1)).transpose(0, 1)  # h N d

    q = torch.stack([split(x) for x, _ in rows[place]])  # images h N d
    k = torch.stack([split(y) for _, y in rows[place] if y is not None])
    k = k - k.mean(2, keepdim=True)
    for width, matrix in enumerate(lost, start=1):
        changed = torch.stack([split(x @ matrix.T) for x, _ in rows[place]])
        # Balanced truncation in the metric of both: the error is that of the singular values left out.
        root_q, root_k = (torch.linalg.cholesky((t.mT @ t).sum(0)) for t in (q, k))
        values = torch.linalg.svdvals(root_q.mT @ root_k)[:, width:]
        keys = torch.linalg.cholesky((k.mT @ k).sum(0))
        moment = (changed.mT @ changed).sum(0)
        error = (keys.mT @ moment @ keys).diagonal(dim1=1, dim2=2).sum(1)
        assert torch.allclose(
            error, values.square().sum(1), rtol=1e-4, atol=1e-6 * float(error.max()) + 1e-12
        )


def test_probes_predict_the_divergence_that_a_small_error_causes(model: SegFormer) -> None:
    image = torch.randn(1, 3, 64, 64).double()
    layer = model.get_submodule("encoder.stages.1.blocks.0.mlp.fc2")
    place = Place(0, "channels", "encoder.stages.1.blocks.0.mlp.fc2", (0,))
    generator = torch.Generator().manual_seed(1)
    with watch(model, [place]) as passing:
        logits = model.parts(image.clone().requires_grad_())[1]
        error = 1e-2 * torch.randn_like(passing[place].y)
        samples = []
        for _ in range(400):
            gradient = probe_logits(logits, passing, generator)[place]
            samples.append(0.5 * (gradient * error).sum() ** 2)
    predicted = torch.stack(samples).mean()

    handle = layer.register_forward_hook(lambda module, inputs, output: output + error)
    changed = model.parts(image)[1]
    handle.remove()
    p = logits.softmax(1)
    measured = (p * (logits.log_softmax(1) - changed.log_softmax(1))).sum(1).mean()
    assert float((predicted / measured).detach()) == pytest.approx(1.0, abs=0.25)


def least_squares_error(x: Tensor, weight: Tensor, metric: Tensor, kept: list[int]) -> float:
    y = x @ weight.T
    residual = y - x[:, kept] @ torch.linalg.lstsq(x[:, kept], y).solution
    return float(torch.einsum("ni,ij,nj->", residual, metric, residual))


def test_elimination_removes_the_channel_whose_loss_is_least_and_solves_the_readers_anew() -> (
    None
):
    x = torch.randn(200, 9).double() @ torch.randn(9, 9).double()
    weight, root = torch.randn(3, 9).double(), torch.randn(3, 3).double()
    metric = root.T @ root
    result = eliminate(x.T @ x / 200, weight, metric, list(range(1, 10)), damping=1e-12)
    assert sorted(result.order.tolist()) == list(range(9))
    kept = list(range(9))
    for gone in result.order.tolist()[:-1]:
        errors = {
            j: least_squares_error(x, weight, metric, [i for i in kept if i != j]) for j in kept
        }
        assert errors[gone] == pytest.approx(min(errors.values()), rel=1e-6)
        kept.remove(gone)
        lost = result.lost[len(kept)]
        error = torch.einsum("ni,ij,nj->", x @ lost.T, metric, x @ lost.T)
        assert float(error) == pytest.approx(errors[gone], rel=1e-6)


def test_a_channel_that_others_repeat_is_removed_first_and_costs_nothing() -> None:
    x = torch.randn(300, 70).double()
    x[:, 69] = x[:, 3] - 2.0 * x[:, 5]
    result = eliminate(
        x.T @ x / 300,
        torch.randn(4, 70).double(),
        torch.eye(4).double(),
        [1, 69, 70],
        damping=1e-9,
    )
    assert int(result.order[0]) in (3, 5, 69)
    error = (x @ result.lost[69].T).square().mean()
    assert float(error) < 1e-6
    assert float((x @ result.lost[1].T).square().mean()) > 1.0


@pytest.fixture
def priced(model: SegFormer) -> tuple[tuple[Group, ...], Costs, Costs, Costs]:
    groups, rows = groups_of(model), layers(model.spec, (64, 64))
    return (
        groups,
        Costs(rows, groups, "params"),
        Costs(rows, groups, "macs"),
        time_costs(rows, groups),
    )


def falling(groups: Sequence[Group], scale: Sequence[float]) -> list[Curve]:
    """Losses that rise with the square of what is removed."""
    curves = []
    for group, factor in zip(groups, scale, strict=True):
        widths = tuple(range(1, group.slots + 1))
        curves.append(
            Curve(widths, tuple(factor * (1.0 - w / group.slots) ** 2 for w in widths))
        )
    return curves


def test_widths_meet_the_budgets_and_the_tightest_one_closely(
    priced: tuple[tuple[Group, ...], Costs, Costs, Costs],
) -> None:
    groups, params, macs, work = priced
    curves = falling(groups, np.random.default_rng(0).uniform(0.1, 10.0, len(groups)).tolist())
    allowed = [curve.widths for curve in curves]
    for limits in (
        [Limit(params, 0.5)],
        [Limit(macs, 0.7, "macs")],
        [Limit(params, 0.3), Limit(macs, 0.6, "macs")],
        [Limit(params, 0.6), Limit(macs, 0.1, "macs")],
    ):
        widths = allocate(curves, limits, allowed, mix_costs([(0.5, params), (0.5, work)]))
        over = [limit.removed(widths) - limit.rate for limit in limits]
        assert min(over) == pytest.approx(0.0, abs=0.002)


def test_a_group_that_loses_more_keeps_more_and_a_fixed_one_stays(
    priced: tuple[tuple[Group, ...], Costs, Costs, Costs],
) -> None:
    groups, params, _, _ = priced
    ffn = [g for g, group in enumerate(groups) if group.kind == "ffn"]
    scale = [100.0 if g == ffn[0] else 1.0 for g in range(len(groups))]
    curves = falling(groups, scale)
    allowed = [curve.widths for curve in curves]
    allowed[ffn[1]] = (7,)
    widths = allocate(curves, [Limit(params, 0.5)], allowed, mix_costs([(1.0, params)]))
    shares = [int(w) / group.slots for w, group in zip(widths, groups, strict=True)]
    assert shares[ffn[0]] > max(shares[g] for g in ffn[1:])
    assert widths[ffn[1]] == 7


def test_the_widths_are_the_best_there_are_where_all_can_be_tried(
    priced: tuple[tuple[Group, ...], Costs, Costs, Costs],
) -> None:
    groups, params, _, _ = priced
    few = [g for g, group in enumerate(groups) if group.kind in ("ffn", "decoder")][:3]
    curves = falling(groups, [2.0, *[1.0] * (len(groups) - 1)])
    allowed: list[Sequence[int]] = [(group.slots,) for group in groups]
    for g in few:
        allowed[g] = range(4, groups[g].slots + 1, 4)
    limit = Limit(params, 0.05)
    widths = allocate(curves, [limit], allowed, mix_costs([(1.0, params)]))

    def loss(trial: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
        return sum(curve.at(int(w)) for curve, w in zip(curves, trial, strict=True))

    best = np.inf
    for choice in np.ndindex(*[len(allowed[g]) for g in few]):
        trial = widths.copy()
        trial[few] = [allowed[g][i] for g, i in zip(few, choice, strict=True)]
        if limit.removed(trial) >= limit.removed(widths):
            best = min(best, loss(trial))
    assert loss(widths) <= 1.02 * best


def test_time_is_saved_where_the_loss_is_not_felt(
    priced: tuple[tuple[Group, ...], Costs, Costs, Costs],
) -> None:
    """The same curves, hardly felt and felt: with the first the network is faster, and as small."""
    groups, params, _, work = priced
    limit = Limit(params, 0.4)
    times = []
    for scale in (1e-7, 1.0):
        curves = falling(groups, [scale] * len(groups))
        widths = choose_widths(curves, [limit], [curve.widths for curve in curves], work)
        assert limit.removed(widths) == pytest.approx(0.4, abs=0.005)
        times.append(work.total(widths))
    assert times[0] < 0.97 * times[1]


def test_time_is_charged_for_hidden_layers_and_not_for_how_narrow_heads_are(
    priced: tuple[tuple[Group, ...], Costs, Costs, Costs],
) -> None:
    groups, _, macs, work = priced
    attention = [i for i, layer in enumerate(work.layers) if layer.kind == "attention"]
    assert not work.coefficients[:, attention].any()
    whole = work.total(work.full)
    for g, group in enumerate(groups):
        narrow = work.full.copy()
        narrow[g] = max(1, narrow[g] // 2)
        saved, products = whole - work.total(narrow), macs.total(macs.full) - macs.total(narrow)
        assert saved >= 0.0
        if group.kind in ("ffn", "decoder"):
            assert saved > 1.5 * products


def test_a_pruner_with_images_decides_by_curves_and_meets_the_rate(
    small_model: SegFormer,
) -> None:
    images = [torch.randn(3, 3, 64, 64)]
    pruner = Pruner(small_model.float(), 0.5, images=images, round_to=4, input_shape=(64, 64))
    pruned = pruner.prune()
    assert pruner.plan is not None
    assert pruner.plan.decided_by == "curves"
    assert pruner.plan.removed["params"] == pytest.approx(0.5, abs=0.01)
    assert pruner.plan.losses.keys() == pruner.plan.keep.keys()
    params = [sum(p.numel() for p in network.parameters()) for network in (small_model, pruned)]
    assert 1 - params[1] / params[0] == pytest.approx(0.5, abs=0.01)

    groups = pruner.prepare().groups
    shares = {"params": {group.name: 0.25 for group in groups}}
    rows = plan_rows(pruner.plan, groups, shares)
    assert {row["share_of_params"] for row in rows} == {0.25}
    assert all(row["expected_loss"] >= 0.0 for row in rows)


def test_the_widths_of_a_plan_carried_out_keep_the_same_channels(
    small_model: SegFormer,
) -> None:
    images = [torch.randn(3, 3, 64, 64)]
    options: dict[str, Any] = {"images": images, "input_shape": (64, 64)}
    plan, groups = Pruner(small_model.float(), 0.5, round_to=4, **options).make_plan()
    widths = {row["name"]: row["width"] for row in plan_rows(plan, groups, {})}
    again, _ = Pruner(small_model, plan=widths, **options).make_plan()
    chosen = [group.name for group in groups if group.kind in ("ffn", "decoder")]
    assert {name: again.keep[name] for name in chosen} == {
        name: plan.keep[name] for name in chosen
    }


@pytest.mark.parametrize(
    ("options", "with_images", "decided_by"),
    [
        ({"repair": False}, False, "scores"),
        ({"plan_by": "scores"}, True, "scores"),
        ({"repair": False}, True, "scores"),
        ({"pruning_method": "l2"}, True, "scores"),
        ({"scope": "local"}, True, "scores"),
        ({"plan_by": "curves"}, True, "curves"),
    ],
)
def test_curves_are_for_where_there_are_images_and_no_options_for_scores(
    options: dict[str, Any], with_images: bool, decided_by: str, small_model: SegFormer
) -> None:
    images = [torch.randn(1, 3, 64, 64)] if with_images else []
    pruner = Pruner(
        small_model.float(), 0.4, images=images, round_to=4, input_shape=(64, 64), **options
    )
    plan, _ = pruner.make_plan()
    assert plan.decided_by == decided_by


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan_by": "curve"}, "`plan_by` is 'curve'.*curves, scores"),
        ({"plan_by": "curves", "repair": False}, "`plan_by` curves.*`repair` False"),
        (
            {"plan_by": "curves", "heads": True},
            "`heads` cannot be combined with `plan_by` curves",
        ),
        (
            {"plan_by": "curves", "pruning_method": "taylor"},
            "`pruning_method`.*`plan_by` curves",
        ),
        ({"plan_by": "curves", "plan": {"a": 1}}, "`plan_by` has no effect with `plan`"),
    ],
)
def test_what_contradicts_curves_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneOptions(**options)


def test_curves_of_a_network_that_is_not_stock_are_refused(small_model: SegFormer) -> None:
    wrapped = nn.Sequential(small_model)
    with pytest.raises(ValueError, match="Sequential is not a stock SegFormer; plan it by"):
        Pruner(wrapped, 0.4, plan_by="curves").make_plan(torch.zeros(1, 3, 64, 64).double())
