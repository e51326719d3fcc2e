"""What the commands share: errors in one sentence, the device, tables, progress bars, and data opened with both."""

from __future__ import annotations

import codecs
import ctypes
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from segprune.data import (
    DataChoices,
    LabelReport,
    Source,
    check_labels,
    open_source,
    readable,
    score_whole_pool,
)
from segprune.inference.evaluate import Score
from segprune.timing import Latency

_QUIET = (
    os.environ.get("LOCAL_RANK", "0") != "0"
)  # of several processes only the first one talks


class PlainConsole(Console):
    """A console that prints text as it is: paths, class names and keys come from strangers' files.

    What looks like rich's markup is not read as such, and control characters, which could steer a terminal, are shown.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(show_controls(text), **how)


def show_controls(text: str) -> str:
    """Returns the text with its control characters spelt out; lines and tabs are kept.

    >>> show_controls("a" + chr(27) + "[2J")
    'a\\\\x1b[2J'
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


console = PlainConsole(quiet=_QUIET, soft_wrap=False)
errors = PlainConsole(stderr=True, soft_wrap=True)


def accept_any_text() -> None:
    """Lets standard output take what its encoding lacks, as a redirected one on Windows: a run must not end by that."""
    codecs.register_error("segprune", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="segprune")


_SPELT = {"×": "x", "–": "-", "−": "-", "…": "...", "·": "*", "→": "->", "≥": ">=", "≤": "<="}


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_SPELT.get(letter, "?") for letter in missing), error.end


def keep_freed_memory() -> None:
    """Lets glibc keep large blocks for the next use instead of handing them back, which costs page faults again.

    A forward pass on the CPU allocates and frees dozens of blocks above glibc's limit of 32 MB; see mallopt(3). Other
    C libraries are left as they are, and so are settings in the environment.
    """
    if any(
        name in os.environ
        for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    ):
        return

    # mallopt is glibc's; it is missing on Windows and in some C libraries.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        # The first limit is for single blocks, the second for free space at the heap's end.
        mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


# The library's arguments whose flags have other names, or are flags of another command than the one that ran.
ARGUMENTS = {
    "variant": "--phi",
    "dialect": "--dialect",
    "num_classes": "--num_classes",
    "uniform": "--uniform",
    "dynamic": "--dynamic",
}
# The flags of the command that runs, by the arguments that they stand for.
_flags: ContextVar[Mapping[str, str]] = ContextVar("flags", default=MappingProxyType(ARGUMENTS))

# The notes that the command has shown: a file that is read twice says the same twice.
_shown: ContextVar[set[str] | None] = ContextVar("shown", default=None)


@contextmanager
def one_sentence(flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """Ends a user's mistake in one sentence and exit status 1, Ctrl-C in 130; our own mistakes keep their trace.

    `flags` names the flag of each argument: a message that says `head_lr` is printed with --head_lr.
    """
    flags = ARGUMENTS | dict(flags or {})
    token, shown = _flags.set(flags), _shown.set(set())
    try:
        yield

    except torch.OutOfMemoryError:
        _fail(
            "The GPU is out of memory; use a smaller --input_shape or --batch_size, a smaller variant (--phi), "
            "or leave out --cuda to run on the CPU."
        )

    except OSError as error:
        # Errors of the system name the file but no remedy; ours name both.
        if error.strerror and error.filename:
            remedy = "give another place, or check that it exists, is yours and has free space"
            _fail(f"{error.filename}: {error.strerror}; {remedy}.")
        _fail(with_flags(str(error), flags))

    except (ValueError, ImportError) as error:
        _fail(with_flags(str(error), flags))

    except KeyboardInterrupt as interrupt:
        message = with_flags(str(interrupt), flags)
        errors.print(message or "Interrupted; no file was left half-written.")
        # As shells do it: 128 + 2, the number of the signal.
        sys.exit(130)

    finally:
        _flags.reset(token)
        _shown.reset(shown)


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Returns a message of the library with flags in place of the arguments that it names in backticks.

    >>> with_flags("`head_lr` is 0.0, `spec` is as it was.", {"head_lr": "--head_lr"})
    '--head_lr is 0.0, `spec` is as it was.'
    """
    return re.sub(r"`(\w+)`", lambda name: flags.get(name[1], name[0]), message)


def _fail(message: str) -> NoReturn:
    errors.print(f"Error: {message}")
    sys.exit(1)


def choose_device(cuda: bool) -> torch.device:
    """Returns the GPU with `cuda`, else the CPU. ValueError if PyTorch sees no GPU."""
    if cuda and not torch.cuda.is_available():
        raise ValueError(
            "--cuda was given but PyTorch sees no GPU here; leave out --cuda to run on the CPU, "
            "or install a CUDA build of PyTorch and its driver."
        )
    return torch.device("cuda" if cuda else "cpu")


def show_settings(
    title: str,
    settings: Mapping[str, Any],
    given: Collection[str] | None = None,
    chosen: Mapping[str, Any] | None = None,
) -> None:
    """Prints a table of the settings that were given and of what was `chosen` or read off files.

    Those left at their defaults are printed only without `given`, or if `verbose` is among the settings and set.
    """
    shown = dict(settings)
    verbose = shown.pop("verbose", False)
    # A long table would hide the few settings that matter.
    if given is not None and not verbose:
        shown = {name: value for name, value in shown.items() if name in given}
    shown |= chosen or {}

    console.print(title, style="bold", soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in shown.items():
        table.add_row(name, _cell(value))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if value is None or value == "":
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_table(
    title: str, header: list[str], rows: list[list[str]], spare: Sequence[str] = ()
) -> tuple[str, ...]:
    """Prints a table; on a terminal that is too narrow, without the first few of the `spare` columns.

    Returns the columns that were left out. A log has no width, so nothing is left out there.
    """
    console.print(f"\n{title}", style="bold", soft_wrap=True)

    # Leave out one more column until the table fits.
    left_out: list[str] = []
    for name in (None, *spare):
        if name is not None:
            left_out.append(name)
        table = _table(header, rows, left_out)
        # Measured with room to spare, or a table that was cut would seem to fit.
        width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        if width <= console.width or not console.is_terminal:
            break

    # A log has no width, so its lines may be as long as the table needs.
    usual = console.width
    console.width = usual if console.is_terminal else max(usual, width)
    console.print(table)
    console.width = usual
    return tuple(left_out)


def _table(header: list[str], rows: list[list[str]], left_out: list[str]) -> Table:
    table = Table()
    shown = [i for i, name in enumerate(header) if name not in left_out]
    for i in shown:
        if i == 0:
            table.add_column(
                header[i], overflow="fold"
            )  # a long name is folded before numbers are cut
        else:
            table.add_column(header[i], justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    return table


def show_notes(notes: tuple[str, ...]) -> None:
    """Prints each note, once in a command."""
    shown = _shown.get()
    for note in notes:
        if shown is not None:
            if note in shown:
                continue
            shown.add(note)
        console.print(f"Note: {with_flags(note, _flags.get())}", style="yellow")


def new_progress(*, transient: bool) -> Progress:
    """Returns a bar with counts, times and a text, which `add_task(…, text="")` needs; silent without a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    silent = not console.is_terminal  # in a log it would be blank lines
    return Progress(
        *columns, console=console, refresh_per_second=4, transient=transient, disable=silent
    )


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[..., None]]:
    """Yields `advance(done, total, text="")`, which moves the bar."""
    with new_progress(transient=True) as progress:
        task = progress.add_task(description, total=None, text="")

        def advance(done: int, total: int | None, text: str = "") -> None:
            progress.update(task, completed=done, total=total, text=text)

        yield advance


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silences the exporters' logs: that torchvision is missing, which is not needed, and how far quantising is."""
    # Switched off as a whole, since each exporter logs under names of its own.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def open_data(
    data: str,
    layout: str | None,
    num_classes: int,
    splits: tuple[str, ...],
    *,
    choices: DataChoices | None = None,
    skip_bad: bool = False,
    num_workers: int = 0,
    trained: bool = True,
    classes: Callable[[tuple[str, ...]], None] | None = None,
) -> tuple[Source, LabelReport]:
    """Opens a data set and checks its labels, with bars, and prints the check's notes.

    With `skip_bad` every image of the splits is read once, and those that cannot be read are left out, counted and
    named. `trained` says that the number of classes is that of a network which exists already. `classes` may refuse
    the classes' names before anything that takes long.
    """
    source = (choices or DataChoices()).apply(open_source(data, layout))
    if "train" not in splits:
        source = score_whole_pool(source)
    if classes is not None:
        classes(source.class_names)

    # Before the label check, which would stop at the first bad image.
    if skip_bad:
        for split in splits:
            with progress_bar(f"reading {split}") as advance:
                good, bad = readable(source.split(split), num_workers, advance)
            source = source.with_split(split, good)
            if bad:
                show_notes(
                    (
                        f"--skip_bad left out {len(bad)} of {len(good) + len(bad)} in {split}: {bad[0]}",
                    )
                )

    with progress_bar("checking labels") as advance:
        report = check_labels(source, num_classes, splits, progress=advance, trained=trained)
    numbers = ", ".join(f"{number} in {split}" for split, number in report.num_images.items())
    console.print(
        f"Labels checked ({source.layout}): {numbers}; {report.ignored} ignored pixels."
    )
    show_notes(report.notes)
    return source, report


def show_score(title: str, score: Score, names: tuple[str, ...]) -> None:
    """Prints a score per class and its means; classes are numbered, and named as far as there are names."""
    columns = {"IoU": score.iou, "recall": score.recall, "precision": score.precision}
    means = {
        "mIoU": score.miou,
        "mPA": score.mean_accuracy,
        "pixel accuracy": score.pixel_accuracy,
    }
    # Boundaries are scored only on demand.
    if score.boundary_iou is not None and score.boundary_miou is not None:
        columns["boundary IoU"] = score.boundary_iou
        means["boundary mIoU"] = score.boundary_miou

    rows = []
    for k, values in enumerate(zip(*columns.values(), strict=True)):
        name = f"{k} {names[k]}".strip() if k < len(names) else str(k)
        rows.append([name, *("–" if value is None else f"{value:.4f}" for value in values)])
    show_table(f"{title} ({score.num_images} images)", ["class", *columns], rows)
    console.print(
        ", ".join(f"{name} {value:.4f}" for name, value in means.items()), soft_wrap=True
    )


def number_of(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def latency_text(latency: Latency) -> str:
    digits = 1 if latency.median_ms >= 10.0 else 2
    return f"{latency.median_ms:.{digits}f} ({latency.low_ms:.{digits}f}–{latency.high_ms:.{digits}f})"


def measured_on(latency: Latency, shape: tuple[int, int]) -> str:
    """One line that says how and on what a latency was measured."""
    threads = "" if latency.threads is None else f", {number_of(latency.threads, 'thread')}"
    graph = ", replayed as a CUDA graph" if latency.method == "cuda graph" else ""
    return (
        f"Latency: median (quartiles) in ms of {latency.runs} runs after a warm-up{graph}, batch {latency.batch}, "
        f"{shape[0]}×{shape[1]} pixels, {latency.precision}, {latency.device}{threads}."
    )


EAGER_DIFFERS = 1.1  # from so many times the graph's latency on, eager is told beside it


def eager_beside(dense: Latency, pruned: Latency) -> str:
    """One sentence on calls from Python where they take longer than the GPU does; else nothing."""
    # Where both agree, launches cost nothing and there is nothing to tell.
    pairs = [(latency.eager_ms, latency.median_ms) for latency in (dense, pruned)]
    if not any(
        eager_ms is not None and eager_ms > EAGER_DIFFERS * ms for eager_ms, ms in pairs
    ):
        return ""
    return (
        f"Called from Python a pass takes {dense.eager_ms:.2f} ms dense and {pruned.eager_ms:.2f} ms pruned: the GPU "
        "waits for each kernel's launch, and their number does not change with the widths; CUDA graphs, larger "
        "batches or an exported engine (docs/gpu.md) bring the gain."
    )
