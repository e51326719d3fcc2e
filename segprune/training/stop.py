"""Signals that end a run between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """Yields a flag that the first Ctrl-C or SIGTERM sets, so that a step is never cut in half.

    A second Ctrl-C ends at once.
    """
    flag = threading.Event()
    # Python allows signal handlers in the main thread only; elsewhere nothing is caught.
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    # The handler only sets a flag; the loop looks at it between two steps.
    def handle(number: int, frame: FrameType | None) -> None:
        if flag.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.set()

    # Keep the handlers that were there, such as a server's, and give them back afterwards.
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, handle) for number in signals]
    try:
        yield flag
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
