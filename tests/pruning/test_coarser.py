"""Keys and values from a coarser map: where, what it saves, and how near the repair comes to the dense network."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segprune.checkpoint import load, save
from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.coarser import choose_factors
from segprune.pruning.options import PruneOptions
from segprune.pruning.prune import prune
from segprune.spec import Spec, list_kv_reductions, standard_spec
from segprune.stats import Counts, count

SIZE = (96, 160)


@pytest.fixture
def images() -> list[Tensor]:
    return [draw_images(8)]


def draw_images(number: int) -> Tensor:
    """Returns images whose neighbouring pixels resemble each other, as in photographs: noise has nothing to average."""
    coarse = torch.randn(number, 3, 12, 20).double()
    return nn.functional.interpolate(coarse, SIZE, mode="bilinear")


@torch.no_grad()
def error(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> float:
    return sum(float((model(x) - dense(x)).square().sum()) for x in batches)


def coarsen(
    model: SegFormer, rate: float | None = None, **changes: Any
) -> tuple[SegFormer, Counts]:
    """Returns the pruned network, and its parameters and MACs at `SIZE`."""
    done = prune(model, rate, input_shape=SIZE, **changes)
    assert isinstance(done.network, SegFormer)
    assert done.after is not None
    return done.network, done.after


def factors_by_stage(factors: dict[str, int]) -> list[set[int]]:
    stages: list[set[int]] = [set() for _ in range(4)]
    for name, factor in factors.items():
        stages[int(name.split(".")[2])].add(factor)
    return stages


@pytest.mark.parametrize(
    ("wanted", "size", "expected"),
    [
        ({"": 2}, (1024, 2048), [{2}, {2}, {2}, {1}]),  # the last stage saves 4 %
        ({"": 2}, (512, 512), [{2}, {2}, {1}, {1}]),
        ({"": 2, "stages.0": 4, "stages.1": 1}, (1024, 2048), [{4}, {1}, {2}, {1}]),
        ({"stages.3.blocks.1": 3}, (64, 64), [{1}, {1}, {1}, {1, 3}]),
        ({"": 1}, (64, 64), [{1}, {1}, {1}, {1}]),
    ],
    ids=str,
)
def test_a_number_alone_is_for_the_stages_where_it_saves_enough_and_names_overrule_it(
    wanted: dict[str, int], size: tuple[int, int], expected: list[set[int]]
) -> None:
    spec = standard_spec("b0", 19)
    folded = fold_decoder_spec(spec)
    assert factors_by_stage(choose_factors(folded, wanted, size)) == expected


def fold_decoder_spec(spec: Spec) -> Spec:
    with torch.device("meta"):
        return fold_decoder(SegFormer(spec)).spec


def test_what_is_worth_it_nowhere_and_a_name_of_nothing_are_refused() -> None:
    spec = standard_spec("b0", 19)
    message = "`kv_reduction` 2 saves less than 5% of the MACs in every stage at 64×64; give a larger `input_shape`"
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_factors(spec, {"": 2}, (64, 64))
    with pytest.raises(ValueError, match=r"`kv_reduction` 'stages\.4' matches nothing"):
        choose_factors(spec, {"stages.4": 2}, (512, 512))


def test_weights_remain_and_macs_are_fewer_without_the_repair(small_model: SegFormer) -> None:
    coarse, counts = coarsen(
        small_model, 0.0, kv_reduction="stages.0=2,stages.3=3", repair=False
    )
    folded = fold_decoder(small_model)
    for name, tensor in folded.state_dict().items():
        assert torch.equal(coarse.state_dict()[name], tensor)
    assert factors_by_stage(list_kv_reductions(coarse.spec)) == [{2}, {1}, {1}, {3}]
    assert counts == count(coarse.spec, SIZE)
    assert counts.macs < count(folded.spec, SIZE).macs
    assert set(list_kv_reductions(small_model.spec).values()) == {1}  # as it was

    # A factor of 1 gives the network back.
    again, _ = coarsen(coarse, 0.0, kv_reduction=1, repair=False)
    assert again.spec == folded.spec
    x = torch.randn(1, 3, *SIZE).double()
    assert torch.equal(again(x), folded(x))


def test_the_repair_comes_nearer_to_the_dense_network_on_its_images(
    small_model: SegFormer, images: list[Tensor]
) -> None:
    wanted = "stages.0=2,stages.1=2,stages.2=2"
    cut, _ = coarsen(small_model, 0.0, kv_reduction=wanted, repair=False)
    repaired, _ = coarsen(small_model, 0.0, kv_reduction=wanted, images=images)
    assert error(repaired, small_model, images) < 0.5 * error(cut, small_model, images)
    assert repaired.spec == cut.spec


def test_channels_and_the_coarser_map_share_one_budget_and_the_file_keeps_both(
    small_model: SegFormer, images: list[Tensor], tmp_path: Path
) -> None:
    small_model.float()
    images = [x[:4].float() for x in images]
    wanted = {"stages.0": 2, "stages.1": 2}
    network, counts = coarsen(
        small_model, 0.7, rate_of="macs", kv_reduction=wanted, images=images, round_to=1
    )
    assert 1 - counts.macs / count(small_model.spec, SIZE).macs == pytest.approx(0.7, abs=0.01)
    assert factors_by_stage(list_kv_reductions(network.spec)) == [{2}, {2}, {1}, {1}]

    save(network, tmp_path / "coarse.pth")
    back = load(tmp_path / "coarse.pth")
    assert back.spec == network.spec
    assert torch.equal(back(images[0]), network.eval()(images[0]))


def test_a_rate_that_the_coarser_map_exceeds_alone_is_refused_with_the_cause(
    small_model: SegFormer,
) -> None:
    with pytest.raises(ValueError, match=r"less than `kv_reduction` with folding .* rate 0"):
        coarsen(small_model, 0.01, rate_of="macs", kv_reduction="stages=2", repair=False)


def test_networks_that_cannot_be_uniform_or_are_no_segformer_are_refused(
    small_model: SegFormer,
) -> None:
    coarse, _ = coarsen(small_model, 0.0, kv_reduction="stages.0=2", repair=False)
    with pytest.raises(ValueError, match=r"`uniform` is for stock classes.*`kv_reduction` 1"):
        coarsen(coarse, 0.5, uniform=True, repair=False)
    other = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match="Sequential is not a stock SegFormer, and `kv_red"):
        prune(other, 0.5, kv_reduction=2, repair=False, example_inputs=torch.zeros(1, 3, 8, 8))


def test_a_network_pruned_again_keeps_its_factors(
    small_model: SegFormer,
) -> None:
    options = PruneOptions(pruning_rate=0.3, kv_reduction="stages.0=2", repair=False)
    once, _ = coarsen(small_model, options=options)
    twice, _ = coarsen(once, options=options)
    assert list_kv_reductions(twice.spec) == list_kv_reductions(once.spec)
