"""Processes that load batches outlive every signal but their parent's, and outlive their parent by a moment only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from segprune.data.loading import load_batches

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create 2 worker processes"
)  # on one core
PACKAGE = Path(__file__).parents[2] / "segprune"
LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux says who sent a signal"
)


class Signalled(Dataset[int]):
    """Gives the number of the process that loads, which has signalled itself before."""

    def __init__(self, *numbers: signal.Signals) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        for number in self.numbers:
            os.kill(os.getpid(), number)
        return os.getpid()


def is_running(process: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        state = (
            Path(f"/proc/{process}/stat")
            .read_text(encoding="utf-8")
            .rpartition(")")[2]
            .split()[0]
        )
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_end(processes: list[int], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_running, processes)):
        assert time.monotonic() < deadline, processes
        time.sleep(0.01)


@LINUX
def test_workers_load_on_when_they_are_signalled() -> None:
    data = Signalled(signal.SIGTERM, signal.SIGINT)
    workers = torch.cat(list(load_batches(data, num_workers=2, batch_size=1))).tolist()
    assert len(workers) == 8
    assert len(set(workers)) == 2
    assert os.getpid() not in workers


@LINUX
def test_a_worker_is_deaf_from_its_first_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signalled right after the fork, before torch runs anything in the worker."""

    def signal_the_child(*arguments: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        original(*arguments)

    original = torch.utils.data._utils.worker._worker_loop
    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_loop", signal_the_child)
    assert len(list(load_batches(Signalled(), num_workers=2, batch_size=1))) == 8


@LINUX
def test_the_parent_ends_a_worker_by_terminating_it() -> None:
    batches = load_batches(Signalled(signal.SIGTERM), num_workers=1, batch_size=1)
    worker = int(next(batches))
    os.kill(worker, signal.SIGTERM)
    wait_for_end([worker])


@LINUX
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_when_their_parent_is_dead(by: signal.Signals) -> None:
    script = (
        "from segprune.data.loading import load_batches; from tests.data.test_loading import Signalled\n"
        "batches = load_batches(Signalled(), num_workers=2, batch_size=1)\n"
        "print(int(next(batches)), int(next(batches)), flush=True); input()"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command,
        cwd=PACKAGE.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(is_running, workers))
        os.killpg(process.pid, by) if by == signal.SIGTERM else os.kill(process.pid, by)
        assert process.wait() == -by
        wait_for_end(workers, 3.0)  # torch's own check takes up to 5 s


@pytest.mark.skipif(
    not hasattr(signal, "pthread_sigmask"), reason="there is no mask of signals"
)
def test_a_signal_that_comes_while_workers_start_is_delivered_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = []

    def press_and_start(loader: DataLoader[int]) -> Any:
        signal.raise_signal(signal.SIGINT)
        started.append(True)
        return original(loader)

    original = DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", press_and_start)
    with pytest.raises(KeyboardInterrupt):
        next(load_batches(Signalled(), num_workers=0, batch_size=1))
    assert started == [True]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}


def test_without_workers_this_process_loads_and_keeps_its_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    processes = torch.cat(list(load_batches(Signalled(), num_workers=0, batch_size=3))).tolist()
    assert processes == [os.getpid()] * 8
    assert get_worker_info() is None
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_every_loader_of_the_package_is_made_in_one_place() -> None:
    users = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if "DataLoader" in path.read_text(encoding="utf-8")
    ]
    assert users == ["loading.py"]
