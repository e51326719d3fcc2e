"""What most tests share: one thread, one seed, a small network and weights as training would leave them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.trained_like import fill
from segprune.model import SegFormer
from segprune.spec import BlockSpec, Numerics, Spec, StageSpec


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_spec() -> Spec:
    """Every feature of a SegFormer in 170 thousand parameters; few widths are equal that need not be."""
    stages = [
        StageSpec(
            16, 7, 4, 8, (BlockSpec(1, 16, 12, 40, 16, 0.25), BlockSpec(1, 12, 16, 48, 14, 0.3))
        ),
        StageSpec(24, 3, 2, 4, (BlockSpec(2, 12, 10, 64, 20, 0.2),)),
        StageSpec(
            40, 3, 2, 2, (BlockSpec(4, 10, 8, 96, 36, 0.35), BlockSpec(4, 8, 10, 80, 40, 0.3))
        ),
        StageSpec(48, 3, 2, 1, (BlockSpec(4, 12, 14, 128, None, 0.3),)),
    ]
    return Spec(
        "b0", 5, tuple(stages), (32, 28, 36, 30), 44, Numerics(drop_path=0.0, head_dropout=0.0)
    )


@pytest.fixture(scope="session")
def conv_spec(small_spec: Spec) -> Spec:
    """The same with mmsegmentation's kind of decode head."""
    return replace(small_spec, head="conv")


@pytest.fixture(scope="session")
def trained_like() -> Callable[[nn.Module], nn.Module]:
    """Fill every parameter and buffer, biases and BatchNorm statistics too, so that nothing hides behind a zero."""

    return fill


@pytest.fixture
def small_model(small_spec: Spec, trained_like: Callable[[nn.Module], nn.Module]) -> SegFormer:
    """The small network in float64 and evaluation mode, with trained-like weights."""
    model = trained_like(SegFormer(small_spec).double().eval())
    assert isinstance(model, SegFormer)
    return model


@pytest.fixture
def conv_model(conv_spec: Spec, trained_like: Callable[[nn.Module], nn.Module]) -> SegFormer:
    model = trained_like(SegFormer(conv_spec).double().eval())
    assert isinstance(model, SegFormer)
    return model
