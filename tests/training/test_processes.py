"""Several processes share the batches of one: they take the same steps, or say why they cannot."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from segprune.training.loop import train
from tests.training.tiny import (
    Pointwise,
    config_of,
    losses_of,
    quiet_model,
    same,
    taught,
    tiny_model,
    weights_of,
)


def test_processes_that_accelerate_did_not_join_are_refused(
    data: Path, cpu: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match="4 processes were started but only 1 joined; start them with torchrun"
    ):
        train(Pointwise(), *config_of(data), accelerator=cpu)


def test_sharding_the_network_itself_is_refused(
    data: Path, cpu: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch --use_fsdp does
    with pytest.raises(
        ValueError,
        match=r"FSDP was asked for, but .*; leave it out and start with torchrun, which gives",
    ):
        train(Pointwise(), *config_of(data), accelerator=cpu)


@pytest.mark.parametrize(
    ("processes", "changes", "said"),
    [
        (
            9,
            {"batch_size": 9},
            "8 training images came for 9 processes and 1 pieces; start fewer, so that each gets",
        ),
        (
            2,
            {"batch_size": 3},
            "`batch_size` is 3, which 2 processes and 1 pieces do not share evenly; make it a multiple of 2",
        ),
        (
            2,
            {"accumulate": 2},
            "`batch_size` is 2, which 2 processes and 2 pieces do not share evenly; make it a multiple of 4",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    data: Path, processes: int, changes: dict[str, Any], said: str
) -> None:
    several = SimpleNamespace(
        num_processes=processes,
        process_index=0,
        mixed_precision="no",
        is_main_process=True,
        device=torch.device("cpu"),
    )
    with pytest.raises(ValueError, match=said):
        train(tiny_model(), *config_of(data, **changes), accelerator=several)


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from tests.training.tiny import losses_of, quiet_model, taught, weights_of

data, out = Path(sys.argv[1]), Path(sys.argv[2])
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = quiet_model()
losses, score = losses_of(model, taught(data), accelerator, quiet_model(7))
record = {"weights": weights_of(model), "losses": losses, "miou": score.miou, "iou": score.iou}
torch.save(record, out / f"{accelerator.process_index}.pt")
accelerator.end_training()
"""


def test_two_processes_take_the_steps_of_one_with_the_same_batch(
    tmp_path: Path, data: Path, cpu: Accelerator
) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)

    # What torchrun sets for its processes, without its own seconds of imports.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    processes = []
    for rank in ("0", "1"):
        own = environment | {"RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, script, data, tmp_path]
        processes.append(subprocess.Popen(command, env=own))
    assert [process.wait(timeout=900) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{process}.pt") for process in (0, 1))
    assert same(first["weights"], second["weights"])
    assert (first["losses"], first["iou"]) == (second["losses"], second["iou"])

    alone = quiet_model()
    losses, score = losses_of(alone, taught(data), cpu, quiet_model(7))
    assert first["losses"] == pytest.approx(losses, rel=1e-4)
    for name, tensor in weights_of(alone).items():
        torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-3, atol=1e-4)
    assert first["miou"] == pytest.approx(score.miou, abs=0.01)
