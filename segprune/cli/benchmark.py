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
    OUTPUTS,
    RUNTIMES,
    Case,
    Opened,
    export_cases,
    grid,
    measure,
    open_case,
    peak_memory,
)
from segprune.checkpoint import Checkpoint
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
from segprune.cli.flags import Layout, LoaderProcesses, Trust, Verbose, switch
from segprune.data import IMAGENET, DataChoices, Sample
from segprune.export import PROGRAMS, Runtime, is_exported, open_exported
from segprune.files import check_writable, write_csv, write_json
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.machine import fit_to_machine
from segprune.runs.records import benchmark_record, environment
from segprune.spec import Preprocessing, preprocessing_of
from segprune.timing import tf32_products

T = TypeVar("T")
Peaks = Mapping[Any, float]  # GMAC/s by Case.condition
RECORD, TABLE, PLOT = "benchmark.json", "benchmark.csv", "benchmark.png"
COLUMNS = {  # of the table, from the record's keys
    "file": "file",
    "runtime": "runtime",
    "dtype": "dtype",
    "output": "output",
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
MEASURED = tuple(COLUMNS)[7:]
SPARE = (
    "p99_ms",
    "gmacs_per_second",
    "p90_ms",
    "images_per_second",
    "peak_share",
    "macs_G",
)  # where there is no room


@dataclass(frozen=True)
class BenchmarkConfig:
    model_paths: Annotated[
        list[str],
        Argument(
            metavar="FILE...",
            help="Checkpoints of any dialect, and files that segprune export wrote.",
        ),
    ]
    runtimes: Annotated[
        str,
        Option(
            "--runtimes",
            help=f"Of {', '.join(RUNTIMES)}, as a,b; if not given, torch for checkpoints.",
        ),
    ] = ""
    dtypes: Annotated[
        str, Option("--dtypes", help=f"Of {', '.join(DTYPES)}, in which checkpoints compute.")
    ] = "fp32"
    output: Annotated[
        str,
        Option(
            "--output", help=f"Of {', '.join(OUTPUTS)}: what a checkpoint's pass ends with."
        ),
    ] = "logits"
    sizes: Annotated[
        str, Option("--sizes", metavar="HxW,…", help="Heights and widths, as 512x512,1024x512.")
    ] = "512x512"
    batch_sizes: Annotated[
        str, Option("--batch_sizes", metavar="B,…", help="Images in a pass, as 1,8.")
    ] = "1"
    threads: Annotated[
        str,
        Option(
            "--threads",
            metavar="T,…",
            help="Threads, as 1,2; if not given, as many as PyTorch takes.",
        ),
    ] = ""
    cuda: Annotated[bool, switch("--cuda", "Use the GPU, for torch and compile.")] = False
    fold: Annotated[
        bool,
        switch(
            "--fold",
            "Fold checkpoints for torch and compile first, as exported ones always are.",
        ),
    ] = False
    rounds: Annotated[
        int, Option("--rounds", min=3, help="At most this many rounds, of one timed pass each.")
    ] = 100
    seconds: Annotated[
        float, Option("--seconds", min=0.0, help="Begin no new round after this time.")
    ] = 60.0
    no_memory: Annotated[
        bool, switch("--no_memory", "Leave out peak memory, which takes a process for each.")
    ] = False
    data: Annotated[
        str, Option("--data", help="Data set on which every file is scored in every runtime.")
    ] = ""
    layout: Layout = None
    split: Annotated[str, Option("--split", help="The part of --data to score.")] = "val"
    num_workers: LoaderProcesses = None
    trust: Trust = False
    save_dir: Annotated[
        str, Option("--save_dir", help="Save the rows as JSON and CSV there, and the plot.")
    ] = ""
    verbose: Verbose = False


def run(config: BenchmarkConfig, given: frozenset[str]) -> None:
    """Measure latency, throughput, memory and, with --data, mIoU of files side by side, in rounds that take turns."""
    for flag in ("layout", "split", "num_workers"):
        if flag in given and not config.data:
            raise ValueError(f"--{flag} has no effect without --data; leave it out.")
    if "threads" in given and config.cuda:
        raise ValueError(
            "--threads has no effect with --cuda, where the GPU is measured; leave it out."
        )

    # All that can be refused is refused before anything runs.
    device = choose_device(config.cuda)
    config, chosen = fit_to_machine(config, device)
    cases = _list_cases(config, given, device)
    read = {"model_paths": ", ".join(config.model_paths), "cases": len(cases)}
    show_settings("Benchmark", asdict(config), given, read)
    show_notes(chosen if config.data else ())
    if config.save_dir:
        check_writable(config.save_dir)
    # Files may differ in their classes and in how they read labels; the data is opened once for each.
    readings = {
        _read_labelling(path, config): None for path in dict.fromkeys(config.model_paths)
    }
    samples = (
        {reading: _open_samples(config, *reading) for reading in readings}
        if config.data
        else {}
    )

    # Cases set PyTorch's threads and TF32 as they need them.
    threads = torch.get_num_threads()
    try:
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder, tf32_products(False):
            records, peaks = _measure(config, cases, samples, Path(folder))
    finally:
        torch.set_num_threads(threads)

    _show(records, peaks)
    if config.save_dir:
        _save(config, records, peaks, Path(config.save_dir))


def _list_cases(
    config: BenchmarkConfig, given: frozenset[str], device: torch.device
) -> list[Case]:
    # Every combination of the lists that were given is a case.
    cases = grid(
        config.model_paths,
        runtimes=_parse("runtimes", config.runtimes, str, "torch,onnxruntime")
        if config.runtimes
        else (),
        dtypes=_parse("dtypes", config.dtypes, str, "fp32,bf16"),
        sizes=_parse("sizes", config.sizes, _parse_size, "512x512,1024x512"),
        batch_sizes=_parse("batch_sizes", config.batch_sizes, int, "1,8"),
        threads=_parse("threads", config.threads, int, "1,2")
        if config.threads
        else (torch.get_num_threads(),),
        device=device.type,
        fold=config.fold,
        trust=config.trust,
        output=config.output,
    )
    if config.trust and not any(path.endswith(PROGRAMS) for path in config.model_paths):
        raise ValueError(
            "--trust has no effect here, where no file runs code when it is opened; leave it out."
        )
    if "dtypes" in given and all(case.is_exported for case in cases):
        raise ValueError(
            "--dtypes has no effect on exported files, which have one of their own; leave it out."
        )
    return cases


def _read_labelling(path: str, config: BenchmarkConfig) -> tuple[int, Preprocessing]:
    """Reads the file, so that one that is missing or damaged is refused before anything runs."""
    file: Runtime | Checkpoint
    if is_exported(path):
        file = open_exported(path, trust=config.trust)
        num_classes = file.manifest.num_classes
    else:
        file = checkpoint.read(path)
        show_notes(file.notes)
        num_classes = file.spec.num_classes

    # Nothing reads an image without data.
    return num_classes, preprocessing_of(file) if config.data else IMAGENET


def _open_samples(
    config: BenchmarkConfig, num_classes: int, preprocessing: Preprocessing
) -> Sequence[Sample]:
    assert config.num_workers is not None
    source, _ = open_data(
        config.data,
        config.layout,
        num_classes,
        (config.split,),
        choices=DataChoices(expected=preprocessing),
        num_workers=config.num_workers,
    )
    return source.split(config.split)


def _parse(flag: str, text: str, parse: Callable[[str], T], example: str) -> tuple[T, ...]:
    """Returns the values between commas or blanks, each once."""
    # A value that is given twice is measured once.
    words = dict.fromkeys(re.split(r"[,\s]+", text))
    try:
        values = tuple(parse(word) for word in words if word)
    except ValueError as error:
        raise ValueError(f"--{flag} is {text!r}; give it as in {example}.") from error
    if not values:
        raise ValueError(f"--{flag} is empty; give it as in {example}.")
    return values


def _parse_size(word: str) -> tuple[int, int]:
    height, width = map(int, re.split("[x×]", word))
    return height, width


def _measure(
    config: BenchmarkConfig,
    cases: Sequence[Case],
    samples: Mapping[tuple[int, Preprocessing], Sequence[Sample]],
    folder: Path,
) -> tuple[list[dict[str, Any]], Peaks]:
    """Returns the record of every row, and the machine's peaks."""
    # Other runtimes need files, written here into a folder that is removed at the end.
    with progress_bar("exporting") as advance, quiet_exporters():
        cases = export_cases(cases, folder, progress=advance)
    memory = {} if config.no_memory else _measure_memory(cases)

    # All cases are open at the same time, since the rounds take turns among them.
    opened = []
    with progress_bar("opening") as advance:
        for done, case in enumerate(cases):
            advance(done, len(cases), case.text)
            opened.append(open_case(case))

    scores = _score(config, opened, samples) if config.data else {}
    with progress_bar("rounds") as advance:
        rows, peaks = measure(
            opened, max_rounds=config.rounds, max_seconds=config.seconds, progress=advance
        )

    records = []
    # Memory and score are the same for any number of threads, so rows share them.
    for row in rows:
        key = _without_threads(row.case)
        records.append(benchmark_record(row, memory.get(key), scores.get(key)))
    return records, peaks


def _without_threads(case: Case) -> Case:
    """Returns the same key for all cases that differ in threads alone: memory and scores do not depend on them."""
    return replace(case, threads=1)


def _measure_memory(cases: Sequence[Case]) -> dict[Case, int | None]:
    memory: dict[Case, int | None] = {}
    with progress_bar("memory") as advance:
        for done, case in enumerate(cases):
            advance(done, len(cases), case.text)
            # Numbers of threads make new cases, but need no new measurement here.
            key = _without_threads(case)
            if key not in memory:
                memory[key] = peak_memory(case)
    return memory


def _score(
    config: BenchmarkConfig,
    opened: Sequence[Opened],
    samples: Mapping[tuple[int, Preprocessing], Sequence[Sample]],
) -> dict[Case, float]:
    """Returns the mIoU of every file in every runtime, dtype, size and batch, the images letterboxed."""
    assert config.num_workers is not None
    scores: dict[Case, float] = {}
    for one in opened:
        case, key = one.case, _without_threads(one.case)
        if key in scores:
            continue
        # Cases change the threads and TF32 of the whole process; set those of this one.
        one.get_ready()
        with progress_bar(f"scoring {case.text}") as advance:
            score = evaluate(
                one.predict,
                samples[one.num_classes, one.preprocessing],
                one.num_classes,
                EvalMode(input_shape=case.size),
                device=case.device,
                batch_size=case.batch,
                num_workers=config.num_workers,
                preprocessing=one.preprocessing,
                progress=advance,
            )
        scores[key] = score.miou
    return scores


def _show(records: Sequence[dict[str, Any]], peaks: Peaks) -> None:
    """Prints the table, without columns that say nothing; what is the same in all rows stands in its title."""
    # A column needs a value in some row; one with the same value in all moves to the title.
    stated = [key for key in COLUMNS if any(row.get(key) is not None for row in records)]
    same = []
    for key in stated:
        if (
            key not in MEASURED
            and key != "file"
            and len({str(row[key]) for row in records}) == 1
        ):
            same.append(key)
    shown = [key for key in stated if key not in same]

    title = f"Median of {records[0]['runs']} rounds"
    if same:
        title += "; " + ", ".join(
            f"{COLUMNS[key]} {_text(key, records[0][key])}" for key in same
        )
    # On a narrow terminal these columns are left out first.
    spare = [COLUMNS[key] for key in SPARE if key in shown]
    rows = [[_text(key, row.get(key)) for key in shown] for row in records]
    left_out = show_table(title, [COLUMNS[key] for key in shown], rows, spare)
    if left_out:
        show_notes(
            (
                f"The terminal is too narrow for {', '.join(left_out)}; --save_dir saves them all.",
            )
        )

    on_gpu = records[0]["method"] == "cuda graph"
    what = "large matrices" if on_gpu else "large float32 matrices"
    # The peak is what this machine reaches at best, to hold the rows against.
    speeds = []
    for condition, peak in peaks.items():
        speeds.append(
            f"{peak:.0f} in {condition}"
            if on_gpu
            else f"{peak:.0f} with {number_of(condition, 'thread')}"
        )
    console.print(
        f"Peak: GMAC/s of a product of {what} in the same rounds, {', '.join(speeds)}.",
        soft_wrap=True,
    )

    if on_gpu:
        console.print(
            f"Passes were replayed as CUDA graphs on {records[0]['device']}; 'eager ms' is the same pass called from "
            "Python, which may wait for each kernel's launch longer than the GPU works.",
            soft_wrap=True,
        )
    if records[0]["runs"] < 100:
        show_notes(
            (
                "With fewer than 100 rounds p99 is near the longest pass; raise --rounds and --seconds.",
            )
        )


def _text(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key == "input_shape":
        return f"{value[0]}×{value[1]}"
    if key == "peak_share":
        return f"{100 * value:.0f} %"
    if not isinstance(value, float):
        return str(value)
    # Short times get a digit more, or the differences between them would vanish.
    digits = {"miou": 4, "faster": 2, "macs_G": 2, "peak_memory_mb": 0}.get(key, 1)
    if key.endswith("_ms") and value < 10.0:
        digits = 2
    return f"{value:.{digits}f}"


def _save(
    config: BenchmarkConfig, records: Sequence[dict[str, Any]], peaks: Peaks, folder: Path
) -> None:
    from segprune import (
        plots,
    )  # here, since drawing takes a second to import and most commands draw nothing

    # Numbers mean little without the settings and the machine, so these are saved, too.
    record = {"settings": asdict(config), "rows": records, "peak_gmacs_per_second": peaks}
    write_json(record | {"environment": environment()}, folder / RECORD)

    header = list(records[0])
    lines = [
        [_text(key, row[key]) if key == "input_shape" else row[key] for key in header]
        for row in records
    ]
    write_csv([header, *lines], folder / TABLE)

    # One curve for each file, of the rows where the value is known.
    key, title = ("miou", "mIoU") if config.data else ("macs_G", "GMACs of one image")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in records:
        curve = points.setdefault(row["file"], [])
        if row[key] is not None:
            curve.append((row["median_ms"], row[key]))
    plots.trade_off(points, title, folder / PLOT)

    console.print(f"Saved: {RECORD}, {TABLE} and {PLOT} in {folder}", soft_wrap=True)
