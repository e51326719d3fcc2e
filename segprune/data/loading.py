"""Batches that worker processes load, whatever signals the group of processes gets.

systemd, Slurm, `timeout` and a terminal's Ctrl-C signal all processes of a run at once. Only the main process knows
how the run should end then, so workers outlive these signals, and end when the main process says so or is dead. They
start with the signals blocked, so that there is no moment before the rule holds.

Where the system cannot tell who sent a signal (macOS, Windows), SIGTERM still ends a worker, and Ctrl-C does not.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader

_KNOWS_SENDERS = hasattr(signal, "sigtimedwait")
_BLOCKED = {signal.SIGINT, signal.SIGTERM} if _KNOWS_SENDERS else {signal.SIGINT}
_POLL_SECONDS = 0.2  # how long workers outlive the main process


def load_batches(data: Any, *, num_workers: int, **options: Any) -> Iterator[Any]:
    """Yields the batches of a torch DataLoader with these options, its workers shielded from signals.

    All of the package's batches come from here.
    """
    # Workers start when the iterator is made, so the signals are blocked for just that.
    loader: DataLoader[Any] = DataLoader(
        data, num_workers=num_workers, worker_init_fn=_shield_worker, **options
    )
    with _signals_blocked():
        batches = iter(loader)
    yield from batches


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Postpones the signals of this thread to the end of the block; processes started within it inherit the block."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return

    # Restore the earlier mask rather than unblock: the caller may have blocked them too.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shield_worker(worker: int) -> None:
    """Lets the worker live on when its group is signalled. Called in each worker before it loads anything."""
    # Ctrl-C reaches the main process as well, which then ends the workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _print_unless_orphaned
    if _KNOWS_SENDERS:
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _print_unless_orphaned(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints an error of the worker's background threads, as Python does, but not that its parent died.

    A parent that is killed while it fetches a batch breaks the connection to the thread that hands tensors over.
    """
    parent = multiprocessing.parent_process()
    if isinstance(error, (ConnectionError, EOFError)) and parent is not None:
        # Its connections close a moment before it counts as dead.
        parent.join(_POLL_SECONDS)
        if not parent.is_alive():
            return
    sys.__excepthook__(kind, error, trace)


def _end_with_parent() -> None:
    """Ends the process when its parent terminates it, or is dead. SIGTERM from others is taken and forgotten."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    while parent.is_alive():
        # SIGTERM is blocked in all threads, so it waits here, with the number of the process that sent it.
        received = signal.sigtimedwait({signal.SIGTERM}, _POLL_SECONDS)
        if received is not None and received.si_pid == parent.pid:
            break

    os._exit(0)
