"""What the commands' tests share: generated data, a dense b0 and a small network in files, a wide console."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from segprune import timing
from segprune.checkpoint import read, save
from segprune.cli import eval as eval_command
from segprune.cli import sweep as sweep_command
from segprune.cli.console import console
from segprune.cli.prune import command as prune_command
from segprune.cli.train import command as train_command
from segprune.data import write_shapes
from segprune.model import SegFormer
from segprune.spec import Numerics, Spec, standard_spec


@pytest.fixture(autouse=True)
def _wide_console_and_fresh_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(console, "width", 300)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def draws_images() -> None:
    """For tests of what happens where no images are given."""


@pytest.fixture(autouse=True)
def _no_images_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing images, and the plan and the repair with them, takes ten seconds: only where a test is about it."""
    if "draws_images" not in request.fixturenames:
        monkeypatch.setattr(prune_command, "may_draw_images", lambda *records: False)


@pytest.fixture
def makes_page() -> None:
    """For tests of the report page."""


@pytest.fixture(autouse=True)
def _no_page_made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page takes a second, after every run: only where a test is about it."""
    if "makes_page" not in request.fixturenames:
        for module in (prune_command, train_command, eval_command, sweep_command):
            monkeypatch.setattr(module, "make_page", lambda folder, device: None)


@pytest.fixture(autouse=True)
def _few_passes_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a pass takes is of no interest here, and thirty of each network take seconds."""
    time_in_turns = timing.time_in_turns

    def time_few(turns: Sequence[timing.Turn], *, max_rounds: int, **rest: Any) -> object:
        return time_in_turns(turns, max_rounds=min(max_rounds, timing.MIN_ROUNDS), **rest)

    monkeypatch.setattr(timing, "time_in_turns", time_few)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 pictures to train on and 3 to score, 32×32; never changed by a test."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, num_train=8, num_val=3, size=(32, 32), seed=5)
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A b0 with hidden layers of half the width, for speed; it says it was trained with a learning rate of 1e-3."""
    path = tmp_path_factory.mktemp("dense") / "b0.pth"
    torch.manual_seed(3)
    spec = standard_spec("b0", 8)
    stages = []
    for stage in spec.stages:
        blocks = tuple(replace(block, ffn_dim=2 * stage.width) for block in stage.blocks)
        stages.append(replace(stage, blocks=blocks))
    model = SegFormer(replace(spec, stages=tuple(stages)))
    nn.init.normal_(
        model.decode_head.classifier.weight
    )  # so that no class is everywhere the highest
    save(model, path, extra={"lr": 1e-3})
    return path


@pytest.fixture
def small(
    small_spec: Spec, trained_like: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> Path:
    """The small network with 8 classes and all that is random in training; good for what does not prune."""
    spec = replace(small_spec, num_classes=8, numerics=Numerics(drop_path=0.2))
    model = trained_like(SegFormer(spec))
    assert isinstance(model, SegFormer)
    save(model, tmp_path / "small.pth", extra={"lr": 1e-2})
    return tmp_path / "small.pth"


@pytest.fixture
def teacher(
    small: Path, trained_like: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> Path:
    """Another network of the small one's shape, without a word on its training."""
    model = trained_like(SegFormer(read(small).spec))
    assert isinstance(model, SegFormer)
    save(model, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"
