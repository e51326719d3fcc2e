import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from segprune.model import Attention, DropPath, SegFormer, attend, check_input, find_winners
from segprune.spec import (
    BlockSpec,
    Numerics,
    Spec,
    list_kv_reductions,
    standard_spec,
    with_kv_reductions,
)

PUBLISHED = {  # parameters at 21 classes
    "b0": 3_719_541,
    "b1": 13_682_645,
    "b2": 27_362_773,
    "b3": 47_238_613,
    "b4": 64_009_173,
    "b5": 84_609_493,
}


@pytest.mark.parametrize(("variant", "parameters"), PUBLISHED.items())
def test_a_variant_has_the_published_number_of_parameters(
    variant: str, parameters: int
) -> None:
    with torch.device("meta"):
        model = SegFormer(standard_spec(variant, 21))
    assert sum(p.numel() for p in model.parameters()) == parameters


def without_branches(spec: Spec) -> Spec:
    """The first stage's first block without attention, the last stage's only block without FFN."""
    first, *middle, last = spec.stages
    first = replace(first, blocks=(first.blocks[0].without_attention(), *first.blocks[1:]))
    last = replace(last, blocks=(last.blocks[0].without_ffn(),))
    return replace(spec, stages=(first, *middle, last))


HEADS = ({}, {"branch_dims": None}, {"head": "conv"})


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (65, 97), (33, 130)])
def test_logits_have_the_input_s_size(
    small_spec: Spec, size: tuple[int, int], head: dict[str, Any]
) -> None:
    model = SegFormer(replace(small_spec, **head))
    assert model(torch.randn(2, 3, *size)).shape == (2, small_spec.num_classes, *size)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("shallow", [False, True])
def test_every_parameter_receives_a_gradient(
    small_spec: Spec, head: dict[str, Any], shallow: bool
) -> None:
    spec = replace(small_spec, **head)
    model = SegFormer(without_branches(spec) if shallow else spec)
    model(torch.randn(2, 3, 64, 96)).square().mean().backward()
    without = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert without == []
    # biases before a BatchNorm and of keys cancel out; all else must matter
    dead = [n for n, p in model.named_parameters() if not p.grad.any()]
    assert all(name.endswith("bias") for name in dead)


@pytest.mark.parametrize("size", [(64, 64), (71, 50)])
def test_the_last_map_is_a_32nd_of_the_input(
    small_model: SegFormer, size: tuple[int, int]
) -> None:
    maps = small_model.encoder(torch.randn(1, 3, *size).double())
    assert [m.shape[1:] for m in maps] == [
        (stage.width, *(-(-side // (4 * 2**i)) for side in size))
        for i, stage in enumerate(small_model.spec.stages)
    ]


def test_images_of_a_batch_do_not_see_each_other(small_model: SegFormer) -> None:
    x = torch.randn(3, 3, 64, 64).double()
    torch.testing.assert_close(small_model(x)[1:2], small_model(x[1:2]))


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(4, 6), (6, 4), (5, 5)])
def test_attention_equals_the_textbook_formula(qk_dim: int, v_dim: int) -> None:
    block = BlockSpec(
        num_heads=3, qk_dim=qk_dim, v_dim=v_dim, ffn_dim=1, reduction_dim=None, qk_scale=0.7
    )
    attention = Attention(10, block, 1, 1e-5).double()
    x = torch.randn(2, 12, 10).double()
    q, k, v = (layer(x).chunk(3, dim=-1) for layer in (attention.q, attention.k, attention.v))
    heads = [(0.7 * q[h] @ k[h].mT).softmax(-1) @ v[h] for h in range(3)]
    torch.testing.assert_close(
        attention(x, 3, 4), attention.proj(torch.cat(heads, -1)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("factor", [1, 2, 3, 9])
def test_keys_and_values_come_from_the_means_of_windows_and_partial_ones_count(
    factor: int,
) -> None:
    block = BlockSpec(2, 4, 4, 1, None, 0.7, factor)
    attention = Attention(10, block, 1, 1e-5).double()
    x = torch.randn(2, 7 * 5, 10).double()
    rows = x.unflatten(1, (7, 5))
    means = []
    for top in range(0, 7, factor):
        for left in range(0, 5, factor):
            window = rows[:, top : top + factor, left : left + factor]
            means.append(window.mean((1, 2)))
    source = torch.stack(means, 1)
    found = attend(attention.q(x), attention.k(source), attention.v(source), 2, 0.7)
    torch.testing.assert_close(attention(x, 7, 5), attention.proj(found), rtol=0, atol=1e-12)


def test_a_coarser_map_needs_no_weights_and_any_size_will_do(small_model: SegFormer) -> None:
    names = list_kv_reductions(small_model.spec)
    model = SegFormer(with_kv_reductions(small_model.spec, dict.fromkeys(names, 2))).double()
    model.load_state_dict(small_model.state_dict())
    model.eval()
    for size in ((32, 32), (33, 97), (64, 96)):
        x = torch.randn(1, 3, *size).double()
        assert model(x).shape == small_model(x).shape
    assert not torch.allclose(model(x), small_model(x))


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(4, 6), (6, 4), (5, 5)])
def test_attention_of_unequal_widths_runs_in_the_fused_kernel_too(
    qk_dim: int, v_dim: int
) -> None:
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    q, k, v = (torch.randn(1, 16, 3 * dim) for dim in (qk_dim, qk_dim, v_dim))
    with Watch():
        assert attend(q, k, v, 3, 0.5).shape == v.shape
    assert "_scaled_dot_product_flash_attention_for_cpu.default" in called
    assert not [name for name in called if "bmm" in name]


def test_the_numerics_of_the_spec_reach_the_layers(small_spec: Spec) -> None:
    numerics = Numerics(1e-3, 1e-2, "tanh", 1e-4, 0.2, 0.3, "plain", True, 0.5)
    model = SegFormer(replace(small_spec, numerics=numerics))
    modules = dict(model.named_modules())
    eps = {name: m.eps for name, m in modules.items() if isinstance(m, nn.LayerNorm)}
    embeds = {name for name in eps if name.endswith(("patch_embed.norm", "attn.norm"))}
    assert {eps[name] for name in embeds} == {1e-2}
    assert {eps[name] for name in eps.keys() - embeds} == {1e-3}
    assert {m.approximate for m in modules.values() if isinstance(m, nn.GELU)} == {"tanh"}
    assert (model.decode_head.norm.eps, model.decode_head.norm.momentum) == (1e-4, 0.2)
    conv = SegFormer(replace(small_spec, numerics=numerics, head="conv")).decode_head
    assert {(norm.eps, norm.momentum) for norm in (*conv.branch_norms, conv.norm)} == {
        (1e-4, 0.2)
    }
    assert type(model.decode_head.dropout) is nn.Dropout
    assert model.decode_head.dropout.p == 0.3
    rates = [m.rate for m in modules.values() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("training", [False, True])
def test_a_conv_head_computes_what_one_convolution_of_the_upsampled_branches_does(
    conv_model: SegFormer, training: bool
) -> None:
    """As it is published: concatenated c1, c2, c3, c4 at quarter size; statistics and gradients are the same too."""
    head = conv_model.decode_head.train(training)
    maps = [
        m.detach().requires_grad_()
        for m in conv_model.encoder(torch.randn(2, 3, 64, 96).double())
    ]
    other, whole = copy.deepcopy(head), []
    for branch, norm, x in zip(other.branches, other.branch_norms, maps, strict=True):
        x = norm(F.conv2d(x, branch.weight[:, :, None, None])).relu()
        whole.append(F.interpolate(x, maps[0].shape[2:], mode="bilinear"))
    weight = torch.cat([fuse.weight for fuse in other.fuses], dim=1)[:, :, None, None]
    expected = other.classifier(other.norm(F.conv2d(torch.cat(whole, dim=1), weight)).relu())
    wanted = torch.autograd.grad(expected.square().sum(), maps, retain_graph=True)
    found = head(maps)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), maps), wanted, strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(head.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_align_corners_decides_how_the_logits_are_upsampled(small_model: SegFormer) -> None:
    x = torch.randn(1, 3, 64, 64).double()
    small = small_model.decode_head(small_model.encoder(x))
    small_model.spec = replace(
        small_model.spec, numerics=replace(small_model.spec.numerics, align_corners=True)
    )
    assert torch.equal(
        small_model(x)[..., ::63, ::63], small[..., ::15, ::15]
    )  # aligned: the corners are kept


def test_drop_path_keeps_or_drops_whole_samples_and_the_mean() -> None:
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 2, 3))
    assert all(sample.unique().numel() == 1 for sample in out[:50])
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(out), out)


def test_a_missing_branch_leaves_no_modules_and_the_stream_passes(small_spec: Spec) -> None:
    model = SegFormer(without_branches(small_spec))
    first, last = model.encoder.stages[0].blocks[0], model.encoder.stages[3].blocks[0]
    assert [name for name, _ in first.named_children()] == ["norm2", "mlp", "drop_path"]
    assert [name for name, _ in last.named_children()] == ["norm1", "attn", "drop_path"]
    x = torch.randn(2, 12, 16)
    assert torch.equal(first(x, 3, 4), x + first.mlp(first.norm2(x), 3, 4))
    x = torch.randn(2, 12, 48)
    assert torch.equal(last(x, 3, 4), x + last.attn(last.norm1(x), 3, 4))


def test_fresh_weights_are_drawn_as_published() -> None:
    model = SegFormer(standard_spec("b0", 8))
    linear = model.encoder.stages[3].blocks[0].mlp.fc1
    conv = model.encoder.stages[3].patch_embed.proj
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.05)
    assert not linear.bias.any()
    assert not conv.bias.any()


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (2, 1, 64, 64), (64, 64)])
def test_what_is_not_a_batch_of_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"takes images as B 3 H W, got shape \(" + f"{shape[0]}, "
    ):
        check_input(shape)


@pytest.mark.parametrize("size", [(31, 64), (64, 8), (0, 0)])
def test_an_image_below_32_pixels_is_refused(
    small_model: SegFormer, size: tuple[int, int]
) -> None:
    message = f"The input is {size[0]}×{size[1]} pixels; both sides must be at least 32, since the last stage works"
    with pytest.raises(ValueError, match=message):
        small_model(torch.zeros(1, 3, *size).double())


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("num_classes", [2, 5, 150])
@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (1, (128, 128)),
        (3, (64, 160)),
        (1, (100, 128)),
        (1, (101, 131)),
        (2, (32, 64)),
        (1, (36, 130)),
    ],
)
def test_classes_are_exactly_the_argmax_of_the_logits(
    small_spec: Spec,
    batch: int,
    size: tuple[int, int],
    num_classes: int,
    align_corners: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two classes have the same weights, and logits are of few values, so that many pixels are ties."""
    monkeypatch.setattr("segprune.model.STRIP_NUMBERS", 20 * num_classes * size[1])
    numerics = Numerics(align_corners=align_corners)
    model = SegFormer(replace(small_spec, num_classes=num_classes, numerics=numerics)).eval()
    x = torch.randn(batch, 3, *size)
    with torch.no_grad():
        nn.init.normal_(model.decode_head.classifier.weight)
        model.decode_head.classifier.weight[1] = model.decode_head.classifier.weight[0]
        logits, classes = model(x), model.classes(x)
    assert torch.equal(classes, logits.argmax(1))
    assert len(classes.unique()) > 1 or num_classes == 2


@pytest.mark.parametrize("num_classes", [1, 3, 4, 19])
def test_rows_of_upsampled_logits_have_the_bits_of_the_whole(
    small_spec: Spec, num_classes: int
) -> None:
    model = SegFormer(replace(small_spec, num_classes=num_classes))
    for memory in (torch.contiguous_format, torch.channels_last):
        logits = torch.randn(2, num_classes, 11, 33).to(memory_format=memory)
        size = torch.Size((44, 129))
        assert model.can_resize_rows(logits, size)
        whole = model.resize(logits, size)
        for top, bottom in ((0, 1), (0, 44), (1, 6), (2, 3), (5, 11), (41, 44), (43, 44)):
            rows = model.resize_rows(logits, size, top, bottom)
            assert torch.equal(rows, whole[:, :, top:bottom])
    assert not model.can_resize_rows(logits, torch.Size((43, 129)))


@pytest.mark.parametrize("num_classes", [31, 32, 71, 150])
@pytest.mark.parametrize("kind", ["smooth", "ties", "not finite"])
def test_classes_that_win_nowhere_are_left_out_and_change_no_bit(
    small_spec: Spec, num_classes: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few classes are ever the highest; of the others, some come near, or as high as these."""
    model = SegFormer(replace(small_spec, num_classes=num_classes))
    heights = torch.linspace(0, 8, num_classes).square()[torch.randperm(num_classes)]
    logits = F.interpolate(torch.randn(2, num_classes, 5, 9) + heights[:, None, None], (16, 33))
    if kind == "ties":
        logits[:, 0] = logits.amax(1)
        logits = logits.round()
    elif kind == "not finite":
        logits[0, 3, 4, 5], logits[1, 2, 7, 8] = torch.nan, torch.inf
    logits = logits.contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(model, "parts", lambda x: ([], logits))
    monkeypatch.setattr("segprune.model.STRIP_NUMBERS", 20 * num_classes * 132)
    for size in (torch.Size((64, 132)), torch.Size((61, 131)), torch.Size((64, 64))):
        kept = find_winners(logits, size)
        assert (kept is None) == (kind == "not finite" or sum(size) <= 128 or num_classes == 31)
        assert torch.equal(
            model.classes(torch.zeros(2, 3, *size)), model.resize(logits, size).argmax(1)
        )
