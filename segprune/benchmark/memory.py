"""The peak memory of one case, in a fresh process of its own: in this one, what others freed would hide it.

On the CPU it is by how much the resident memory of the process grows from before the file is opened to the highest
point of two passes after the warm-up: weights, the runtime's own state and what a pass allocates, without the code of
the libraries. Linux tells it, other systems do not. On a GPU it is the most that PyTorch had allocated there.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from segprune.benchmark.cases import PACKAGE_OF, Case
from segprune.benchmark.opened import open_case
from segprune.export.runtimes import require

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(case: Case) -> int | None:
    """Returns bytes; None where the system does not tell. Raises MemoryError where the process was killed."""
    if case.device == "cpu" and not STATUS.exists():
        return None

    # A new process for each case: memory that was freed here would count as there already.
    context = multiprocessing.get_context("spawn")  # a fork would begin with all that is here
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure, case).result()
        except BrokenProcessPool as error:
            raise MemoryError(
                f"{case.text} was killed, most likely for memory; give smaller `sizes` or `batch_sizes`."
            ) from error


def _measure(case: Case) -> int:
    if case.device != "cpu":
        # On a GPU the allocator's count is exact: one pass after the warm-up is enough.
        opened = open_case(case)
        torch.cuda.reset_peak_memory_stats()
        opened.run()
        return torch.cuda.max_memory_allocated()

    # Load the runtime's library first, since its code is not what is measured.
    if case.runtime in PACKAGE_OF:
        require(PACKAGE_OF[case.runtime], "Measuring it")
    before = _resident("VmRSS")
    opened = open_case(case)

    # The peak begins anew: what reading the file took does not belong to a pass.
    CLEAR.write_text("5")
    for _ in range(2):
        opened.run()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Returns bytes of resident memory, VmRSS now or VmHWM at its peak; see proc(5)."""
    # Lines read "VmRSS:    1234 kB".
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024
