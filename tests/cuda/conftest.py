"""What needs a GPU: each test says so by the marker `cuda`, and is skipped with the reason where there is none.

`make test-cuda` runs them, on a machine that need have no more than torch and the wheels that were carried to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from segprune.checkpoint import save
from segprune.cli.console import console
from segprune.data import write_shapes
from segprune.model import SegFormer
from segprune.spec import standard_spec


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        pytest.skip(f"PyTorch {torch.__version__}, built {built}, sees no GPU here")


@pytest.fixture(autouse=True)
def _wide_console_and_fresh_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(console, "width", 300)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 images to train on and 4 to score, 64×64; never changed by a test."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, num_train=8, num_val=4, size=(64, 64), seed=5)
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A b0 of 8 classes that says it was trained with a learning rate of 1e-3."""
    path = tmp_path_factory.mktemp("dense") / "b0.pth"
    torch.manual_seed(3)
    model = SegFormer(standard_spec("b0", 8))
    nn.init.normal_(
        model.decode_head.classifier.weight
    )  # so that no class is everywhere the highest
    save(model, path, extra={"lr": 1e-3})
    return path
