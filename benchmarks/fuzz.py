"""Damaged and hostile inputs by the thousand, as a night's run: none may end in a traceback, hang, or run code.

    python -m benchmarks.fuzz --cases 20000 --seed 1
    python -m benchmarks.fuzz --cases 500 --seed 7 --kind specs

The kinds of input and their readers are those of tests/fuzzing.py. Every case runs in this process, under a limit of
time and of memory (on Unix). For each kind are printed: the number of cases, how many were refused, seconds, the slowest
case and the largest memory so far. A defect is printed with its smallest example; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzzing import HARMED, REFUSALS, Case, Target, list_targets

SECONDS = 20  # for one case
GIGABYTES = 6  # of address space beyond what the imports take


class Hang(BaseException):
    """A case took longer than it may; no reader catches this."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="one kind alone")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    targets = list_targets()
    kinds = [arguments.kind] if arguments.kind else list(targets)
    _limit_memory()

    num_defects = 0
    print("kind            cases refused seconds slowest  memory")
    for kind in kinds:
        number = arguments.cases * targets[kind].weight // sum(targets[k].weight for k in kinds)
        num_defects += not _run_kind(kind, targets[kind], number, arguments.seed)
    print(f"seed {arguments.seed}: {num_defects} of {len(kinds)} kinds with a defect")
    sys.exit(num_defects > 0)


def _run_kind(kind: str, target: Target, number: int, start: int) -> bool:
    """Runs so many cases, prints a row, and returns whether all were read or refused."""
    tally = {"cases": 0, "refused": 0}
    slowest = 0.0

    def stop(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        folder = Path("files")
        folder.mkdir()

        @seed(start)
        @settings(
            max_examples=number,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(target.cases)
        def read(case: Case) -> None:
            nonlocal slowest
            begun, sentence = time.perf_counter(), "read"
            signal.alarm(SECONDS)
            try:
                target.read(case.data, folder)
            except REFUSALS as refusal:
                tally["refused"] += 1
                sentence = str(refusal)
            finally:
                signal.alarm(0)
            assert sentence, "a refusal without a sentence"
            tally["cases"] += 1
            slowest = max(slowest, time.perf_counter() - begun)
            assert os.listdir() == ["files"], f"something was written outside: {os.listdir()}"

        good = True
        try:
            read()
        except (Exception, Hang):
            good = False
            traceback.print_exc(limit=-6)
        harmed = Path(HARMED).exists()
        os.chdir("/")

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"{kind:15} {tally['cases']:5} {tally['refused']:7} {time.perf_counter() - begin:7.1f} "
        f"{slowest:7.2f} {memory:4} MB  {'ok' if good and not harmed else 'DEFECT'}",
        flush=True,
    )
    return good and not harmed


def _limit_memory() -> None:
    # What is mapped by now is mostly libraries and never touched.
    status = Path("/proc/self/statm")
    mapped = (
        int(status.read_text().split()[0]) * resource.getpagesize() if status.exists() else 0
    )
    limit = mapped + (GIGABYTES << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
