"""Times of single steps in one place, each measured once and kept in a file.

A file belongs to one device, precision, way of measuring, number of threads and version of torch. It is only a cache:
one that is damaged, or of another place, is measured anew and written over.
"""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from segprune.files import check_writable, read_json, write_json
from segprune.pruning.budget.latency.steps import Place, Shape, build_step
from segprune.timing import (
    Call,
    GraphRecorder,
    Precision,
    Progress,
    Turn,
    tf32_products,
    time_in_turns,
)

Measure = Callable[[Sequence[Shape], Place, Progress | None], list[float]]
FORMAT = 2
MIN_ROUNDS, MAX_ROUNDS = (
    3,
    7,
)  # in each of which every shape is timed once, after a round that only warms up
MAX_SECONDS = 30.0  # no further round is begun after that
GRAPH_STEPS = 20  # of a shape in one CUDA graph, so that the launch of the graph hardly counts


class LatencyTable:
    """Times in ms of shapes on `device`. With `folder` they are kept there; without, they last as long as the table.

    `measure` times a list of shapes: see `measure_shapes`.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        folder: str | os.PathLike[str] | None = None,
        *,
        measure: Measure | None = None,
    ) -> None:
        self.place = Place(torch.device(device), precision)
        self._measure = measure_shapes if measure is None else measure

        on_gpu = self.place.device.type == "cuda"

        # All that times depend on beside the shape. A file with another header is not used.
        self._header = {
            "format": FORMAT,
            "device": _device_name(self.place.device),
            "precision": precision,
            "method": "cuda graph" if on_gpu else "eager",
            "threads": None if on_gpu else torch.get_num_threads(),
            "torch": torch.__version__,
        }

        # The same words name the file, so that several machines can share a folder.
        words = [str(value) for value in self._header.values() if value is not None]
        name = re.sub(r"[^\w.+]+", "-", "-".join(words))
        self.path = None if folder is None else Path(folder) / f"latency-{name}.json"
        self._times = {} if self.path is None else _read(self.path, self._header)

    def require(self, shapes: Iterable[Shape], progress: Progress | None = None) -> None:
        """Measures those of the shapes that the table does not have yet, and writes the file.

        Raises OSError, before anything is measured, if it cannot be written. `progress` is given how many timings are
        done, and of how many.
        """
        # Sorted, so that the order of measuring does not depend on hashes.
        missing = sorted({shape for shape in shapes if str(shape) not in self._times}, key=str)
        if not missing:
            return
        if self.path is not None:
            check_writable(self.path.parent)

        times = self._measure(missing, self.place, progress)
        self._times |= {str(shape): ms for shape, ms in zip(missing, times, strict=True)}

        if self.path is not None:
            write_json(self._header | {"times_ms": self._times}, self.path)

    def time_ms(self, shape: Shape) -> float:
        """Raises KeyError for a shape that was never required."""
        return self._times[str(shape)]


def default_folder() -> Path:
    """Returns segprune's folder where this system keeps a user's caches. It is not made here."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "segprune"


def measure_shapes(
    shapes: Sequence[Shape], place: Place, progress: Progress | None = None
) -> list[float]:
    """Returns the median ms of each shape over rounds that time all of them in turn.

    So a shape finds the caches as other work left them, like in a network, and a disturbance of the machine falls on
    one round of many shapes instead of on all runs of a few.
    """
    on_gpu = place.device.type == "cuda"
    with tf32_products(place.precision == "tf32"), torch.inference_mode():
        # A step is built anew for each turn: all of them together may not fit into memory.
        if on_gpu:
            recorder = GraphRecorder(place.device)
            turns = [
                Turn(partial(_record, shape, place, recorder), place.device, GRAPH_STEPS)
                for shape in shapes
            ]
        else:
            turns = [Turn(partial(build_step, shape, place), place.device) for shape in shapes]

        rows = time_in_turns(
            turns,
            min_rounds=1 + MIN_ROUNDS,
            max_rounds=1 + MAX_ROUNDS,
            max_seconds=MAX_SECONDS,
            progress=progress,
        )

    # The first round only warms up.
    return [statistics.median(times_ms[1:]) for times_ms in rows]


def _record(shape: Shape, place: Place, recorder: GraphRecorder) -> Call:
    return recorder.record(build_step(shape, place), GRAPH_STEPS)


def _device_name(device: torch.device) -> str:
    """Returns the GPU's or the processor's model: a home folder may be shared by several machines."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)

    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""

    # Linux names the processor in this file. Elsewhere the platform module has to do.
    line = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = line[1] if line else platform.processor() or platform.machine()
    return f"{device.type} {name}"


def _read(path: Path, header: dict[str, Any]) -> dict[str, float]:
    """Returns the times in the file; none where it is missing, damaged or has another header."""
    try:
        data = read_json(path, "a table of times")
        times = data.pop("times_ms")

        # A time that is no positive number would spoil every prediction made with it.
        good = all(type(ms) is float and math.isfinite(ms) and ms > 0 for ms in times.values())
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}
    return times if good and data == header else {}
