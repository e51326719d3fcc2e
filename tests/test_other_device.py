"""Everything runs where the network lies: load, score, cut, repair, train and evaluate on a device that is not the CPU.

The device is played (tests/other_device.py), so that this is tested where there is no GPU.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F

import segprune
from segprune import L1Pruner
from segprune.data import open_source, write_shapes
from segprune.fold import fold_decoder, fold_for_inference, unfold_decoder
from segprune.inference.evaluate import EvalMode, Score, evaluate
from segprune.model import SegFormer
from segprune.pruning.curves import measure_curves
from segprune.pruning.depth import branch_scores, noise, remove
from segprune.pruning.groups import find_groups
from segprune.pruning.importance import METHODS, score_channels
from segprune.pruning.plan import keep_best
from segprune.pruning.repair import repair
from segprune.pruning.synthetic import synthetic_images
from segprune.training.loop import train
from segprune.training.state import TrainState
from tests.other_device import OTHER, OtherDevice
from tests.pruning.cutting import STEM, cut_copy
from tests.training.tiny import config_of, tiny_model


@pytest.fixture
def device() -> Iterator[OtherDevice]:
    with OtherDevice() as device:
        yield device
    assert device.calls > 0


# The device itself


def test_the_device_refuses_what_a_gpu_refuses(device: OtherDevice) -> None:
    there, here = torch.ones(3, device=OTHER), torch.ones(3)
    assert there.device == OTHER
    assert (there * 2.0 + torch.tensor(1.0)).sum().device == OTHER
    assert there.cpu().numpy().sum() == (there.to("cpu") + here).sum() - 3 == 3
    for mixed in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: here.add_(there),
        lambda: there[here.long()],
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    for to_numpy in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match="numpy"):
            to_numpy()


# What runs on it


def moved(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(OTHER)


def places(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]}


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(
            tensor.cpu(), state[name].cpu(), rtol=1e-5, atol=1e-6, msg=name
        )


@pytest.fixture
def dense_of(small_model: SegFormer, conv_model: SegFormer) -> Callable[[str], SegFormer]:
    return {
        "mlp": small_model,
        "folded": fold_decoder(small_model),
        "conv": conv_model,
    }.__getitem__


def test_networks_are_saved_loaded_and_folded(
    device: OtherDevice, small_model: SegFormer, tmp_path: Path
) -> None:
    segprune.save(moved(small_model.float()), tmp_path / "small.pth")
    loaded = segprune.load(tmp_path / "small.pth", device=OTHER).eval()
    assert places(loaded) == {"cuda"}
    assert_equal(loaded, small_model)

    x = torch.randn(1, 3, 64, 64, device=OTHER)
    for network in (
        fold_decoder(loaded),
        unfold_decoder(fold_decoder(loaded)),
        fold_for_inference(loaded),
    ):
        assert places(network) == {"cuda"}
        torch.testing.assert_close(network(x).cpu(), small_model(x.cpu()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head", ["mlp", "folded", "conv"])
def test_maps_are_brought_into_the_fast_layout_before_they_are_upsampled(
    device: OtherDevice,
    dense_of: Callable[[str], SegFormer],
    head: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_order: set[bool] = set()
    interpolate = F.interpolate

    def watch(x: Tensor, **how: Any) -> Tensor:
        in_order.add(x.is_contiguous())
        return interpolate(x, **how)

    monkeypatch.setattr(F, "interpolate", watch)
    dense, x = dense_of(head), torch.randn(2, 3, 64, 96).double()
    expected = dense(x)
    assert in_order == {False}  # a CPU's maps stay as they are

    in_order.clear()
    logits = moved(dense)(x.to(OTHER))
    assert in_order == {True}
    torch.testing.assert_close(logits.cpu(), expected)

    # Nor does a compiler's or an exporter's graph hold a copy.
    in_order.clear()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    moved(dense)(x.to(OTHER))
    assert in_order == {False}


@pytest.mark.parametrize("method", METHODS)
def test_channels_are_scored_and_cut(
    device: OtherDevice, small_model: SegFormer, method: str
) -> None:
    model = moved(small_model)
    x = torch.randn(2, 3, 64, 64).double()
    groups = find_groups(model, x[:1].to(OTHER), {STEM}, heads=True).groups

    ranks = score_channels(model, groups, method, [x.to(OTHER)])
    expected = score_channels(small_model, groups, method, [x])
    for name, values in expected.items():
        np.testing.assert_allclose(ranks[name], values)

    plan = keep_best(
        groups, ranks, np.array([max(1, 2 * group.slots // 3) for group in groups])
    )
    pruned = cut_copy(model, list(groups), plan)
    assert places(pruned) == {"cuda"}
    assert pruned(x.to(OTHER)).device == OTHER


@pytest.mark.parametrize("head", ["mlp", "folded", "conv"])
def test_cut_networks_are_repaired(
    device: OtherDevice, dense_of: Callable[[str], SegFormer], head: str
) -> None:
    dense = dense_of(head)
    batches = list(torch.randn(3, 3, 64, 64).double().split(2))
    groups = find_groups(dense, batches[0][:1], {STEM}, heads=True).groups
    plan = keep_best(
        groups,
        score_channels(dense, groups),
        np.array([max(1, 2 * g.slots // 3) for g in groups]),
    )
    pruned = cut_copy(dense, list(groups), plan)

    repaired = repair(
        moved(pruned), moved(dense), groups, plan, batches
    )  # the images are moved by it
    assert places(repaired) == {"cuda"}
    assert_equal(repaired, repair(pruned, dense, groups, plan, batches))


def test_curves_are_measured_on_images_that_stand_in(
    device: OtherDevice, small_model: SegFormer
) -> None:
    dense = fold_decoder(small_model)
    model = moved(dense)
    batches = synthetic_images(model, (64, 64), count=3)
    assert {x.device for x in batches} == {OTHER}

    groups = find_groups(model, batches[0][:1], {STEM}).groups
    widths = [(group.slots // 2, group.slots) for group in groups]
    on_cpu = measure_curves(dense, groups, [x.cpu() for x in batches], widths)
    for curve, expected in zip(
        measure_curves(model, groups, batches, widths), on_cpu, strict=True
    ):
        assert curve.losses == pytest.approx(expected.losses, rel=1e-5)


def test_the_pruner_prunes(device: OtherDevice, small_model: SegFormer) -> None:
    pruned = L1Pruner(moved(small_model.float()), pruning_rate=0.4, repair=False).prune(
        torch.zeros(1, 3, 64, 64, device=OTHER)
    )
    assert places(pruned) == {"cuda"}
    assert_equal(
        pruned,
        L1Pruner(small_model, pruning_rate=0.4, repair=False).prune(torch.zeros(1, 3, 64, 64)),
    )


def test_branches_are_scored_and_removed(device: OtherDevice, small_model: SegFormer) -> None:
    model, batches = moved(small_model), noise((64, 64), count=2)
    ranks = branch_scores(model, batches)
    assert ranks == pytest.approx(branch_scores(small_model, batches))

    shallower = remove(model, [min(ranks, key=ranks.__getitem__)], batches)
    assert places(shallower) == {"cuda"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_shapes(tmp_path / "shapes", num_train=4, num_val=2, size=(48, 64), seed=5)
    return tmp_path / "shapes"


@pytest.mark.parametrize(
    "how",
    [
        EvalMode(input_shape=(64, 64), boundary=True),
        EvalMode("whole", scales=(0.75, 1.0), flip=True),
        EvalMode("slide", input_shape=(32, 48), scales=(1.0, 1.5)),
    ],
    ids=lambda how: how.mode,
)
def test_networks_are_evaluated(
    device: OtherDevice, small_model: SegFormer, data: Path, how: EvalMode
) -> None:
    samples, model = open_source(data).split("val"), small_model.float()
    score = evaluate(moved(model), samples, 5, how, device=OTHER, batch_size=2)
    assert score == evaluate(model, samples, 5, how, batch_size=2)


@pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning"
)  # there is no GPU to pin memory for
def test_networks_are_trained_and_training_is_resumed(device: OtherDevice, data: Path) -> None:
    """With all that takes part in a step: teacher, projections, average, clipping, class weights."""
    loss = {
        "loss": "ce+dice+lovasz+focal+ohem",
        "class_weights": (1.0,) * 8,
        "label_smoothing": 0.1,
    }
    config, splits = config_of(data, **loss, epochs=1, clip_norm=1.0, ema=0.9)
    teacher, model = tiny_model(seed=1), moved(tiny_model())

    def run(network: SegFormer, **options: Any) -> Score:
        accelerator = Accelerator(cpu=True)
        accelerator.state.device = OTHER
        try:
            return train(
                network, config, splits, accelerator=accelerator, teacher=teacher, **options
            )
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    states: list[TrainState] = []
    score = run(model, on_state=states.append)
    resumed = moved(tiny_model(seed=2))

    assert run(resumed, state=states[0]) == score
    assert places(model) == places(teacher) == places(resumed) == {"cuda"}
    assert_equal(model, resumed)
