import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segprune.checkpoint import build, from_state_dict, load, save
from segprune.fold import fold_decoder
from segprune.model import Attention, SegFormer
from segprune.pruning import pruner_l1
from segprune.pruning.groups import find_groups
from segprune.pruning.options import RateOf
from segprune.pruning.prepare import stock_spec
from segprune.pruning.trace import width_of
from segprune.spec import Head, Spec, standard_spec
from segprune.stats import count, layers
from tests.dialects import reference

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

# What is tested here is the cut. The repair and its images have tests of their own.
L1Pruner = partial(pruner_l1.L1Pruner, repair=False)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def removed(dense: nn.Module, pruned: nn.Module) -> float:
    return 1 - num_parameters(pruned) / num_parameters(dense)


def macs(model: nn.Module, *shape: int) -> float:
    """As torch counts them, on the meta device, where fused attention is counted too."""
    model = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, *shape, device="meta"))
    return counter.get_total_flops() / 2


def logits_of(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output["logits"]


def assert_trains(model: nn.Module, *shape: int) -> None:
    """Forward and backward at another size than it was traced with; every parameter is reached."""
    logits = logits_of(model.train()(torch.randn(2, 3, *shape)))
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ] == []


# A stock SegFormer


@pytest.mark.parametrize(("variant", "rate"), [("b0", 0.3), ("b0", 0.7), ("b2", 0.5)])
def test_the_parameters_fall_by_the_rate(variant: str, rate: float) -> None:
    model = SegFormer(standard_spec(variant, 8))
    pruner = L1Pruner(model, pruning_rate=rate)
    pruned = pruner.prune(X)
    assert removed(model, pruned) == pytest.approx(rate, abs=0.01)
    assert pruner.plan.removed["params"] == pytest.approx(removed(model, pruned))
    assert count(pruned.spec, (64, 64)).parameters == num_parameters(pruned)
    assert count(pruned.spec, (160, 96)).macs == pytest.approx(macs(pruned, 160, 96), rel=1e-3)
    SegFormer(pruned.spec).load_state_dict(pruned.state_dict())
    assert_trains(pruned, 64, 96)


@pytest.mark.parametrize(("rate_of", "rate"), [("params", 0.3), ("macs", 0.5)])
def test_a_network_of_mmsegmentation_is_pruned_by_the_rate(
    rate_of: RateOf, rate: float, trained_like: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model = build(from_state_dict(reference("mmseg", trained_like).state_dict()))
    pruned = L1Pruner(model, rate, rate_of=rate_of).prune(X)
    assert isinstance(pruned, SegFormer)
    gone = {
        "params": removed(model, pruned),
        "macs": 1 - macs(pruned, 64, 64) / macs(model, 64, 64),
    }
    assert gone[rate_of] == pytest.approx(rate, abs=0.01)
    assert pruned.spec.head == "conv"
    assert min(pruned.spec.branch_dims) < 256
    assert count(pruned.spec, (160, 96)).macs == pytest.approx(macs(pruned, 160, 96), rel=1e-3)
    save(pruned, tmp_path / "a.pth")
    again = load(tmp_path / "a.pth")
    assert again.spec == pruned.spec
    assert torch.equal(again(X), pruned(X))
    assert_trains(again, 64, 96)


@pytest.mark.parametrize("option", ["keep_decoder", "uniform"])
def test_what_a_conv_head_cannot_be_asked_is_refused(
    conv_model: SegFormer, option: str
) -> None:
    with pytest.raises(ValueError, match=f"^`{option}` is for decode heads as published"):
        L1Pruner(conv_model, 0.5, **{option: True})


@pytest.mark.parametrize("keep_decoder", [False, True])
def test_the_macs_fall_by_the_rate_at_the_given_size(keep_decoder: bool) -> None:
    model = SegFormer(standard_spec("b0", 8))
    pruner = L1Pruner(model, 0.7, rate_of="macs", keep_decoder=keep_decoder)
    pruned = pruner.prune(torch.empty(2, 3, 256, 320))
    assert 1 - macs(pruned, 256, 320) / macs(model, 256, 320) == pytest.approx(0.7, abs=0.01)


def test_the_channels_fall_by_the_rate() -> None:
    model = SegFormer(standard_spec("b0", 8))
    pruner = L1Pruner(model, 0.5, rate_of="channels")
    pruner.prune()
    groups = find_groups(fold_decoder(model), X, set()).groups
    dense = sum(group.num_channels for group in groups if group.name in pruner.plan.keep)
    assert 1 - sum(map(len, pruner.plan.keep.values())) / dense == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "options", [{}, {"keep_decoder": True}, {"scope": "local"}, {"round_to": 1, "heads": True}]
)
def test_the_given_network_is_left_as_it_was(small_model: SegFormer, options: dict) -> None:
    model = small_model.train()
    model.encoder.stages[0].eval()
    state, spec = copy.deepcopy(model.state_dict()), model.spec
    modes = [module.training for module in model.modules()]
    pruned = L1Pruner(model, 0.5, **({"round_to": 2} | options)).prune()
    assert pruned is not model
    assert not {p.data_ptr() for p in pruned.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }
    assert model.spec is spec
    assert stock_spec(model) == spec
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_mode_and_dtype_follow_into_the_pruned_network(small_model: SegFormer) -> None:
    for training in (True, False):
        pruned = L1Pruner(small_model.train(training), 0.5, round_to=2).prune()
        assert all(module.training == training for module in pruned.modules())
        assert all(p.dtype == torch.float64 for p in pruned.parameters())


def test_the_first_convolution_and_the_classifier_keep_their_outputs(
    small_model: SegFormer,
) -> None:
    pruned = L1Pruner(small_model, 0.8, round_to=1).prune()
    assert pruned.spec.stages[0].width == 16
    assert pruned.spec.num_classes == 5
    assert pruned.encoder.stages[0].patch_embed.proj.in_channels == 3


def test_ignored_layers_keep_their_outputs(small_model: SegFormer) -> None:
    ignored = [
        small_model.encoder.stages[1].blocks[0].mlp.fc1,
        small_model.encoder.stages[2].blocks[0].attn,
    ]
    pruned = L1Pruner(small_model, 0.5, ignored_layers=ignored, round_to=1).prune()
    old, new = small_model.spec.stages, pruned.spec.stages
    assert new[1].blocks[0].ffn_dim == old[1].blocks[0].ffn_dim
    assert replace(new[2].blocks[0], ffn_dim=0) == replace(old[2].blocks[0], ffn_dim=0)
    assert new[2].width == old[2].width  # the attention's last layer writes to it
    assert removed(small_model, pruned) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("", ["fuse", "branches.0", "branches.3"]),
        (".fuse", ["fuse"]),
        (".branches.1", ["branches.1"]),
    ],
)
def test_an_ignored_layer_that_folding_would_remove_stays(
    small_model: SegFormer, layer: str, names: list[str]
) -> None:
    ignored = small_model.get_submodule(f"decode_head{layer}")
    head = L1Pruner(small_model, 0.4, ignored_layers=[ignored], round_to=1).prune().decode_head
    for name in names:
        assert width_of(head.get_submodule(name), "out") == width_of(
            small_model.decode_head.get_submodule(name), "out"
        )


def test_collect_ignored_layers_may_be_overridden(small_model: SegFormer) -> None:
    class Careful(pruner_l1.L1Pruner):
        def _collect_ignored_layers(self) -> list[nn.Module]:
            return [
                *super()._collect_ignored_layers(),
                *(m for m in self.model.modules() if isinstance(m, Attention)),
            ]

    class Careless(pruner_l1.L1Pruner):
        def _collect_ignored_layers(self) -> list[nn.Module]:
            return []

    careful = Careful(small_model, 0.2, round_to=1, repair=False).prune().spec
    for old, new in zip(small_model.spec.stages, careful.stages, strict=True):
        assert [(b.num_heads, b.qk_dim, b.v_dim, b.reduction_dim) for b in new.blocks] == [
            (b.num_heads, b.qk_dim, b.v_dim, b.reduction_dim) for b in old.blocks
        ]
    careless = Careless(small_model, 0.7, round_to=1, repair=False).prune().spec
    assert careless.stages[0].width < 16
    assert careless.num_classes == 5


def test_keep_decoder_leaves_the_head_unfolded(small_model: SegFormer) -> None:
    pruned = L1Pruner(small_model, 0.5, keep_decoder=True, round_to=1).prune()
    assert len(pruned.spec.branch_dims) == 4
    assert removed(small_model, pruned) == pytest.approx(0.5, abs=0.01)
    x = torch.randn(1, 3, 65, 64).double()
    torch.testing.assert_close(fold_decoder(pruned)(x), pruned(x))


def test_a_head_whose_weights_are_tiny_is_removed() -> None:
    model = SegFormer(standard_spec("b0", 8))
    attention = model.encoder.stages[2].blocks[0].attn
    dead = slice(64, 96)  # the third of five heads
    with torch.no_grad():
        for layer in (attention.q, attention.k, attention.v):
            layer.weight[dead] *= 1e-4
        attention.proj.weight[:, dead] *= 1e-4
    pruner = L1Pruner(model, 0.3, heads=True)
    pruned = pruner.prune()
    assert pruner.plan.keep["encoder.stages.2.blocks.0.attn.heads"] == (0, 1, 3, 4)
    assert (
        pruned.spec.stages[2].blocks[0].num_heads
        == pruned.encoder.stages[2].blocks[0].attn.num_heads
        == 4
    )
    assert removed(model, pruned) == pytest.approx(0.3, abs=0.01)
    assert_trains(pruned, 64, 64)


def test_without_the_option_all_heads_stay(small_model: SegFormer) -> None:
    pruned = L1Pruner(small_model, 0.7, round_to=1).prune()
    assert [[b.num_heads for b in s.blocks] for s in pruned.spec.stages] == [
        [b.num_heads for b in s.blocks] for s in small_model.spec.stages
    ]


def test_the_same_network_is_pruned_the_same_way(small_model: SegFormer) -> None:
    first, second = (L1Pruner(small_model, 0.5, heads=True, round_to=2) for _ in range(2))
    a, b = first.prune().state_dict(), second.prune(torch.randn(1, 3, 512, 512)).state_dict()
    assert first.plan == second.plan
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_pruned_network_is_pruned_again(small_model: SegFormer) -> None:
    once = L1Pruner(small_model, 0.4, round_to=1).prune()
    twice = L1Pruner(once, 0.4, round_to=1).prune()
    assert removed(once, twice) == pytest.approx(0.4, abs=0.01)
    assert stock_spec(twice) == twice.spec


def test_pruning_and_training_take_turns() -> None:
    model = SegFormer(standard_spec("b0", 8))
    for _ in range(5):
        before = model
        model = L1Pruner(model, pruning_rate=0.1).prune(X)
        assert removed(before, model) == pytest.approx(0.1, abs=0.01)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        F.cross_entropy(model.train()(X), torch.zeros(1, 64, 64, dtype=torch.long)).backward()
        optimizer.step()
    assert model(X).isfinite().all()


def test_a_frozen_backbone_is_pruned_too_and_stays_frozen(small_model: SegFormer) -> None:
    expected = L1Pruner(small_model, 0.5, round_to=1).prune().spec
    small_model.encoder.requires_grad_(False)
    pruned = L1Pruner(small_model, 0.5, round_to=1).prune()
    assert pruned.spec == expected
    assert {p.requires_grad for p in pruned.encoder.parameters()} == {False}
    assert {p.requires_grad for p in pruned.decode_head.parameters()} == {True}


def test_rate_zero_folds_the_head_and_removes_nothing_else(small_model: SegFormer) -> None:
    x = torch.randn(1, 3, 64, 96).double()
    pruned = L1Pruner(small_model, 0).prune()
    assert pruned.spec == fold_decoder(small_model).spec != small_model.spec
    assert num_parameters(pruned) < num_parameters(small_model)
    assert (pruned(x) - small_model(x)).abs().max() < 1e-10


@pytest.mark.parametrize("options", [{"keep_decoder": True}, {"uniform": True}])
def test_rate_zero_is_a_plain_copy_where_the_head_is_kept(
    small_model: SegFormer, options: dict[str, bool]
) -> None:
    pruned = L1Pruner(small_model, 0.0, **options).prune()
    assert pruned is not small_model
    assert pruned.spec == small_model.spec
    assert all(
        torch.equal(a, b)
        for a, b in zip(pruned.parameters(), small_model.parameters(), strict=True)
    )


@pytest.mark.parametrize("rate", [-0.1, 1.0, 50.0, float("nan")])
def test_a_rate_outside_zero_to_one_is_refused(small_model: SegFormer, rate: float) -> None:
    with pytest.raises(
        ValueError,
        match=re.escape(f"`pruning_rate` is {rate:g}; it must be at least 0 and below 1"),
    ):
        L1Pruner(small_model, rate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rate_of": "flops"},
            "`rate_of` is 'flops', which is unknown; choose one of params, macs, ",
        ),
        (
            {"scope": "block"},
            "`scope` is 'block', which is unknown; choose one of global, local, isomorphic.",
        ),
        (
            {"round_to": 0},
            "`round_to` is 0; widths are kept multiples of a whole number from 1 up.",
        ),
    ],
)
def test_an_unknown_option_is_refused_with_what_is_allowed(
    small_model: SegFormer, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        L1Pruner(small_model, 0.5, **options)


def test_a_rate_out_of_reach_is_refused_with_the_nearest(small_model: SegFormer) -> None:
    with pytest.raises(
        ValueError,
        match=r"Rate 0\.99 is out of reach; the most that can be removed here is 0\.\d+, ",
    ):
        L1Pruner(small_model, 0.99).prune()


def test_a_rate_below_what_folding_saves_is_refused() -> None:
    message = r"Rate 0\.3 is less than folding the decode head alone removes \(0\.5\d+\); .*`keep_decoder`"
    with pytest.raises(ValueError, match=message):
        L1Pruner(SegFormer(standard_spec("b0", 8)), 0.3, rate_of="macs").prune()


def test_an_example_input_too_small_is_refused(small_model: SegFormer) -> None:
    with pytest.raises(
        ValueError, match="The input is 16×16 pixels; both sides must be at least 32"
    ):
        L1Pruner(small_model, 0.5).prune(torch.zeros(1, 3, 16, 16))


# Networks of the user's own


class ExtraBranch(SegFormer):
    """A convolutional branch that adds detail to the second stage's map."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        width = spec.stages[1].width
        self.detail = nn.Sequential(
            nn.Conv2d(3, 24, 7, stride=4, padding=3, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, width, 3, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = self.encoder(x)
        maps[1] = maps[1] + self.detail(x)
        return F.interpolate(self.decode_head(maps), size=x.shape[2:], mode="bilinear")


class OwnDecoder(nn.Module):
    """Our encoder under a decoder of concatenation and a transposed convolution."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.encoder = SegFormer(spec).encoder
        self.reduce = nn.ModuleList(nn.Conv2d(stage.width, 32, 1) for stage in spec.stages)
        self.mix = nn.Conv2d(128, 48, 3, padding=1)
        self.norm = nn.BatchNorm2d(48)
        self.up = nn.ConvTranspose2d(48, 24, 4, stride=4)
        self.out = nn.Conv2d(24, spec.num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = (-(-x.shape[2] // 4), -(-x.shape[3] // 4))
        maps = [reduce(m) for reduce, m in zip(self.reduce, self.encoder(x), strict=True)]
        x = self.mix(
            torch.cat([F.interpolate(m, size=size, mode="bilinear") for m in maps], dim=1)
        )
        return self.out(F.relu(self.up(F.relu(self.norm(x)))))


class Wrapped(nn.Module):
    """A stock network that takes a dict of inputs and returns one."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.net = SegFormer(spec)

    def forward(self, images: Tensor, gain: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.net(images * gain)}


class Inverted(nn.Module):
    """Convolutions alone: residual, depth-wise, flattened head size free."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU6()
        )
        self.body = nn.Sequential(
            nn.Conv2d(32, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.Conv2d(128, 128, 3, padding=1, groups=128),
            nn.ReLU6(),
            nn.Conv2d(128, 32, 1),
        )
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.out = nn.Conv2d(64, spec.num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(F.relu(self.down(x + self.body(x))))


class WithTorchAttention(nn.Module):
    """torch's own attention between two parts that can be cut."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, stride=8)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(32, 128), nn.Linear(128, 32)
        self.out = nn.Conv2d(32, spec.num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        tokens = tokens + self.fc2(F.gelu(self.fc1(tokens)))
        return self.out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


@pytest.mark.parametrize(("rate_of", "rate"), [("params", 0.6), ("macs", 0.3)])
@pytest.mark.parametrize("build", [ExtraBranch, OwnDecoder, Inverted])
def test_a_user_s_own_network_loses_the_rate(
    build: Callable[[Spec], nn.Module], rate: float, rate_of: str, small_spec: Spec
) -> None:
    model = build(small_spec)
    pruner = L1Pruner(model, rate, rate_of=rate_of, round_to=1)
    pruned = pruner.prune(X)
    found = (
        removed(model, pruned)
        if rate_of == "params"
        else 1 - macs(pruned, 64, 64) / macs(model, 64, 64)
    )
    assert found == pytest.approx(rate, abs=0.01)
    assert pruner.plan.removed[rate_of] == pytest.approx(found, abs=1e-3)
    assert pruned(X).shape == model(X).shape
    assert_trains(pruned, 96, 65)
    assert removed(pruned, L1Pruner(pruned, 0.2, round_to=1).prune(X)) == pytest.approx(
        0.2, abs=0.01
    )


def mask_outputs(model: nn.Module, pruner: L1Pruner) -> None:
    """From now on every layer puts out zeros in the channels that the pruner's plan removes."""
    for group in find_groups(model, X.double(), pruner.protected_names()).groups:
        kept = torch.zeros(group.num_channels, dtype=torch.float64)
        kept[list(pruner.plan.keep[group.name])] = 1.0
        for member in group.members:
            if member.side == "out":
                layer = model.get_submodule(member.layer)
                mask = torch.empty(width_of(layer, "out"), dtype=torch.float64)
                mask[member.positions] = kept[member.channels]
                layer.register_forward_hook(
                    lambda _, inputs, output, mask=mask[:, None, None]: output * mask
                )


@pytest.mark.parametrize("build", [OwnDecoder, Inverted])
def test_cutting_convolutions_equals_zeroing_them(
    build, small_spec: Spec, trained_like
) -> None:
    model = trained_like(build(small_spec).double().eval())
    ignored = (
        [model.encoder] if build is OwnDecoder else []
    )  # a LayerNorm's statistics change when channels go
    pruner = L1Pruner(model, 0.2, ignored_layers=ignored, round_to=1)
    pruned = pruner.prune(X.double())
    x = torch.randn(2, 3, 65, 96).double()
    dense = model(x)
    mask_outputs(model, pruner)
    assert (model(x) - dense).abs().max() > 1e-3
    assert (pruned(x) - model(x)).abs().max() <= 1e-10


def test_the_groups_of_our_attention_are_cut_in_a_user_s_network(small_spec: Spec) -> None:
    pruned = L1Pruner(ExtraBranch(small_spec), 0.5, round_to=1, heads=True).prune(X)
    for old, stage in zip(small_spec.stages, pruned.encoder.stages, strict=True):
        for block, new in zip(old.blocks, stage.blocks, strict=True):
            assert new.attn.q.out_features == new.attn.k.out_features
            assert new.attn.q.out_features % new.attn.num_heads == 0
            assert new.attn.qk_scale == block.qk_scale
    assert any(
        m.q.out_features != m.v.out_features
        for m in pruned.modules()
        if isinstance(m, Attention)
    )


def test_a_user_s_network_in_training_mode_keeps_its_statistics_and_mode(
    small_spec: Spec,
) -> None:
    model = ExtraBranch(small_spec).train()
    state = copy.deepcopy(model.state_dict())
    pruned = L1Pruner(model, 0.4, round_to=1).prune(X)
    assert all(module.training for module in pruned.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    counted = {
        name: t for name, t in pruned.named_buffers() if name.endswith("num_batches_tracked")
    }
    assert counted
    assert not any(t.any() for t in counted.values())


def test_a_frozen_network_of_the_user_s_is_pruned(small_spec: Spec) -> None:
    model = ExtraBranch(small_spec).requires_grad_(False)
    pruned = L1Pruner(model, 0.4, round_to=1).prune(X)
    assert removed(model, pruned) == pytest.approx(0.4, abs=0.01)
    assert not any(p.requires_grad for p in pruned.parameters())


@pytest.mark.parametrize("inputs", [{"images": X}, (X,), [X, 2.0], {"gain": 0.5, "images": X}])
def test_example_inputs_may_be_a_dict_a_tuple_or_a_list(
    inputs: object, small_spec: Spec
) -> None:
    model = Wrapped(small_spec)
    pruned = L1Pruner(model, 0.5, round_to=1).prune(inputs)
    assert removed(model, pruned) == pytest.approx(0.5, abs=0.01)
    assert_trains(pruned, 96, 64)


class Recurrent(nn.Module):
    """Runs one layer three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 96, 3, padding=1)
        self.out = nn.Conv2d(96, 4, 1)
        self.wide, self.narrow = nn.Conv2d(16, 96, 3, padding=1), nn.Conv2d(96, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.narrow(self.wide(x).relu())
        return self.out(self.tail(x))


def test_a_layer_that_runs_three_times_has_its_parameters_once_and_its_macs_three_times() -> (
    None
):
    model = Recurrent()
    pruned = L1Pruner(model, 0.2, ignored_layers=[model.tail], round_to=1).prune(X)
    assert removed(model, pruned) == pytest.approx(0.2, abs=0.01)
    pruned = L1Pruner(
        model, 0.4, ignored_layers=[model.tail], rate_of="macs", round_to=1
    ).prune(X)
    assert 1 - macs(pruned, 64, 64) / macs(model, 64, 64) == pytest.approx(0.4, abs=0.01)


@pytest.fixture
def around(hf: nn.Module) -> nn.Module:
    return Around(hf)


@pytest.fixture
def hf() -> SegformerForSemanticSegmentation:
    config = SegformerConfig(
        num_labels=6, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 40, 48], num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=64,
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config)


class Around(nn.Module):
    """A network of someone's own with one of Hugging Face's inside, which is traced; the bare one is read as ours."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(pixel_values).logits
        return logits


@pytest.mark.parametrize(("inputs", "rate_of"), [(X, "params"), ({"pixel_values": X}, "macs")])
def test_a_hugging_face_network_is_pruned_around_its_attention(
    around: nn.Module, inputs: object, rate_of: str
) -> None:
    with pytest.warns(
        UserWarning, match=r"attention that segprune does not know: SegformerAttention \(4, "
    ) as caught:
        pruned = L1Pruner(around, 0.25, rate_of=rate_of, round_to=1).prune(inputs)
    assert len(caught) == 1
    found = (
        removed(around, pruned)
        if rate_of == "params"
        else 1 - macs(pruned, 64, 64) / macs(around, 64, 64)
    )
    assert found == pytest.approx(0.25, abs=0.01)
    assert pruned(X).shape == around(X).shape
    assert_trains(pruned, 96, 64)


def test_a_hugging_face_network_beyond_its_reach_is_refused_with_the_nearest(
    around: nn.Module,
) -> None:
    with (
        pytest.warns(UserWarning, match="SegformerAttention"),
        pytest.raises(
            ValueError, match=r"Rate 0\.9 is out of reach; the most that can be removed here is"
        ) as refusal,
    ):
        L1Pruner(around, 0.9, round_to=1).prune(X)
    nearest = float(re.search(r"removed here is ([\d.]+),", str(refusal.value))[1])
    with pytest.warns(UserWarning, match="SegformerAttention"):
        pruned = L1Pruner(around, nearest, round_to=1).prune(X)
    assert removed(around, pruned) == pytest.approx(nearest, abs=0.01)


def test_torch_s_attention_is_left_alone_with_one_warning(small_spec: Spec) -> None:
    model = WithTorchAttention(small_spec)
    message = r"^Left as it is, .*: attention that segprune does not know: MultiheadAttention \(1, first attention\)\.$"
    with pytest.warns(UserWarning, match=message) as caught:
        pruned = L1Pruner(model, 0.3, round_to=1).prune(X)
    assert len(caught) == 1
    assert removed(model, pruned) == pytest.approx(0.3, abs=0.01)
    assert pruned.attention.embed_dim == 32
    assert pruned.fc1.out_features < 128
    assert_trains(pruned, 96, 72)


def test_layers_that_cannot_be_cut_are_named_in_the_warning() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 32, 3),
        nn.GroupNorm(4, 32),
        nn.Conv2d(32, 64, 3),
        nn.Conv2d(64, 5, 1),
    )
    with pytest.warns(
        UserWarning, match=r"layers that it cannot cut: GroupNorm \(1, first 2\)\.$"
    ) as caught:
        pruned = L1Pruner(model, 0.3, round_to=1).prune(X)
    assert len(caught) == 1
    assert [m.out_channels for m in pruned if isinstance(m, nn.Conv2d)][:2] == [16, 32]


class RootAttention(nn.Module):
    """Attention spelled out in the outermost forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = (
            nn.Conv2d(3, 16, 8, stride=8),
            nn.Linear(16, 48),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(x).flatten(2).mT).chunk(3, dim=-1)
        return self.out((q @ k.mT).softmax(-1) @ v)


def test_attention_in_the_outermost_module_protects_all_and_says_so() -> None:
    with (
        pytest.warns(UserWarning, match=r"RootAttention \(1, first the network itself\)"),
        pytest.raises(
            ValueError,
            match="Nothing in RootAttention can be pruned: every group of channels is protected",
        ),
    ):
        L1Pruner(RootAttention(), 0.3).prune(X)


class Halved(nn.Module):
    """Splits its channels at half of a number that is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.out = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 256, 3),
            nn.Conv2d(128, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.stem(x))
        return self.out(x[:, :128] * x[:, 128:].sigmoid())


def test_what_no_longer_runs_once_it_is_cut_is_left_alone() -> None:
    with (
        pytest.warns(UserWarning, match=r"Left as it is.*Conv2d \(1, first wide\)"),
        pytest.raises(ValueError, match="Nothing in Halved can be pruned"),
    ):
        L1Pruner(Halved(), 0.3, round_to=1).prune(X)


def test_a_network_of_the_user_s_needs_example_inputs(small_spec: Spec) -> None:
    message = (
        "ExtraBranch is not a stock SegFormer and must be traced: pass example_inputs to prune(), "
        "for instance torch.randn(1, 3, 512, 512)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        L1Pruner(ExtraBranch(small_spec), 0.5).prune()


def test_a_stock_network_is_recognised_and_a_changed_one_is_not(small_spec: Spec) -> None:
    model = SegFormer(small_spec)
    assert stock_spec(model) == small_spec
    assert stock_spec(ExtraBranch(small_spec)) is None
    wider = copy.deepcopy(model)
    wider.encoder.stages[0].blocks[0].mlp.act = nn.ReLU()
    assert stock_spec(wider) is None
    other = copy.deepcopy(model)
    other.decode_head.classifier = nn.Conv2d(44, 7, 1)
    assert stock_spec(other) is None


def test_nothing_is_warned_about_where_everything_can_be_cut(small_spec: Spec) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        L1Pruner(ExtraBranch(small_spec), 0.5, round_to=1).prune(X)
    assert not warned


@pytest.mark.parametrize("head", ["mlp", "conv"])
def test_a_stock_network_is_counted_by_the_same_formula_when_traced(
    small_spec: Spec, head: Head
) -> None:
    """The plan of a traced copy equals that of the formula: one channel more nowhere."""
    model = fold_decoder(SegFormer(replace(small_spec, head=head)))
    wrapped = Wrapped(model.spec)
    wrapped.net.load_state_dict(model.state_dict())
    stock, traced = L1Pruner(model, 0.5, round_to=1), L1Pruner(wrapped, 0.5, round_to=1)
    stock.prune(X)
    traced.prune((X,))
    assert {f"net.{name}": keep for name, keep in stock.plan.keep.items()} == traced.plan.keep
    assert sum(row.cost("params") for row in layers(model.spec, (64, 64))) == num_parameters(
        wrapped
    )


@pytest.mark.parametrize("rate", [0.3, 0.5])
def test_a_share_of_the_channels_is_a_somewhat_larger_one_of_the_parameters(
    rate: float, trained_like: Callable[[nn.Module], nn.Module]
) -> None:
    """Most weights join two channels: were all groups cut alike, the share 1 - (1 - rate)² would go."""
    model = trained_like(SegFormer(standard_spec("b0", 8)))
    gone = removed(model, L1Pruner(model, rate, rate_of="channels").prune(X))
    assert rate < gone < 1 - (1 - rate) ** 2
