"""The same network in other numerics."""

import pytest
import torch

from segprune.checkpoint.numerics import with_numerics
from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.spec import Numerics, standard_spec


@pytest.mark.parametrize("head", ["mlp", "folded", "conv"])
def test_other_numerics_have_the_same_logits(
    head: str, small_model: SegFormer, conv_model: SegFormer
) -> None:
    """In float64, with every eps a hundred times as large, which changes the logits if nothing makes up for it."""
    model = {"mlp": small_model, "folded": fold_decoder(small_model), "conv": conv_model}[head]
    target = Numerics(norm_eps=1e-4, embed_norm_eps=1e-3, bn_eps=1e-3)
    state, spec = with_numerics(model.state_dict(), model.spec, target)
    assert (spec.numerics.norm_eps, spec.numerics.embed_norm_eps, spec.numerics.bn_eps) == (
        1e-4,
        1e-3,
        1e-3,
    )
    assert (spec.numerics.drop_path, spec.numerics.head_dropout) == (0.0, 0.0)
    other = SegFormer(spec).double().eval()
    assert all(b.qk_scale == b.qk_dim**-0.5 for stage in spec.stages for b in stage.blocks)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        other.load_state_dict(model.state_dict())
        assert (other(x) - model(x)).abs().max() > 1e-4
        other.load_state_dict(state)
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-10)


def test_another_gelu_is_refused() -> None:
    model = SegFormer(standard_spec("b0", 5))
    message = "The network has the exact GELU where theirs is the tanh-approximated one, which no weights make up for"
    with pytest.raises(ValueError, match=message):
        with_numerics(model.state_dict(), model.spec, Numerics(gelu="tanh"))
