"""`segprune.prune`: one call from a network to a smaller one, with what was decided."""

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import segprune
from segprune.model import SegFormer
from segprune.pruning import pruner
from segprune.pruning.options import PruneOptions
from segprune.pruning.synthetic import synthetic_images
from segprune.stats import count


def test_one_call_prunes_repairs_and_says_what_it_did(
    small_model: SegFormer, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [torch.randn(2, 3, 64, 64).double() for _ in range(2)]
    state, seen = copy.deepcopy(small_model.state_dict()), []

    options = PruneOptions(round_to=2, input_shape=(64, 96), plan_by="scores")
    plain = segprune.prune(small_model, 0.5, options=options, repair=False)
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
    assert plain.notes == repaired.notes == ()


@pytest.mark.parametrize(
    "options", [{}, {"pruning_method": "wanda"}, {"pruning_method": "taylor", "repair": False}]
)
def test_without_images_synthetic_ones_serve_and_a_note_says_so(
    options: dict[str, Any], small_model: SegFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruner, "synthetic_images", partial(synthetic_images, count=4))
    shared = {"round_to": 4, "input_shape": (64, 96), "plan_by": None} | options
    drawn = segprune.prune(small_model, 0.5, **shared)
    assert re.search("No `images`.*4 synthetic ones.*`repair` False", drawn.notes[0])

    # They are those that anybody can draw, chosen by the network, at the shape that is planned for.
    images = synthetic_images(small_model, (64, 96), count=4, seed=11)
    given = segprune.prune(small_model, 0.5, images=images, **shared)
    assert given.notes == ()
    assert given.plan == drawn.plan
    expected = given.network.state_dict()
    for name, tensor in drawn.network.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_the_repair_without_images_can_be_switched_off(small_model: SegFormer) -> None:
    pruned = segprune.prune(small_model, 0.5, round_to=2, repair=False)
    assert pruned.notes == ()
    assert pruned.plan is not None
    assert pruned.plan.decided_by == "scores"


def test_images_are_not_drawn_for_a_network_that_is_not_stock(small_model: SegFormer) -> None:
    wrapped = nn.Sequential(small_model)
    x = torch.zeros(1, 3, 64, 64).double()
    with pytest.raises(ValueError, match="Sequential is not a stock SegFormer; only those"):
        segprune.prune(wrapped, 0.3, repair=True, example_inputs=x)
    with pytest.raises(ValueError, match="Method taylor needs `images`"):
        segprune.prune(wrapped, 0.3, pruning_method="taylor", example_inputs=x)


def test_single_options_are_arguments_too_and_unknown_ones_are_refused(
    small_model: SegFormer,
) -> None:
    pruned = segprune.prune(
        small_model, "params=0.3,macs=0.5", round_to=1, keep_decoder=True, repair=False
    )
    assert pruned.plan.removed["macs"] > 0.49
    assert not pruned.network.spec.folded
    with pytest.raises(TypeError, match="pruning_metod"):
        segprune.prune(small_model, 0.5, pruning_metod="l1")


def test_rate_0_has_no_plan_and_another_network_no_counts(small_model: SegFormer) -> None:
    nothing = segprune.prune(small_model, 0.0, keep_decoder=True)
    assert nothing.plan is None
    assert nothing.before == nothing.after
    folded = segprune.prune(small_model, 0.0)
    assert folded.plan is None
    assert folded.after == count(segprune.fold_decoder(small_model).spec, (512, 512))
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 128, 3), nn.Conv2d(128, 4, 1)
    )
    pruned = segprune.prune(network, 0.3, example_inputs=torch.randn(1, 3, 16, 16), round_to=1)
    assert (pruned.before, pruned.after) == (None, None)
    assert pruned.plan.removed["params"] == pytest.approx(0.3, abs=0.01)
