"""How fast networks run, and in what memory: files × runtimes × dtypes × sizes × batches × threads, in turns.

cases    what is measured, and what of it cannot be; checkpoints exported for the runtimes that need it
opened   one case open and ready to run
memory   the peak of one case, in a process of its own
rounds   all cases in turns, and the rows that come of it
"""

from segprune.benchmark.cases import DTYPES, OUTPUTS, RUNTIMES, Case, export_cases, grid
from segprune.benchmark.memory import peak_memory
from segprune.benchmark.opened import Opened, open_case
from segprune.benchmark.rounds import Row, measure

__all__ = [
    "DTYPES",
    "OUTPUTS",
    "RUNTIMES",
    "Case",
    "Opened",
    "Row",
    "export_cases",
    "grid",
    "measure",
    "open_case",
    "peak_memory",
]
