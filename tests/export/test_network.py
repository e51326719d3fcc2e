from dataclasses import replace

import pytest
import torch

from segprune.data import MEAN, STD
from segprune.export.network import Deployed
from segprune.fold import fold_decoder, fold_for_inference
from segprune.model import SegFormer
from segprune.spec import Spec


def test_the_baked_network_takes_pixels_and_gives_classes(small_model: SegFormer) -> None:
    network = small_model.float()
    pixels = torch.randint(256, (2, 64, 96, 3), dtype=torch.uint8)
    images = ((pixels.float() - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    with torch.no_grad():
        classes = Deployed(network, preprocess=True, argmax=True)(pixels)
        expected = network(images).argmax(1)
    assert classes.dtype == torch.uint8
    assert float((classes == expected).float().mean()) > 0.9999


def test_a_class_map_of_too_many_classes_is_refused(small_spec: Spec) -> None:
    model = SegFormer(replace(small_spec, num_classes=257))
    Deployed(model)
    with pytest.raises(
        ValueError,
        match="has 257 classes, where a class map can hold 256; leave argmax out of `bake`",
    ):
        Deployed(model, argmax=True)


@pytest.mark.parametrize("head", ["mlp", "folded", "conv"])
def test_folding_for_inference_keeps_the_logits_in_float64_and_the_given_network(
    small_model: SegFormer, conv_model: SegFormer, head: str
) -> None:
    x = torch.randn(2, 3, 64, 96).double()
    given = {"mlp": small_model, "folded": fold_decoder(small_model), "conv": conv_model}[head]
    expected = given(x)
    folded = fold_for_inference(given)
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(given(x), expected, rtol=0, atol=0)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert isinstance(given.decode_head.norm, torch.nn.BatchNorm2d)
    assert {m.qk_scale for m in folded.modules() if hasattr(m, "qk_scale")} == {1.0}


def test_folding_for_inference_leaves_training_mode(small_model: SegFormer) -> None:
    assert not any(
        module.training for module in fold_for_inference(small_model.train()).modules()
    )


def test_classes_at_a_quarter_are_those_of_the_coarse_logits_each_four_by_four(
    small_model: SegFormer,
) -> None:
    network, x = small_model.float(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        logits = network.parts(x)[1]
        network.decode_head.classifier.bias -= logits.mean((0, 2, 3))
        classes = Deployed(network, argmax_quarter=True)(x)
        expected = network.parts(x)[1].argmax(1)
    assert classes.dtype == torch.uint8
    assert len(classes.unique()) > 1
    repeated = expected.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert float((classes == repeated).float().mean()) > 0.9999
