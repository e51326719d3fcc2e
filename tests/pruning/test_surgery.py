import copy

import pytest
import torch
from torch import nn

from segprune.fold import fold_decoder
from segprune.model import Attention, SegFormer
from segprune.pruning.groups import Group, find_groups
from segprune.pruning.plan import Plan
from segprune.pruning.surgery import cut_channels
from tests.pruning.cutting import STEM, cut_copy, plan_of

X = torch.zeros(1, 3, 64, 64).double()


def groups_of(model: SegFormer, kinds: set[str]) -> list[Group]:
    return [
        group
        for group in find_groups(model, X, {STEM}, heads="head" in kinds).groups
        if group.kind in kinds
    ]


@torch.no_grad()
def zero_channels(model: SegFormer, groups: list[Group], plan: Plan) -> None:
    """Silence what the plan removes, by hand for each kind: in the network of full width."""
    for group in groups:
        owner = model.get_submodule(group.name.rpartition(".")[0])
        gone = sorted(set(range(group.num_channels)) - set(plan.keep[group.name]))
        match group.kind:
            case "ffn":
                zero_rows(owner.fc1, gone)
                zero_rows(owner.dwconv, gone)
            case "qk":
                zero_rows(owner.q, gone)
                zero_rows(owner.k, gone)
            case "v":
                zero_rows(owner.v, gone)
            case "head":
                dim = owner.v.out_features // owner.num_heads
                zero_rows(owner.v, [head * dim + i for head in gone for i in range(dim)])
            case "decoder":
                zero_rows(owner.norm, gone)
            case "branch":
                norm = group.name.replace("branches", "branch_norms")  # of a head that has some
                zero_rows(
                    model.get_submodule(norm if model.spec.head == "conv" else group.name), gone
                )
            case _:
                raise AssertionError(group.kind)


def zero_rows(layer: nn.Module, rows: list[int]) -> None:
    layer.weight[rows] = 0.0
    layer.bias[rows] = 0.0


@pytest.mark.parametrize(
    "kinds",
    [
        {"ffn"},
        {"qk"},
        {"v"},
        {"head"},
        {"decoder"},
        {"head", "qk", "v"},
        {"ffn", "qk", "v", "head", "decoder"},
    ],
    ids=lambda kinds: "+".join(sorted(kinds)),
)
def test_cutting_equals_zeroing(small_model: SegFormer, kinds: set[str]) -> None:
    model = fold_decoder(small_model)
    groups = groups_of(model, kinds)
    assert {group.kind for group in groups} == kinds
    plan = plan_of(groups)
    pruned = cut_copy(model, groups, plan)
    x = torch.randn(2, 3, 64, 96).double()
    dense = model(x)
    zero_channels(model, groups, plan)
    zeroed = model(x)
    assert (zeroed - dense).abs().max() > 1e-3
    assert (pruned(x) - zeroed).abs().max() <= 1e-10


@pytest.mark.parametrize("head", ["mlp", "conv"])
def test_cutting_equals_zeroing_in_a_head_that_is_not_folded(
    small_model: SegFormer, conv_model: SegFormer, head: str
) -> None:
    model = {"mlp": small_model, "conv": conv_model}[head]
    groups = groups_of(model, {"branch", "decoder", "ffn"})
    plan = plan_of(groups)
    pruned = cut_copy(model, groups, plan)
    zero_channels(model, groups, plan)
    x = torch.randn(2, 3, 64, 64).double()
    assert (pruned(x) - model(x)).abs().max() <= 1e-10


@pytest.mark.parametrize("head", ["mlp", "folded", "conv"])
@pytest.mark.parametrize(
    "kinds",
    [
        {"reduction"},
        {"stage"},
        {"stage", "reduction", "ffn", "qk", "v", "head", "decoder", "branch"},
    ],
)
def test_a_cut_network_is_what_its_spec_builds(
    small_model: SegFormer, conv_model: SegFormer, kinds: set[str], head: str
) -> None:
    model = {"mlp": small_model, "folded": fold_decoder(small_model), "conv": conv_model}[head]
    groups = groups_of(model, kinds)
    pruned = cut_copy(model, groups, plan_of(groups))
    assert pruned.spec != model.spec
    rebuilt = SegFormer(pruned.spec).double().eval()
    rebuilt.load_state_dict(pruned.state_dict())
    x = torch.randn(1, 3, 65, 90).double()
    assert torch.equal(rebuilt(x), pruned(x))
    settings = {name: module.extra_repr() for name, module in rebuilt.named_modules()}
    assert {name: module.extra_repr() for name, module in pruned.named_modules()} == settings


def test_a_stage_keeps_exactly_the_chosen_channels(small_model: SegFormer) -> None:
    groups = [
        g for g in groups_of(small_model, {"stage"}) if g.name == "encoder.stages.1.width"
    ]
    plan = plan_of(groups)
    kept = list(plan.keep["encoder.stages.1.width"])
    old, new = (
        small_model.encoder.stages[1],
        cut_copy(small_model, groups, plan).encoder.stages[1],
    )
    assert torch.equal(new.patch_embed.proj.weight, old.patch_embed.proj.weight[kept])
    assert torch.equal(new.norm.bias, old.norm.bias[kept])
    old_block, new_block = old.blocks[0], new.blocks[0]
    assert torch.equal(new_block.attn.sr.weight, old_block.attn.sr.weight[:, kept])
    assert torch.equal(
        new_block.attn.k.weight, old_block.attn.k.weight
    )  # reads the reduction, not the stage
    assert torch.equal(new_block.attn.proj.weight, old_block.attn.proj.weight[kept])
    assert torch.equal(new_block.mlp.fc1.weight, old_block.mlp.fc1.weight[:, kept])


def test_the_attention_scale_is_kept(small_model: SegFormer) -> None:
    groups = groups_of(small_model, {"qk", "head"})
    pruned = cut_copy(small_model, groups, plan_of(groups))
    scales = {n: m.qk_scale for n, m in small_model.named_modules() if isinstance(m, Attention)}
    assert {
        n: m.qk_scale for n, m in pruned.named_modules() if isinstance(m, Attention)
    } == scales
    assert [[b.qk_scale for b in s.blocks] for s in pruned.spec.stages] == [
        [b.qk_scale for b in s.blocks] for s in small_model.spec.stages
    ]


def test_a_plan_that_keeps_all_changes_nothing(small_model: SegFormer) -> None:
    groups = groups_of(small_model, {"ffn", "head", "stage"})
    plan = Plan({group.name: tuple(range(group.num_channels)) for group in groups})
    pruned = cut_copy(small_model, groups, plan)
    assert pruned.spec == small_model.spec
    assert all(
        torch.equal(t, pruned.state_dict()[name])
        for name, t in small_model.state_dict().items()
    )


def test_frozen_parameters_stay_frozen_and_own_their_memory(small_model: SegFormer) -> None:
    small_model.encoder.requires_grad_(False)
    groups = groups_of(small_model, {"ffn", "stage"})
    pruned = cut_copy(small_model, groups, plan_of(groups))
    frozen = {
        name for name, parameter in pruned.named_parameters() if not parameter.requires_grad
    }
    assert frozen == {
        name for name, _ in pruned.named_parameters() if name.startswith("encoder.")
    }
    assert all(
        p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes
        for p in pruned.parameters()
    )


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm2d(12), (2, 12, 3, 3)),
        (nn.BatchNorm2d(12, affine=False), (2, 12, 3, 3)),
        (nn.BatchNorm2d(12, track_running_stats=False), (2, 12, 3, 3)),
        (nn.BatchNorm2d(12, affine=False, track_running_stats=False), (2, 12, 3, 3)),
    ],
)
def test_every_kind_of_batch_norm_is_cut_as_its_channels(
    norm: nn.Module, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), norm, nn.ReLU(), nn.Conv2d(12, 2, 1))
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    groups = find_groups(model, x, set()).groups
    plan = Plan({"0": (1, 4, 5, 11)})
    pruned = copy.deepcopy(model).eval()
    cut_channels(pruned, groups, plan)
    gone = [c for c in range(12) if c not in plan.keep["0"]]
    with torch.no_grad():
        model[3].weight[:, gone] = 0.0
    torch.testing.assert_close(pruned(x), model.eval()(x))
    assert pruned[1].num_features == 4


def test_a_layer_norm_without_weights_is_cut() -> None:
    model = nn.Sequential(
        nn.Linear(3, 12), nn.LayerNorm(12, elementwise_affine=False), nn.Linear(12, 2)
    )
    groups = find_groups(model, torch.randn(1, 5, 3), set()).groups
    cut_channels(model, groups, Plan({"0": (0, 3, 7)}))
    assert model[1].normalized_shape == (3,)
    assert model(torch.randn(1, 5, 3)).shape == (1, 5, 2)


@pytest.mark.parametrize("bias", [True, False])
def test_a_transposed_convolution_is_cut_on_both_sides(bias: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.ConvTranspose2d(6, 10, 3, stride=2, bias=bias),
        nn.ReLU(),
        nn.Conv2d(10, 2, 1),
    )
    x = torch.randn(1, 3, 5, 7)
    groups = find_groups(model, x, set()).groups
    pruned = copy.deepcopy(model)
    cut_channels(pruned, groups, Plan({"0": (0, 2, 5), "1": (1, 2, 8, 9)}))
    with torch.no_grad():
        model[1].weight[[1, 3, 4]] = 0.0
        model[3].weight[:, [0, 3, 4, 5, 6, 7]] = 0.0
    torch.testing.assert_close(pruned(x), model(x))
    assert (pruned[1].in_channels, pruned[1].out_channels) == (3, 4)
