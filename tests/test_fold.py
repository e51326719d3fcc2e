import copy
from dataclasses import replace

import pytest
import torch

from segprune.fold import fold_decoder, unfold_decoder
from segprune.model import SegFormer
from segprune.spec import Spec, standard_spec
from segprune.stats import count, layers


def test_folding_keeps_the_logits_in_float64(small_model: SegFormer) -> None:
    x = torch.randn(2, 3, 64, 96).double()
    folded = fold_decoder(small_model)
    assert folded.decode_head.fuse is None
    torch.testing.assert_close(folded(x), small_model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["b0", "b2"])
def test_folding_keeps_the_logits_of_a_standard_variant_in_float32(
    variant: str, trained_like
) -> None:
    model = trained_like(SegFormer(standard_spec(variant, 150)).eval())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        dense, folded = model(x), fold_decoder(model)(x)
    assert (folded - dense).norm() / dense.norm() < 1e-5


def test_a_folded_network_trains_as_the_unfolded_one(small_model: SegFormer) -> None:
    """In training the BatchNorm subtracts the batch's mean; only the running means differ, by the folded biases."""
    folded = fold_decoder(small_model)
    shift = small_model.decode_head.norm.running_mean - folded.decode_head.norm.running_mean
    x = torch.randn(3, 3, 64, 64).double()
    small_model.train()
    folded.train()
    for _ in range(2):
        dense_logits, folded_logits = small_model(x), folded(x)
        torch.testing.assert_close(folded_logits, dense_logits, rtol=0, atol=1e-12)
    dense, new = small_model.decode_head.norm, folded.decode_head.norm
    torch.testing.assert_close(new.running_mean + shift, dense.running_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(new.running_var, dense.running_var, rtol=0, atol=1e-12)
    dense_logits.square().sum().backward()
    folded_logits.square().sum().backward()
    dense_grad = small_model.encoder.stages[0].patch_embed.proj.weight.grad
    torch.testing.assert_close(
        folded.encoder.stages[0].patch_embed.proj.weight.grad, dense_grad
    )


def test_unfolding_gives_the_logits_back(small_model: SegFormer) -> None:
    x = torch.randn(2, 3, 64, 96).double()
    back = unfold_decoder(fold_decoder(small_model))
    assert back.spec.branch_dims == (small_model.spec.decoder_dim,) * 4
    torch.testing.assert_close(back(x), small_model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", [fold_decoder, unfold_decoder])
def test_doing_it_twice_changes_nothing_more(small_model: SegFormer, change) -> None:
    once = change(small_model)
    twice = change(once)
    assert twice is not once
    assert twice.spec == once.spec
    assert all(
        torch.equal(a, b)
        for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    "change", [fold_decoder, lambda model: unfold_decoder(fold_decoder(model))]
)
def test_the_given_network_is_left_as_it_was(small_model: SegFormer, change) -> None:
    before, spec = copy.deepcopy(small_model.state_dict()), small_model.spec
    new = change(small_model)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert small_model.spec == spec
    assert all(
        torch.equal(before[name], tensor) for name, tensor in small_model.state_dict().items()
    )


@pytest.mark.parametrize("training", [False, True])
def test_mode_dtype_and_spec_follow_into_the_new_network(
    small_model: SegFormer, training: bool
) -> None:
    folded = fold_decoder(small_model.train(training))
    assert all(module.training == training for module in folded.modules())
    assert all(
        tensor.dtype == torch.float64
        for tensor in folded.state_dict().values()
        if tensor.is_floating_point()
    )
    assert folded.spec == replace(small_model.spec, branch_dims=None)
    SegFormer(folded.spec).double().load_state_dict(folded.state_dict())


@pytest.mark.parametrize(("variant", "giga_macs"), [("b0", 4.15), ("b2", 24.0)])
def test_folding_reaches_the_promised_macs(variant: str, giga_macs: float) -> None:
    spec: Spec = replace(standard_spec(variant, 150), branch_dims=None)
    assert count(spec, (512, 512)).macs <= giga_macs * 1e9


def test_a_conv_head_is_copied_as_it_is(conv_model: SegFormer) -> None:
    for change in (fold_decoder, unfold_decoder):
        new = change(conv_model)
        assert new is not conv_model
        assert new.spec == conv_model.spec
        assert all(
            torch.equal(tensor, new.state_dict()[name])
            for name, tensor in conv_model.state_dict().items()
        )


def test_fusing_before_upsampling_takes_a_third_of_the_products() -> None:
    """Of b0 with mmsegmentation's head: what its classes compute for the fuse convolution, and what is counted here."""
    spec = replace(standard_spec("b0", 150), head="conv")
    rows = [row for row in layers(spec, (512, 512)) if ".fuses." in row.name]
    assert sum(row.cost("macs") for row in rows) == pytest.approx(
        256 * 1024 * 128 * 128 / 3, rel=0.01
    )
