"""`segprune.prune`: one call from a network to a smaller one, with what was decided."""

import copy

import pytest
import torch
from torch import nn

import segprune
from segprune.model import SegFormer
from segprune.pruning.options import PruneOptions
from segprune.stats import count


def test_one_call_prunes_repairs_and_says_what_it_did(
    small_model: SegFormer, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [torch.randn(2, 3, 64, 64).double() for _ in range(2)]
    state, seen = copy.deepcopy(small_model.state_dict()), []

    options = PruneOptions(round_to=2, input_shape=(64, 96), plan_by="scores")
    plain = segprune.prune(small_model, 0.5, options=options)
    repaired = segprune.prune(
        small_model,
        0.5,
        images=images,
        options=options,
        progress=lambda *numbers: seen.append(numbers),
    )
    assert capsys.readouterr() == ("", "")
    assert seen
    assert all(
        torch.equal(state[name], tensor) for name, tensor in small_model.state_dict().items()
    )

    assert plain.before == count(small_model.spec, (64, 96))
    assert plain.after == repaired.after == count(plain.network.spec, (64, 96))
    removed = 1 - plain.after.parameters / plain.before.parameters
    assert removed == pytest.approx(0.5, abs=0.01)
    assert plain.plan.removed["params"] == pytest.approx(removed)
    with torch.inference_mode():
        aim = small_model.eval()(images[0])
        far, near = (
            (pruned.network.eval()(images[0]) - aim).square().mean()
            for pruned in (plain, repaired)
        )
    assert near < far


def test_single_options_are_arguments_too_and_unknown_ones_are_refused(
    small_model: SegFormer,
) -> None:
    pruned = segprune.prune(small_model, "params=0.3,macs=0.5", round_to=1, keep_decoder=True)
    assert pruned.plan.removed["macs"] > 0.49
    assert not pruned.network.spec.folded
    with pytest.raises(TypeError, match="pruning_metod"):
        segprune.prune(small_model, 0.5, pruning_metod="l1")
    with pytest.raises(ValueError, match="`repair` needs `images`"):
        segprune.prune(small_model, 0.5, repair=True)


def test_rate_0_has_no_plan_and_another_network_no_counts(small_model: SegFormer) -> None:
    nothing = segprune.prune(small_model, 0.0)
    assert nothing.plan is None
    assert nothing.before == nothing.after
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 128, 3), nn.Conv2d(128, 4, 1)
    )
    pruned = segprune.prune(network, 0.3, example_inputs=torch.randn(1, 3, 16, 16), round_to=1)
    assert (pruned.before, pruned.after) == (None, None)
    assert pruned.plan.removed["params"] == pytest.approx(0.3, abs=0.01)
