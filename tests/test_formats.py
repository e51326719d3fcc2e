"""Checkpoints in other tools' formats, against those tools' own classes or the plain network of tests/dialects.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import SegformerForSemanticSegmentation

from segprune.convert import NUMERICS
from segprune.fold import fold_decoder
from segprune.formats import write_folder
from segprune.model import SegFormer
from segprune.spec import Numerics, Spec, standard_spec
from tests.dialects import Fill

CLASSES = ("sky", "road", "tree", "car", "person")


def network(fill: Fill, numerics: Numerics, spec: Spec | None = None) -> SegFormer:
    model = fill(SegFormer(replace(spec or standard_spec("b0", 5), numerics=numerics)).eval())
    assert isinstance(model, SegFormer)
    return model


def logits(model: SegFormer, x: Tensor) -> Tensor:
    """Before the last upsampling, which transformers leaves to the user."""
    with torch.inference_mode():
        return model.parts(x)[1]


@pytest.mark.parametrize("dialect", NUMERICS)
@pytest.mark.parametrize("folded", [False, True])
def test_a_dense_network_has_the_same_logits_in_stock_transformers(
    dialect: str, folded: bool, trained_like: Fill, tmp_path: Path
) -> None:
    model = network(trained_like, NUMERICS[dialect])
    write_folder(fold_decoder(model) if folded else model, tmp_path / "hf", class_names=CLASSES)
    theirs, info = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        found = theirs(x).logits
    expected = logits(model, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert theirs.config.id2label == dict(enumerate(CLASSES))
