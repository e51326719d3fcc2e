import copy
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segprune.fold import fold_decoder
from segprune.model import Attention, SegFormer
from segprune.pruning.groups import Group, find_groups
from segprune.pruning.trace import width_of

X = torch.zeros(1, 3, 64, 64).double()
STEM = "encoder.stages.0.patch_embed.proj"
CLASSIFIER = "decode_head.classifier"


def groups_of(
    model: nn.Module, protected: set[str] = frozenset({STEM, CLASSIFIER}), **options
) -> dict[str, Group]:
    grouping = find_groups(model, X, protected, **options)
    assert grouping.unsupported == {}
    assert len({group.name for group in grouping.groups}) == len(grouping.groups)
    return {group.name: group for group in grouping.groups}


def sides(group: Group) -> set[tuple[str, str]]:
    return {(member.layer, member.side) for member in group.members}


def test_a_folded_network_has_the_groups_of_the_design(small_model: SegFormer) -> None:
    groups = groups_of(fold_decoder(small_model))
    kinds = Counter(group.kind for group in groups.values())
    assert kinds == {"stage": 3, "decoder": 1, "ffn": 6, "qk": 6, "v": 6, "reduction": 5}
    assert "encoder.stages.0.width" not in groups  # the first convolution is protected


def test_heads_are_groups_where_there_are_several(small_model: SegFormer) -> None:
    heads = {
        name: g for name, g in groups_of(small_model, heads=True).items() if g.kind == "head"
    }
    assert {name: group.num_channels for name, group in heads.items()} == {
        "encoder.stages.1.blocks.0.attn.heads": 2,
        "encoder.stages.2.blocks.0.attn.heads": 4,
        "encoder.stages.2.blocks.1.attn.heads": 4,
        "encoder.stages.3.blocks.0.attn.heads": 4,
    }


def test_a_stage_width_reaches_every_layer_on_the_residual_path(small_model: SegFormer) -> None:
    group = groups_of(fold_decoder(small_model))["encoder.stages.2.width"]
    stage = "encoder.stages.2"
    expected = {
        (f"{stage}.patch_embed.proj", "out"),
        (f"{stage}.patch_embed.norm", "out"),
        (f"{stage}.norm", "out"),
    }
    for i in range(2):
        block = f"{stage}.blocks.{i}"
        expected |= {(f"{block}.{norm}", "out") for norm in ("norm1", "norm2")}
        expected |= {(f"{block}.attn.{layer}", "in") for layer in ("q", "sr")}
        expected |= {
            (f"{block}.attn.proj", "out"),
            (f"{block}.mlp.fc1", "in"),
            (f"{block}.mlp.fc2", "out"),
        }
    expected |= {("encoder.stages.3.patch_embed.proj", "in"), ("decode_head.branches.2", "in")}
    assert sides(group) == expected
    assert group.num_channels == 40


def test_without_reduction_keys_and_values_read_the_stage(small_model: SegFormer) -> None:
    group = groups_of(fold_decoder(small_model))["encoder.stages.3.width"]
    assert {(f"encoder.stages.3.blocks.0.attn.{layer}", "in") for layer in "qkv"} <= sides(
        group
    )


def test_the_groups_inside_a_block(small_model: SegFormer) -> None:
    groups = groups_of(small_model)
    attn, mlp = "encoder.stages.1.blocks.0.attn", "encoder.stages.1.blocks.0.mlp"
    assert sides(groups[f"{mlp}.ffn"]) == {
        (f"{mlp}.fc1", "out"),
        (f"{mlp}.dwconv", "out"),
        (f"{mlp}.fc2", "in"),
    }
    assert sides(groups[f"{attn}.qk"]) == {(f"{attn}.q", "out"), (f"{attn}.k", "out")}
    assert sides(groups[f"{attn}.v"]) == {(f"{attn}.v", "out"), (f"{attn}.proj", "in")}
    assert sides(groups[f"{attn}.reduction"]) == {
        (f"{attn}.sr", "out"), (f"{attn}.norm", "out"), (f"{attn}.k", "in"), (f"{attn}.v", "in")
    }  # fmt: skip
    assert (groups[f"{attn}.qk"].parts, groups[f"{attn}.qk"].slots) == (2, 12)
    assert (groups[f"{attn}.v"].parts, groups[f"{attn}.v"].slots) == (2, 10)


def test_the_decode_width_of_a_folded_head(small_model: SegFormer) -> None:
    group = groups_of(fold_decoder(small_model))["decode_head.width"]
    expected = {(f"decode_head.branches.{i}", "out") for i in range(4)}
    assert sides(group) == expected | {
        ("decode_head.norm", "out"),
        ("decode_head.classifier", "in"),
    }


def test_branches_lie_in_the_fuse_convolution_last_stage_first(small_model: SegFormer) -> None:
    groups = groups_of(small_model)
    dims, offset = small_model.spec.branch_dims, 0
    for i in (3, 2, 1, 0):
        group = groups[f"decode_head.branches.{i}"]
        assert group.kind == "branch"
        (fuse,) = (m for m in group.members if m.layer == "decode_head.fuse")
        by_channel = dict(zip(fuse.channels.tolist(), fuse.positions.tolist(), strict=True))
        assert by_channel == {c: offset + c for c in range(dims[i])}
        offset += dims[i]


def test_a_branch_of_a_conv_head_is_a_group_with_its_batch_norm(conv_model: SegFormer) -> None:
    groups, head = groups_of(conv_model), "decode_head"
    for i, width in enumerate(conv_model.spec.branch_dims):
        group = groups[f"{head}.branches.{i}"]
        assert (group.kind, group.num_channels) == ("branch", width)
        assert sides(group) == {
            (f"{head}.branches.{i}", "out"), (f"{head}.branch_norms.{i}", "out"), (f"{head}.fuses.{i}", "in")
        }  # fmt: skip
    expected = {(f"{head}.fuses.{i}", "out") for i in range(4)}
    assert sides(groups[f"{head}.width"]) == expected | {
        (f"{head}.norm", "out"),
        (f"{head}.classifier", "in"),
    }
    assert (f"{head}.branches.2", "in") in sides(groups["encoder.stages.2.width"])


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("heads", [False, True])
def test_every_side_of_every_layer_is_covered_once(
    small_model: SegFormer, conv_model: SegFormer, heads: bool, conv: bool
) -> None:
    model = conv_model if conv else fold_decoder(small_model)
    groups = groups_of(model, heads=heads)
    covered: Counter = Counter()
    for group in groups.values():
        for member in group.members:
            assert member.positions.shape == member.channels.shape
            assert set(member.channels.tolist()) == set(range(group.num_channels))
            if group.kind != "head":  # heads lie across the qk and v groups
                covered.update((member.layer, member.side, int(p)) for p in member.positions)
    assert set(covered.values()) == {1}
    modules = dict(model.named_modules())
    for layer, side in {(layer, side) for layer, side, _ in covered}:
        assert sum((layer, side) == key[:2] for key in covered) == width_of(
            modules[layer], side
        )


def test_a_protected_layer_s_outputs_are_in_no_group(small_model: SegFormer) -> None:
    free = groups_of(small_model)
    protected = {
        STEM,
        CLASSIFIER,
        "encoder.stages.1.blocks.0.mlp.fc1",
        "encoder.stages.2.blocks.1.attn.k",
    }
    left = groups_of(small_model, protected)
    assert free.keys() - left.keys() == {
        "encoder.stages.1.blocks.0.mlp.ffn",
        "encoder.stages.2.blocks.1.attn.qk",
    }


def test_the_outputs_of_the_network_stay_without_being_named(small_model: SegFormer) -> None:
    groups = groups_of(small_model, set())
    assert "encoder.stages.0.width" in groups
    assert not any((CLASSIFIER, "out") in sides(group) for group in groups.values())


@pytest.mark.parametrize("frozen", ["encoder", "decode_head", ""])
def test_frozen_layers_are_found_and_stay_frozen(small_model: SegFormer, frozen: str) -> None:
    expected = groups_of(small_model)
    small_model.get_submodule(frozen).requires_grad_(False)
    before = {
        name: parameter.requires_grad for name, parameter in small_model.named_parameters()
    }
    found = groups_of(small_model)
    assert {name: sides(group) for name, group in found.items()} == {
        name: sides(group) for name, group in expected.items()
    }
    assert {
        name: parameter.requires_grad for name, parameter in small_model.named_parameters()
    } == before


def test_the_network_is_left_as_it_was(small_model: SegFormer) -> None:
    small_model.train()
    small_model.encoder.stages[1].eval()
    modules = dict(small_model.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    state = copy.deepcopy(small_model.state_dict())
    groups_of(small_model)
    assert dict(small_model.named_modules()) == modules
    assert {name: module.training for name, module in modules.items()} == modes
    assert all(
        torch.equal(state[name], tensor) for name, tensor in small_model.state_dict().items()
    )
    assert all(not module._forward_hooks for module in modules.values())
    assert all(parameter.grad is None for parameter in small_model.parameters())


class Residual(nn.Module):
    """Depth-wise convolution on a residual, then a concatenation with the stem."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 1)
        self.middle = middle
        self.back = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x + self.back(self.middle(self.wide(x)))
        return self.head(torch.cat([x, y], dim=1))


def test_a_depthwise_convolution_goes_with_its_inputs() -> None:
    groups = groups_of(Residual(nn.Conv2d(16, 16, 3, padding=1, groups=16)).double(), set())
    (group,) = (group for group in groups.values() if ("wide", "out") in sides(group))
    assert sides(group) == {("wide", "out"), ("middle", "out"), ("back", "in")}
    assert len(group.members) == 3


def test_a_concatenation_of_tied_maps_is_cut_in_both_places() -> None:
    groups = groups_of(Residual(nn.ReLU()).double(), set())
    (group,) = (group for group in groups.values() if ("stem", "out") in sides(group))
    assert sides(group) == {("stem", "out"), ("back", "out"), ("wide", "in"), ("head", "in")}
    places = [m for m in group.members if m.layer == "head"]
    positions = np.concatenate([m.positions for m in places])
    channels = np.concatenate([m.channels for m in places])
    assert sorted(zip(positions.tolist(), channels.tolist(), strict=True)) == [
        (p, p % 8) for p in range(16)
    ]


@pytest.mark.parametrize(
    ("middle", "name"),
    [
        (nn.GroupNorm(4, 16), "GroupNorm"),
        (nn.GroupNorm(4, 16, affine=False), "GroupNorm"),
        (nn.InstanceNorm2d(16), "InstanceNorm2d"),
        (nn.PReLU(16), "PReLU"),
        (nn.Conv2d(16, 16, 3, padding=1, groups=4), "Conv2d"),
    ],
)
def test_what_cannot_be_cut_is_named_and_left_alone(middle: nn.Module, name: str) -> None:
    grouping = find_groups(Residual(middle).double(), X, set())
    assert grouping.unsupported == {"middle": name}
    assert all(("wide", "out") not in sides(group) for group in grouping.groups)


def test_channels_that_a_pixel_shuffle_moves_into_space_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 2, 1)
    ).double()
    grouping = find_groups(model, X, set())
    assert grouping.unsupported == {"2": "Conv2d"}
    assert [group.name for group in grouping.groups] == ["2"]


class DoubledAttention(Attention):
    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return 2 * super().forward(x, height, width)


def test_a_subclass_of_attention_is_not_taken_for_ours(small_model: SegFormer) -> None:
    small_model.encoder.stages[1].blocks[0].attn.__class__ = DoubledAttention
    groups = find_groups(small_model, X, {STEM}).groups
    assert "encoder.stages.1.blocks.0.attn.qk" not in {group.name for group in groups}


def test_without_torch_pruning_the_pip_command_is_named(
    small_model: SegFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(
        ImportError,
        match="needs torch-pruning, which is not installed; run: pip install torch-pruning",
    ):
        find_groups(small_model, X, set())
