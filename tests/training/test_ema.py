"""The moving average against its recurrence, torch's AveragedModel, and bit for bit through files and swaps."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segprune.training.ema import Ema


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def steps(model: nn.Module, number: int) -> Iterator[None]:
    """Changes weights and statistics, as training would."""
    for _ in range(number):
        model(torch.randn(2, 3, 4, 4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        yield


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) for name in one
    )


def test_averages_follow_the_recurrence_with_its_ramp() -> None:
    model = network()
    ema = Ema(model, decay=0.25)
    expected = tensors(model)
    for n, _ in enumerate(steps(model, 6)):
        ema.update(model)
        decay = min(0.25, (1 + n) / (10 + n))  # 1/10, 2/11, then 1/4
        for name, tensor in model.state_dict().items():
            counter = not tensor.is_floating_point()
            expected[name] = (
                tensor.clone() if counter else decay * expected[name] + (1 - decay) * tensor
            )
    assert expected["1.num_batches_tracked"] == 6
    for name, average in ema.averages.items():
        torch.testing.assert_close(average, expected[name])


def test_after_the_ramp_it_is_torch_s_averaged_model() -> None:
    model = network()
    ema, theirs = (
        Ema(model, decay=0.1),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.1), use_buffers=True),
    )
    theirs.update_parameters(model)  # its first update copies
    for _ in steps(model, 4):
        ema.update(model)
        theirs.update_parameters(model)
    for name, average in ema.averages.items():
        if average.is_floating_point():  # of counters theirs are rounded averages
            assert torch.equal(average, theirs.module.state_dict()[name]), name


def test_networks_of_several_precisions_are_averaged() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).bfloat16())
    ema = Ema(model, decay=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    ema.update(model)
    assert same(ema.averages, tensors(model))


def test_averages_are_copies_of_their_own() -> None:
    model = network()
    ema = Ema(model)
    before = {name: average.clone() for name, average in ema.averages.items()}
    for _ in steps(model, 1):
        pass
    assert same(ema.averages, before)


def test_applied_the_model_is_the_average_and_afterwards_itself_to_the_bit() -> None:
    model = network()
    ema = Ema(model)
    for _ in steps(model, 3):
        ema.update(model)
    own, parameters = tensors(model), list(model.parameters())
    with ema.applied(model):
        assert same(tensors(model), ema.averages)
        assert not same(tensors(model), own)
    assert same(tensors(model), own)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_the_model_gets_its_weights_back_from_an_evaluation_that_failed() -> None:
    model = network()
    ema = Ema(model)
    for _ in steps(model, 2):
        ema.update(model)
    own = tensors(model)
    with pytest.raises(RuntimeError, match="out of memory"), ema.applied(model):
        raise RuntimeError("out of memory")
    assert same(tensors(model), own)


def test_an_interrupted_average_goes_on_to_the_same_bits() -> None:
    model = network()
    ema, file = Ema(model), io.BytesIO()
    for _ in steps(model, 3):
        ema.update(model)
    torch.save(ema.state_dict(), file)
    file.seek(0)
    resumed = Ema(network())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert same(resumed.averages, ema.averages)
    for _ in steps(model, 3):
        ema.update(model)
        resumed.update(model)
    assert same(resumed.averages, ema.averages)
    assert resumed.num_updates == 6


def test_a_saved_state_does_not_move_with_the_average() -> None:
    model = network()
    ema = Ema(model)
    saved = ema.state_dict()
    for _ in steps(model, 1):
        ema.update(model)
    assert not same(saved["averages"], ema.averages)
    assert saved["num_updates"] == 0


@pytest.mark.parametrize(
    "other", [nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(3, 5, 1), *network()[1:])]
)
def test_averages_of_another_network_are_refused(other: nn.Module) -> None:
    with pytest.raises(
        ValueError,
        match=r"The saved averages are another network's \(\d+ tensors differ, .* first\);",
    ):
        Ema(network()).load_state_dict(Ema(other).state_dict())


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(
        ValueError, match=rf"The average's decay is {decay}; it must be from 0 to below 1\."
    ):
        Ema(network(), decay=decay)
