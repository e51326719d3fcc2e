"""Two processes with synced BatchNorm against one process that has the whole batch, in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from segprune.training.sync import SyncedBatchNorm2d, synced

ROOT = Path(__file__).parents[2]
SPLIT = (2, 3)  # images of the first process and of the second
TIMEOUT_S = 120


def network() -> nn.Sequential:
    """BatchNorm as usual, without weights and with a cumulative average, and without statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.GELU(),
        nn.BatchNorm2d(4, momentum=None, affine=False),
        nn.Conv2d(4, 5, 1),
        nn.BatchNorm2d(5, track_running_stats=False),
        nn.Conv2d(5, 2, 1),
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def images() -> Tensor:
    torch.manual_seed(1)
    return (
        2 * torch.randn(sum(SPLIT), 3, 6, 5, dtype=torch.float64)
        + torch.arange(5.0)[:, None, None, None]
    )


def trained(model: nn.Module, own: slice) -> dict[str, Any]:
    """Two forward and backward passes on the own images."""
    x = images()[own].requires_grad_()
    target = torch.sin(torch.arange(sum(SPLIT) * 24.0, dtype=torch.float64)).view(5, 2, 4, 3)[
        own
    ]
    for _ in range(2):
        out = model.train()(x)
        (
            out * target + out**3
        ).sum().backward()  # the processes' losses add up to the whole batch's
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "out": out.detach(),
        "x": x.grad,
        "gradients": gradients,
        "state": model.state_dict(),
    }


def work(rank: int, folder: str) -> None:
    """What each of the two processes runs; it leaves its results in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SPLIT)
    )
    try:
        model, own = network(), slice(sum(SPLIT[:rank]), sum(SPLIT[: rank + 1]))
        with synced(model):
            results = trained(model, own)
            results["half"] = SyncedBatchNorm2d(3)(images()[own].bfloat16()).detach()
            if rank == 0:
                model.eval()(images()[own])  # in evaluation it waits for nobody
        torch.save(results, f"{folder}/{rank}.pth")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_processes")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment)
        for rank in range(len(SPLIT))
    ]
    try:
        assert [process.wait(TIMEOUT_S) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()  # where one failed, the other waits for it
            process.wait()
    return [torch.load(folder / f"{rank}.pth") for rank in range(len(SPLIT))]


@pytest.fixture
def whole() -> dict[str, Any]:
    return trained(network(), slice(None))


def test_two_processes_give_the_outputs_and_input_gradients_of_one(
    both: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    for key in ("out", "x"):
        torch.testing.assert_close(
            torch.cat([results[key] for results in both]), whole[key], rtol=1e-9, atol=1e-9
        )


def test_the_processes_gradients_add_up_to_those_of_one(
    both: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    one, other = (results["gradients"] for results in both)
    assert one.keys() == whole["gradients"].keys()
    for name, gradient in whole["gradients"].items():
        torch.testing.assert_close(one[name] + other[name], gradient, rtol=1e-9, atol=1e-9)


def test_both_processes_keep_the_running_statistics_of_one(
    both: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    assert torch.equal(both[0]["state"]["1.running_var"], both[1]["state"]["1.running_var"])
    for results in both:
        torch.testing.assert_close(results["state"], whole["state"], rtol=1e-12, atol=1e-12)


def test_half_precision_maps_stay_so_and_are_normalised_in_float32(
    both: list[dict[str, Any]],
) -> None:
    expected = nn.BatchNorm2d(3)(images().bfloat16().float())
    out = torch.cat([results["half"] for results in both])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected.detach(), rtol=1e-2, atol=1e-2)


def test_synced_changes_classes_only_and_changes_them_back() -> None:
    model = network()
    modules, tensors = (
        list(model.modules()),
        {**dict(model.named_parameters()), **dict(model.named_buffers())},
    )
    names = list(model.state_dict())
    with synced(model):
        assert [type(model[i]) for i in (1, 3, 5)] == [SyncedBatchNorm2d] * 3
        assert list(model.modules()) == modules
        assert list(model.state_dict()) == names
        inside = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert all(inside[name] is tensor for name, tensor in tensors.items())
    assert [type(model[i]) for i in (1, 3, 5)] == [nn.BatchNorm2d] * 3
    with pytest.raises(RuntimeError, match="stopped"), synced(model):
        raise RuntimeError("stopped")
    assert type(model[1]) is nn.BatchNorm2d


def test_subclasses_of_others_are_left_alone() -> None:
    class Theirs(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Theirs(3))
    with synced(model):
        assert type(model[0]) is Theirs


def test_one_process_computes_torch_s_batch_norm_to_the_bit(whole: dict[str, Any]) -> None:
    model = network()
    with synced(model):
        alone = trained(model, slice(None))
    for key in ("out", "x"):
        assert torch.equal(alone[key], whole[key])
    for key in ("gradients", "state"):
        assert all(torch.equal(alone[key][name], tensor) for name, tensor in whole[key].items())


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
