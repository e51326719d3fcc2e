"""`segprune benchmark FILE …`: files side by side over runtimes, dtypes, sizes, batches and threads, in turns.

benchmark.json   all rows with every number, the settings, the machine's measured peaks
benchmark.csv    the rows
benchmark.png    mIoU, or without --data MACs, against latency
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, TypeVar

import torch
from typer import Argument, Option

from segprune import checkpoint
from segprune.benchmark import (
    DTYPES,
    RUNTIMES,
    Case,
    Opened,
    Row,
    export_cases,
    grid,
    measure,
    open_case,
    peak_memory,
)
from segprune.cli.console import (
    choose_device,
    console,
    number_of,
    open_data,
    progress_bar,
    quiet_exporters,
    show_notes,
    show_settings,
    show_table,
)
from segprune.cli.flags import Layout, switch
from segprune.data import Sample
from segprune.export import is_exported, open_exported
from segprune.files import check_writable, write_csv, write_json
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.runs.records import benchmark_record, environment
from segprune.timing import tf32_products

T = TypeVar("T")
RECORD, TABLE, PLOT = "benchmark.json", "benchmark.csv", "benchmark.png"
COLUMNS = {  # of the table, from the record's keys
    "file": "file",
    "runtime": "runtime",
    "dtype": "dtype",
    "input_shape": "size",
    "batch": "batch",
    "threads": "threads",
    "median_ms": "median ms",
    "p90_ms": "p90",
    "p99_ms": "p99",
    "eager_ms": "eager ms",
    "images_per_second": "images/s",
    "faster": "× faster",
    "peak_memory_mb": "memory MB",
    "macs_G": "GMACs",
    "gmacs_per_second": "GMAC/s",
    "peak_share": "of peak",
    "miou": "mIoU",
}
MEASURED = tuple(COLUMNS)[6:]
SPARE = ("p99_ms", "gmacs_per_second", "p90_ms", "images_per_second", "peak_share", "macs_G")  # where there is no room


@dataclass(frozen=True)
class BenchmarkConfig:
    model_paths: Annotated[
        list[str],
        Argument(metavar="FILE...", help="Checkpoints of any dialect, and files that segprune export wrote."),
    ]
    runtimes: Annotated[
        str, Option("--runtimes", help=f"Of {', '.join(RUNTIMES)}, as a,b; if not given, torch for checkpoints.")
    ] = ""
    dtypes: Annotated[str, Option("--dtypes", help=f"Of {', '.join(DTYPES)}, in which checkpoints compute.")] = "fp32"
    sizes: Annotated[str, Option("--sizes", metavar="HxW,…", help="Heights and widths, as 512x512,1024x512.")] = (
        "512x512"
    )
    batch_sizes: Annotated[str, Option("--batch_sizes", metavar="B,…", help="Pictures in a pass, as 1,8.")] = "1"
    threads: Annotated[
        str, Option("--threads", metavar="T,…", help="Threads, as 1,2; if not given, as many as PyTorch takes.")
    ] = ""
    cuda: Annotated[bool, switch("--cuda", "Use the GPU, for torch and compile.")] = False
    fold: Annotated[
        bool, switch("--fold", "Fold checkpoints for torch and compile first, as exported ones always are.")
    ] = False
    rounds: Annotated[int, Option("--rounds", min=3, help="At most so many rounds, of one timed pass each.")] = 100
    seconds: Annotated[float, Option("--seconds", min=0.0, help="No new round after so long.")] = 60.0
    no_memory: Annotated[bool, switch("--no_memory", "Leave out peak memory, which takes a process for each.")] = False
    data: Annotated[str, Option("--data", help="Data set on which every file is scored in every runtime.")] = ""
    layout: Layout = None
    split: Annotated[str, Option("--split", help="The part of --data to score.")] = "val"
    num_workers: Annotated[int, Option("--num_workers", min=0, help="Processes that load pictures.")] = 2
    save_dir: Annotated[str, Option("--save_dir", help="Save the rows as JSON and CSV there, and the plot.")] = ""


def run(config: BenchmarkConfig, given: frozenset[str]) -> None:
    """Measure latency, throughput, memory and, with --data, mIoU of files side by side, in rounds that take turns."""
    for flag in ("layout", "split", "num_workers"):
        if flag in given and not config.data:
            raise ValueError(f"--{flag} has no effect without --data; leave it out.")
    if "threads" in given and config.cuda:
        raise ValueError("--threads has no effect with --cuda, where the GPU is measured; leave it out.")
    device = choose_device(config.cuda)
    cases = _cases(config, given, device)
    show_settings("Benchmark", asdict(config) | {"model_paths": ", ".join(config.model_paths), "cases": len(cases)})
    if config.save_dir:
        check_writable(config.save_dir)
    classes = {path: _num_classes(path) for path in dict.fromkeys(config.model_paths)}
    samples = {number: _samples(config, number) for number in set(classes.values())} if config.data else {}
    threads = torch.get_num_threads()
    try:
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder, tf32_products(False):
            records, peaks = _measured(config, cases, samples, Path(folder))
    finally:
        torch.set_num_threads(threads)
    _show(records, peaks)
    if config.save_dir:
        _save(config, records, peaks, Path(config.save_dir))


def _cases(config: BenchmarkConfig, given: frozenset[str], device: torch.device) -> list[Case]:
    cases = grid(
        config.model_paths,
        runtimes=_parsed("runtimes", config.runtimes, str, "torch,onnxruntime") if config.runtimes else (),
        dtypes=_parsed("dtypes", config.dtypes, str, "fp32,bf16"),
        sizes=_parsed("sizes", config.sizes, _size, "512x512,1024x512"),
        batches=_parsed("batch_sizes", config.batch_sizes, int, "1,8"),
        threads=_parsed("threads", config.threads, int, "1,2") if config.threads else (torch.get_num_threads(),),
        device=device.type,
        fold=config.fold,
    )
    if "dtypes" in given and all(case.is_exported for case in cases):
        raise ValueError("--dtypes has no effect on exported files, which have one of their own; leave it out.")
    return cases


def _num_classes(path: str) -> int:
    """Reads the file, so that one that is missing or damaged is told of before anything runs."""
    if is_exported(path):
        return open_exported(path).manifest.num_classes
    found = checkpoint.read(path)
    show_notes(found.notes)
    return found.spec.num_classes


def _samples(config: BenchmarkConfig, num_classes: int) -> Sequence[Sample]:
    source, _ = open_data(config.data, config.layout, num_classes, (config.split,), num_workers=config.num_workers)
    return source.split(config.split)


def _words(text: str) -> tuple[str, ...]:
    """What stands between commas or blanks, each once."""
    return tuple(dict.fromkeys(filter(None, re.split(r"[,\s]+", text))))


def _parsed(flag: str, text: str, parse: Callable[[str], T], example: str) -> tuple[T, ...]:
    try:
        values = tuple(parse(word) for word in _words(text))
    except ValueError as error:
        raise ValueError(f"--{flag} is {text!r}; give it as in {example}.") from error
    if not values:
        raise ValueError(f"--{flag} is empty; give it as in {example}.")
    return values


def _size(word: str) -> tuple[int, int]:
    height, width = map(int, re.split("[x×]", word))
    return height, width


def _measured(
    config: BenchmarkConfig, cases: Sequence[Case], samples: Mapping[int, Sequence[Sample]], folder: Path
) -> tuple[list[dict[str, Any]], dict[int | str, float]]:
    """The record of every row, and the machine's peaks."""
    with progress_bar("exporting") as advance, quiet_exporters():
        cases = export_cases(cases, folder, progress=advance)
    memory = {} if config.no_memory else _memory(cases)
    opened = []
    with progress_bar("opening") as advance:
        for done, case in enumerate(cases):
            advance(done, len(cases), case.text)
            opened.append(open_case(case))
    scores = _scores(config, opened, samples) if config.data else {}
    with progress_bar("rounds") as advance:
        rows, peaks = measure(opened, max_rounds=config.rounds, max_seconds=config.seconds, progress=advance)
    return [benchmark_record(row, memory.get(_alike(row)), scores.get(_alike(row))) for row in rows], peaks


def _alike(row: Row | Opened | Case) -> Case:
    """What the number of threads makes no difference to has the same one of these."""
    return replace(row if isinstance(row, Case) else row.case, threads=1)


def _memory(cases: Sequence[Case]) -> dict[Case, int | None]:
    found: dict[Case, int | None] = {}
    with progress_bar("memory") as advance:
        for done, case in enumerate(cases):
            advance(done, len(cases), case.text)
            if _alike(case) not in found:
                found[_alike(case)] = peak_memory(case)
    return found


def _scores(
    config: BenchmarkConfig, opened: Sequence[Opened], samples: Mapping[int, Sequence[Sample]]
) -> dict[Case, float]:
    """mIoU of every file in every runtime, dtype, size and batch, the pictures letterboxed; threads share it."""
    found: dict[Case, float] = {}
    for one in opened:
        case = one.case
        if _alike(case) in found:
            continue
        one.get_ready()
        with progress_bar(f"scoring {case.text}") as advance:
            score = evaluate(
                one.predict,
                samples[one.num_classes],
                one.num_classes,
                EvalMode(input_shape=case.size),
                device=case.device,
                batch_size=case.batch,
                num_workers=config.num_workers,
                progress=advance,
            )
        found[_alike(case)] = score.miou
    return found


def _show(records: Sequence[dict[str, Any]], peaks: dict[int | str, float]) -> None:
    """A column that says the same in every row, or nothing, is left out; what is the same stands in the title."""
    settings = [key for key in COLUMNS if key not in MEASURED]
    settings = [key for key in settings if any(row[key] is not None for row in records)]  # threads, on a GPU
    same = [key for key in settings[1:] if len({str(row[key]) for row in records}) == 1]
    known = {key for key in MEASURED if any(row.get(key) is not None for row in records)}
    shown = [key for key in COLUMNS if key in known or (key in settings and key not in same)]
    title = ", ".join(f"{COLUMNS[key]} {_text(key, records[0][key])}" for key in same)
    rows = [[_text(key, row.get(key)) for key in shown] for row in records]
    headline = f"Median of {records[0]['runs']} rounds{f'; {title}' if title else ''}"
    left_out = show_table(
        headline, [COLUMNS[key] for key in shown], rows, [COLUMNS[key] for key in SPARE if key in shown]
    )
    if left_out:
        show_notes((f"The terminal is too narrow for {', '.join(left_out)}; --save_dir saves them all.",))
    if records[0]["method"] == "cuda graph":
        measured = ", ".join(f"{peak:.0f} in {precision}" for precision, peak in peaks.items())
        console.print(f"Peak: GMAC/s of a product of large matrices in the same rounds, {measured}.", soft_wrap=True)
        console.print(
            f"Passes were replayed as CUDA graphs on {records[0]['device']}; 'eager ms' is the same pass called from "
            "Python, which may wait for each kernel's launch longer than the GPU works.",
            soft_wrap=True,
        )
    else:
        measured = ", ".join(f"{peak:.0f} with {number_of(int(number), 'thread')}" for number, peak in peaks.items())
        console.print(
            f"Peak: GMAC/s of a product of large float32 matrices in the same rounds, {measured}.", soft_wrap=True
        )
    if records[0]["runs"] < 100:
        show_notes(("With fewer than 100 rounds p99 is near the longest pass; raise --rounds and --seconds.",))


def _text(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key == "input_shape":
        return f"{value[0]}×{value[1]}"
    if key == "peak_share":
        return f"{100 * value:.0f} %"
    if not isinstance(value, float):
        return str(value)
    digits = {"miou": 4, "faster": 2, "macs_G": 2, "peak_memory_mb": 0}.get(key, 1)
    if key.endswith("_ms") and value < 10.0:
        digits = 2
    return f"{value:.{digits}f}"


def _save(
    config: BenchmarkConfig, records: Sequence[dict[str, Any]], peaks: dict[int | str, float], folder: Path
) -> None:
    from segprune import plots  # here, since drawing takes a second to import and most commands draw nothing

    record = {"settings": asdict(config), "rows": records, "peak_gmacs_per_second": peaks}
    write_json(record | {"environment": environment()}, folder / RECORD)
    header = list(dict.fromkeys(key for row in records for key in row))
    lines = [["×".join(map(str, v)) if isinstance(v := row[key], list) else v for key in header] for row in records]
    write_csv([header, *lines], folder / TABLE)
    y = "miou" if config.data else "macs_G"
    plots.trade_off(
        {
            name: [(row["median_ms"], row[y]) for row in records if row["file"] == name and row[y] is not None]
            for name in dict.fromkeys(row["file"] for row in records)
        },
        "mIoU" if config.data else "GMACs of one image",
        folder / PLOT,
    )
    console.print(f"Saved: {RECORD}, {TABLE} and {PLOT} in {folder}", soft_wrap=True, markup=False)
