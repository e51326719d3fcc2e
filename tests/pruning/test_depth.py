import copy
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import segprune
from segprune.checkpoint import load, save
from segprune.fold import fold_decoder
from segprune.model import DropPath, SegFormer
from segprune.pruning.depth import (
    branch_costs,
    branch_scores,
    branches,
    choose,
    noise,
    prune_depth,
    remove,
    without,
)
from segprune.pruning.groups import find_groups
from segprune.pruning.prepare import stock_spec
from segprune.pruning.pruner_l1 import L1Pruner
from segprune.pruning.repair import repair
from segprune.pruning.surgery import read_spec
from segprune.spec import Spec, spec_from_dict, spec_to_dict, standard_spec
from segprune.stats import count
from tests.pruning.cutting import STEM, cut_copy, plan_of

STAGE = "encoder.stages.{}.blocks.{}"
ATTN, MLP = STAGE.format(0, 0) + ".attn", STAGE.format(1, 0) + ".mlp"
BLOCK, LAST_MLP = STAGE.format(2, 0), STAGE.format(2, 1) + ".mlp"
SOME = [ATTN, MLP, BLOCK, LAST_MLP]
EACH = [
    f"{STAGE.format(i, j)}.{kind}"
    for i, j in ((0, 0), (0, 1), (1, 0), (2, 0))
    for kind in ("attn", "mlp")
]
EACH += [STAGE.format(0, 1), BLOCK]


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(2, 3, 64, 64).double(), torch.randn(1, 3, 64, 96).double()]


def replaced(model: SegFormer, outputs: dict[str, Tensor | float]) -> SegFormer:
    """A copy whose branches of these names put out something else: a number times their output, or a vector."""
    model = copy.deepcopy(model)
    for name, value in outputs.items():
        other = (
            (lambda o, v: v.expand_as(o)) if isinstance(value, Tensor) else (lambda o, v: v * o)
        )
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, other=other, v=value: other(o, v)
        )
    return model


def singles(names: Iterable[str]) -> list[str]:
    return [
        s
        for name in names
        for s in ([name] if name.endswith(("attn", "mlp")) else [f"{name}.attn", f"{name}.mlp"])
    ]


@torch.no_grad()
def make_constant(model: SegFormer, name: str) -> None:
    module = model.get_submodule(name)
    (module.proj if name.endswith("attn") else module.fc2).weight.zero_()


# What can be removed, and what is left


def test_every_branch_is_listed_as_it_runs_and_whole_blocks_behind_theirs(
    small_spec: Spec,
) -> None:
    found = branches(small_spec)
    assert [b.name for b in found[:3]] == [
        f"{STAGE.format(0, 0)}.attn",
        f"{STAGE.format(0, 0)}.mlp",
        STAGE.format(0, 0),
    ]
    assert len(found) == 3 * sum(len(stage.blocks) for stage in small_spec.stages)
    bare = without(small_spec, [ATTN, LAST_MLP])
    names = {branch.name for branch in branches(bare)}
    assert {b.name for b in found} - names == {
        ATTN,
        LAST_MLP,
        STAGE.format(0, 0),
        STAGE.format(2, 1),
    }


@pytest.mark.parametrize("names", [*([name] for name in EACH), SOME, []], ids=str)
def test_removing_equals_putting_out_zero(small_model: SegFormer, names: list[str]) -> None:
    x = torch.randn(2, 3, 64, 96).double()
    removed = remove(small_model, names)
    assert (
        removed(x) - replaced(small_model, dict.fromkeys(singles(names), 0.0))(x)
    ).abs().max() <= 1e-10
    if names:
        assert (removed(x) - small_model(x)).abs().max() > 1e-3


def test_a_block_that_loses_both_branches_goes_and_nothing_of_a_branch_stays(
    small_model: SegFormer,
) -> None:
    removed = remove(small_model, SOME)
    assert (
        removed.spec
        == without(small_model.spec, SOME)
        == read_spec(removed)
        == stock_spec(removed)
    )
    blocks = removed.encoder.stages[2].blocks
    assert len(blocks) == 1
    assert {name for name, _ in blocks[0].named_children()} == {"norm1", "attn", "drop_path"}
    assert (
        removed.spec.stages[2].blocks[0].num_heads,
        removed.spec.stages[2].blocks[0].ffn_dim,
    ) == (4, 0)
    assert not removed.spec.stages[0].blocks[0].has_attention


def test_the_network_it_was_taken_from_stays_as_it_was(
    small_model: SegFormer, batches: list[Tensor]
) -> None:
    before, spec = copy.deepcopy(small_model.state_dict()), small_model.spec
    small_model.train()
    small_model.encoder.requires_grad_(False)
    removed = remove(small_model, SOME, batches)
    branch_scores(small_model, batches)
    assert small_model.spec == spec
    assert small_model.training
    assert removed.training
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in small_model.state_dict().items()
    )
    assert {p.requires_grad for p in removed.encoder.parameters()} == {False}
    assert all(p.requires_grad for p in removed.decode_head.parameters())
    assert not any(module._forward_hooks for module in small_model.modules())


def test_stochastic_depth_is_spread_over_the_blocks_that_remain() -> None:
    model = SegFormer(standard_spec("b0", 2))
    removed = remove(model, [STAGE.format(3, 1), STAGE.format(0, 0)])
    rates = [module.rate for module in removed.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1 * i / 5 for i in range(6)])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_saved_one_comes_back_and_trains_to_the_same_bits(
    small_model: SegFormer, suffix: str, tmp_path: Path
) -> None:
    removed = remove(small_model.float(), SOME)
    save(removed, tmp_path / f"a{suffix}")
    loaded = load(tmp_path / f"a{suffix}")
    assert loaded.spec == removed.spec
    first, second = trained(removed), trained(loaded)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def trained(model: SegFormer) -> dict[str, Tensor]:
    """The weights of a copy after two steps with stochastic depth on."""
    model = copy.deepcopy(model).train()
    torch.manual_seed(3)
    for i, module in enumerate(m for m in model.modules() if isinstance(m, DropPath)):
        assert module.rate == 0.0
        module.rate = 0.1 * i
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        F.cross_entropy(
            model(torch.randn(2, 3, 64, 64)), torch.randint(5, (2, 64, 64))
        ).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimiser.step()
    return model.state_dict()


def test_a_spec_with_missing_branches_survives_json(small_spec: Spec) -> None:
    spec = without(small_spec, SOME)
    assert spec_from_dict(spec_to_dict(spec)) == spec


# The mean that stays


@pytest.mark.parametrize(
    "names",
    [*([name] for name in EACH), SOME, [STAGE.format(0, 0), STAGE.format(0, 1) + ".attn"]],
)
def test_a_constant_output_goes_into_a_bias_exactly(
    small_model: SegFormer, batches: list[Tensor], names: list[str]
) -> None:
    for name in singles(names):
        make_constant(small_model, name)
    removed = remove(small_model, names, batches)
    x = torch.randn(2, 3, 96, 64).double()
    assert (removed(x) - small_model(x)).abs().max() <= 1e-10
    assert (remove(small_model, names)(x) - small_model(x)).abs().max() > 1e-3


def test_what_stays_is_the_mean_over_all_images_and_positions(
    small_model: SegFormer, batches: list[Tensor]
) -> None:
    seen: list[Tensor] = []
    hook = small_model.get_submodule(MLP).register_forward_hook(
        lambda m, i, o: seen.append(o.flatten(0, 1))
    )
    for x in batches:
        small_model(x)
    hook.remove()
    x = torch.randn(1, 3, 64, 64).double()
    wanted = replaced(small_model, {MLP: torch.cat(seen).mean(0)})(x)
    assert (remove(small_model, [MLP], batches)(x) - wanted).abs().max() <= 1e-10


# Scores


@torch.no_grad()
def test_a_score_is_how_far_the_probabilities_move(
    small_model: SegFormer, batches: list[Tensor]
) -> None:
    scores = branch_scores(small_model, batches)
    assert list(scores) == [branch.name for branch in branches(small_model.spec)]
    for name in (ATTN, BLOCK, LAST_MLP, STAGE.format(3, 0)):
        wanted = 0.0
        for x in batches:
            dense = small_model.parts(x)[1]
            # the last block of a stage is scored too, though it cannot be removed
            other = replaced(small_model, dict.fromkeys(singles([name]), 0.0)).parts(x)[1]
            moved = F.kl_div(
                other.log_softmax(1), dense.log_softmax(1), reduction="none", log_target=True
            ).sum(1)
            wanted += float(moved.mean()) * len(x) / 3
        assert scores[name] == pytest.approx(wanted, rel=1e-9)


def test_what_puts_out_nothing_scores_nothing(
    small_model: SegFormer, batches: list[Tensor]
) -> None:
    for name in (ATTN, BLOCK + ".attn", BLOCK + ".mlp"):
        make_constant(small_model, name)
        writer = small_model.get_submodule(
            name + (".proj" if name.endswith("attn") else ".fc2")
        )
        torch.nn.init.zeros_(writer.bias)
    scores = branch_scores(small_model, batches)
    nothing = {name for name, score in scores.items() if score < 1e-12}
    assert nothing == {ATTN, BLOCK, BLOCK + ".attn", BLOCK + ".mlp"}


def test_progress_counts_the_blocks_of_every_batch(
    small_model: SegFormer, batches: list[Tensor]
) -> None:
    seen: list[tuple[int, int]] = []
    branch_scores(
        small_model,
        [*batches, batches[0][:0]],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 12) for i in range(1, 13)]


def test_noise_is_the_same_for_the_same_seed_and_standardised_with_structure_of_all_sizes() -> (
    None
):
    (batch,) = noise((64, 96), count=8)
    assert batch.shape == (8, 3, 64, 96)
    assert torch.equal(batch, noise((64, 96), count=8)[0])
    assert not torch.equal(batch, noise((64, 96), count=8, seed=1)[0])
    assert abs(float(batch.mean())) < 1e-5
    assert float(batch.std()) == pytest.approx(1.0, abs=1e-3)
    assert float((batch[..., 1:] * batch[..., :-1]).mean()) > 0.7  # neighbours are alike


# The choice


def random_scores(spec: Spec, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {branch.name: float(rng.exponential()) for branch in branches(spec)}


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_greedy_and_keeps_to_the_share(unit: str, seed: int) -> None:
    spec = standard_spec("b2", 8)
    scores, shape = random_scores(spec, seed), (64, 96)
    costs, whole = branch_costs(spec, unit, shape)
    chosen = choose(spec, scores, 0.2, unit=unit, input_shape=shape)
    ratio = {name: scores[name] / costs[name] for name in scores}
    assert [ratio[name] for name in chosen] == sorted(ratio[name] for name in chosen)
    before, after = count(spec, shape), count(without(spec, chosen), shape)
    gone = (
        before.parameters - after.parameters if unit == "params" else before.macs - after.macs
    )
    assert gone == sum(costs[name] for name in chosen) <= 0.2 * whole
    for name in scores.keys() - set(
        chosen
    ):  # whatever was cheaper than one that was taken did not fit any more
        cheaper = [other for other in chosen if ratio[other] < ratio[name]]
        overlaps = set(singles([name])) & set(singles(cheaper))
        overshoots = sum(costs[other] for other in cheaper) + costs[name] > 0.2 * whole
        assert overlaps or overshoots or empties(spec, [*cheaper, name])


def empties(spec: Spec, names: list[str]) -> bool:
    try:
        without(spec, names)
    except ValueError:
        return True
    return False


def test_the_costs_of_all_branches_are_what_the_network_costs_less_without_them(
    small_spec: Spec,
) -> None:
    for unit, name in itertools.product(("params", "macs"), EACH):
        costs, whole = branch_costs(small_spec, unit, (64, 96))
        before, after = (
            count(small_spec, (64, 96)),
            count(without(small_spec, [name]), (64, 96)),
        )
        pair = (
            (before.parameters, after.parameters)
            if unit == "params"
            else (before.macs, after.macs)
        )
        assert (whole, whole - costs[name]) == pair


def test_branches_go_first_and_channels_after_them(
    small_model: SegFormer, batches: list[Tensor]
) -> None:
    dense = small_model.float()
    images = [batch.float() for batch in batches]
    shorter, names = prune_depth(
        dense, 0.2, images, input_shape=(64, 64), ignore=("stages.*.attn.qk",)
    )
    assert all(name.endswith(".mlp") for name in names)  # whose queries and keys stay

    before, after = (count(model.spec, (64, 64)).parameters for model in (dense, shorter))
    assert 0 < 1 - after / before <= 0.2
    options = {"input_shape": (64, 64), "round_to": 1, "repair": False}
    pruned = segprune.prune(shorter, 0.5, **options).network
    left = count(stock_spec(pruned), (64, 64)).parameters
    assert 1 - left / after == pytest.approx(0.5, abs=0.02)


def test_without_images_noise_stands_in_for_them(small_model: SegFormer) -> None:
    shorter, names = prune_depth(small_model.float(), 0.1, input_shape=(64, 64), unit="macs")
    assert shorter.spec == without(small_model.spec, names)


def test_the_last_of_a_stage_and_branches_without_a_score_stay(small_spec: Spec) -> None:
    scores = {
        name: score
        for name, score in random_scores(small_spec, 0).items()
        if not name.startswith(BLOCK)
    }
    with pytest.raises(
        ValueError, match="is out of reach for depth; the most that can be removed here is"
    ) as caught:
        choose(small_spec, scores, 0.99)
    most = float(re.search(r"here is ([\d.]+)", str(caught.value))[1])
    chosen = choose(small_spec, scores, most)
    left = without(small_spec, chosen)
    assert [len(stage.blocks) for stage in left.stages] == [1, 1, 1, 1] or left.stages[
        2
    ].blocks[0].has_attention
    assert not any(name.startswith(BLOCK) for name in chosen)
    assert left.stages[2].blocks[0] == small_spec.stages[2].blocks[0]


# What comes after


def test_channels_of_what_remains_are_cut_to_the_budget(small_model: SegFormer) -> None:
    bare = remove(small_model, SOME)
    pruned = L1Pruner(bare, 0.3, round_to=1, repair=False).prune()
    assert stock_spec(pruned) == pruned.spec
    left = (
        count(stock_spec(pruned), (64, 64)).parameters / count(bare.spec, (64, 64)).parameters
    )
    assert left == pytest.approx(0.7, abs=0.01)
    assert [
        [(b.has_attention, b.has_ffn) for b in stage.blocks] for stage in pruned.spec.stages
    ] == [[(b.has_attention, b.has_ffn) for b in stage.blocks] for stage in bare.spec.stages]
    assert pruned(torch.randn(1, 3, 64, 64).double()).isfinite().all()


def test_only_the_groups_of_what_is_gone_are_missing(small_model: SegFormer) -> None:
    x = torch.zeros(1, 3, 64, 64).double()
    before = {g.name: g for g in find_groups(small_model, x, {STEM}, heads=True).groups}
    names = [ATTN, MLP, LAST_MLP]
    after = find_groups(remove(small_model, names), x, {STEM}, heads=True)
    assert after.unsupported == {}
    groups = {group.name: group for group in after.groups}
    lost = {f"{ATTN}.qk", f"{ATTN}.v", f"{ATTN}.reduction", f"{MLP}.ffn", f"{LAST_MLP}.ffn"}
    assert before.keys() - groups.keys() == lost
    assert groups.keys() <= before.keys()
    gone = (ATTN, MLP, LAST_MLP, STAGE.format(1, 0) + ".norm2", STAGE.format(2, 1) + ".norm2")
    for name, group in groups.items():
        left = {(m.layer, m.side) for m in before[name].members if not m.layer.startswith(gone)}
        assert {(m.layer, m.side) for m in group.members} == left


def test_repair_of_cut_channels_works_on_what_remains(
    small_model: SegFormer, batches: list[Tensor]
) -> None:
    dense = fold_decoder(remove(small_model, SOME))
    groups = list(find_groups(dense, torch.zeros(1, 3, 64, 64).double(), {STEM}).groups)
    plan = plan_of(groups)
    pruned = cut_copy(dense, groups, plan)
    repaired = repair(pruned, dense, groups, plan, batches)
    assert repaired.spec == pruned.spec
    x = batches[0]
    assert (repaired(x) - dense(x)).norm() < 0.8 * (pruned(x) - dense(x)).norm()


# Refusals


def test_a_name_that_is_no_branch_is_refused(small_model: SegFormer) -> None:
    message = (
        r"^encoder\.stages\.0\.patch_embed is no branch of this network; "
        r"give names such as encoder\.stages\.0\.blocks\.0\.attn\.$"
    )
    with pytest.raises(ValueError, match=message):
        remove(small_model, ["encoder.stages.0.patch_embed"])
    with pytest.raises(ValueError, match=message):
        choose(small_model.spec, {"encoder.stages.0.patch_embed": 1.0}, 0.1)


def test_a_stage_keeps_a_block(small_model: SegFormer) -> None:
    message = r"^Stage 4 would lose its last block; a stage keeps at least one with attention or FFN, so remove fewer\.$"
    with pytest.raises(ValueError, match=message):
        remove(small_model, [STAGE.format(3, 0)])


def test_scores_need_images_of_the_right_shape(small_model: SegFormer) -> None:
    with pytest.raises(
        ValueError,
        match=r"^Scoring branches needs images, and there are none; give a few dozen, lab",
    ):
        branch_scores(small_model, [])
    with pytest.raises(ValueError, match=r"takes images as B 3 H W, got shape \(3, 64, 64\)"):
        branch_scores(small_model, [torch.zeros(3, 64, 64)])
    with pytest.raises(
        ValueError,
        match=r"^An image holds values that are not finite; check how the images are norm",
    ):
        remove(small_model, [ATTN], [torch.full((1, 3, 64, 64), torch.nan)])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_outside_0_and_1_is_refused(small_spec: Spec, share: float) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^The share for depth is {share:g}; it must be above 0 and below 1\.$",
    ):
        choose(small_spec, random_scores(small_spec, 0), share)


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_a_share_below_the_cheapest_branch_is_refused_with_what_that_has(unit: str) -> None:
    spec = standard_spec("b0", 8)
    scores = random_scores(spec, 0)
    with pytest.raises(
        ValueError, match=f"A share of 0.0001 of the {unit} is too small for depth; the cheap"
    ) as caught:
        choose(spec, scores, 1e-4, unit=unit)
    least = float(
        re.search(r"may be removed is ([\d.]+) of them, so ask for more\.$", str(caught.value))[
            1
        ]
    )
    assert len(choose(spec, scores, least, unit=unit)) == 1


def test_scores_that_are_no_numbers_and_unknown_units_are_refused(small_spec: Spec) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^The score of {re.escape(ATTN)} is nan; scores must be finite, so check wei",
    ):
        choose(small_spec, {ATTN: float("nan")}, 0.1)
    with pytest.raises(ValueError, match=r"^Unit 'flops' is unknown; choose params or macs\.$"):
        choose(small_spec, {ATTN: 1.0}, 0.1, unit="flops")
