"""What a run takes from a real GPU where no flag was given, and that only training steps take TF32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from segprune.checkpoint import save
from segprune.data import write_shapes
from segprune.inference.evaluate import Tally
from segprune.machine import choose_amp, has_bf16, has_tf32
from segprune.runs.folder import Journal
from tests.commands import SIZE, done, results_in
from tests.training.tiny import tiny_model

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "shapes", num_train=8, num_val=3, size=(32, 32), seed=5)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    save(tiny_model(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


def product_error(device: torch.device) -> float:
    """Of a product of float32 against float64, relative: below 1e-5 if it is exact, above 1e-4 in TF32."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 512, 512, dtype=torch.float64)
    exact = a @ b
    product = (a.float().to(device) @ b.float().to(device)).double().cpu()
    return float((product - exact).norm() / exact.norm())


def test_what_the_gpu_is_said_to_have_is_what_its_generation_has() -> None:
    modern = torch.cuda.get_device_capability() >= (8, 0)
    assert has_bf16(CUDA) == has_tf32(CUDA) == modern
    assert choose_amp(CUDA) == ("bf16" if modern else "fp16")


# PyTorch 2.11's inductor uses what PyTorch 2.11 itself calls deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [(), ("--compile",)], ids=["eager", "compiled"])
def test_training_takes_tf32_in_its_steps_alone(
    monkeypatch: pytest.MonkeyPatch,
    data: Path,
    small: Path,
    tmp_path: Path,
    compiled: tuple[str, ...],
) -> None:
    errors: dict[str, list[float]] = {"steps": [], "scores": []}
    step_done, update = Journal.step_done, Tally.update

    def in_a_step(journal: Journal, *values: float) -> None:
        errors["steps"].append(product_error(CUDA))
        step_done(journal, *values)  # type: ignore[arg-type]

    def in_a_score(tally: Tally, *values: torch.Tensor) -> None:
        errors["scores"].append(product_error(CUDA))
        update(tally, *values)

    monkeypatch.setattr(Journal, "step_done", in_a_step)
    monkeypatch.setattr(Tally, "update", in_a_score)
    flags = (
        "--model_path",
        small,
        "--data",
        data,
        *SIZE,
        "--num_workers",
        0,
        "--batch_size",
        4,
        "--epochs",
        1,
    )
    out = done(
        "train", *flags, *compiled, "--amp", "no", "--cuda", "--save_dir", tmp_path / "out"
    )
    assert "TensorFloat32" not in out
    assert results_in(tmp_path / "out")["settings"]["tf32"] == has_tf32(CUDA)
    assert max(errors["scores"]) < 1e-5
    assert (min(errors["steps"]) > 1e-4) == has_tf32(CUDA)


def test_a_run_on_a_gpu_says_and_saves_what_was_chosen(
    data: Path, small: Path, tmp_path: Path
) -> None:
    flags = ("--model_path", small, "--data", data, *SIZE, "--batch_size", 4, "--epochs", 1)
    out = done("train", *flags, "--cuda", "--save_dir", tmp_path / "out")
    settings = results_in(tmp_path / "out")["settings"]
    assert f"--amp {settings['amp']}" in out
    assert f"--num_workers {settings['num_workers']}" in out
    assert settings["amp"] == choose_amp(CUDA)
    assert settings["num_workers"] >= 1
