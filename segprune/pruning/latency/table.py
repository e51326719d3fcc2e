"""Times of single steps on one device, each measured once and kept in a file.

A file belongs to one device, dtype, number of threads and version of torch; it is only a cache, so one that is damaged
or another's is measured anew and written over.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from segprune.files import check_writable, write_json
from segprune.pruning.latency.steps import Place, Runner, Shape, prepare

Progress = Callable[[int, int], None]
Measure = Callable[[Sequence[Shape], Place, Progress | None], list[float]]
FORMAT = 1
MIN_ROUNDS, MAX_ROUNDS = 3, 7  # in each of which every shape is timed once, behind one that only warms up
MAX_SECONDS = 30.0  # no further round is begun after that
CUDA_CALLS = 10  # back to back, so that launches overlap with work as in a network


class LatencyTable:
    """Times in ms of shapes on `device`. With `folder` they are kept there; without, they last as long as the table.

    `measure` times a list of shapes: see `measure_shapes`.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        folder: str | os.PathLike[str] | None = None,
        *,
        measure: Measure | None = None,
    ) -> None:
        self.place = Place(torch.device(device), dtype)
        self._measure = measure_shapes if measure is None else measure
        self._header = {
            "format": FORMAT,
            "device": _device_name(self.place.device),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        name = re.sub(r"[^\w.+]+", "-", "-".join(str(value) for value in self._header.values()))
        self.path = None if folder is None else Path(folder) / f"latency-{name}.json"
        self._times = {} if self.path is None else _read(self.path, self._header)

    def require(self, shapes: Iterable[Shape], progress: Progress | None = None) -> None:
        """Measure those of the shapes that the table does not have yet, and write the file.

        OSError, before anything is measured, if it cannot be written. `progress` gets how many timings are done, and
        of how many.
        """
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
        """KeyError for a shape that was never required."""
        return self._times[str(shape)]


def default_folder() -> Path:
    """Where caches of this user lie by the system's custom: segprune's folder there. It is not made here."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "segprune"


def measure_shapes(shapes: Sequence[Shape], place: Place, progress: Progress | None = None) -> list[float]:
    """Median ms of each shape over rounds that time all of them in turn.

    So a shape finds the caches as other work left them, like in a network, and a disturbance of the machine falls on
    one round of many shapes instead of on all runs of a few.
    """
    times: list[list[float]] = [[] for _ in shapes]
    start = time.perf_counter()
    total = (1 + MAX_ROUNDS) * len(shapes)
    with torch.inference_mode():
        for i in range(1 + MAX_ROUNDS):
            if i > MIN_ROUNDS and time.perf_counter() - start > MAX_SECONDS:
                break
            for j, (shape, row) in enumerate(zip(shapes, times, strict=True)):
                row.append(_time_ms(prepare(shape, place), place.device))
                if progress is not None:
                    progress(i * len(shapes) + j + 1, total)
    if progress is not None:
        progress(total, total)
    return [statistics.median(row[1:]) for row in times]


def _time_ms(run: Runner, device: torch.device) -> float:
    calls = 1
    if device.type == "cuda":
        calls = CUDA_CALLS
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3 / calls


def _device_name(device: torch.device) -> str:
    """The GPU's or the processor's model: a home folder may be shared by several machines."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{device.type} {name}"


def _read(path: Path, header: dict[str, Any]) -> dict[str, float]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        times = data.pop("times_ms")
        good = all(type(ms) is float and math.isfinite(ms) and ms > 0 for ms in times.values())
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}
    return times if good and data == header else {}
