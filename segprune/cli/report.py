"""`segprune report DIR`: the page of results that are there already; and the page at the end of other commands."""

from __future__ import annotations

import locale
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast, get_args

import torch
from typer import Argument, Option

from segprune.cli.console import choose_device, console, progress_bar
from segprune.cli.flags import Cuda
from segprune.report import Language, find_folders, write_report


@dataclass(frozen=True)
class ReportFlags:
    folder: Annotated[
        str,
        Argument(
            metavar="DIR",
            help="Results of segprune prune, sweep, eval or train, or a folder above several.",
        ),
    ]
    lang: Annotated[
        str | None,
        Option("--lang", help="Language that is shown first: en or zh; else the system's."),
    ] = None
    data: Annotated[
        str, Option("--data", help="Where the data set lies now, if it was moved.")
    ] = ""
    cuda: Cuda = False


def run(flags: ReportFlags, given: frozenset[str]) -> None:
    """Make report.html beside results: one file to look at, to print and to send, which needs nothing else.

    Commands that measure make it by themselves; this one makes it again, for older results too.
    """
    if flags.lang not in (None, *get_args(Language)):
        known = ", ".join(get_args(Language))
        raise ValueError(f"--lang is {flags.lang!r}; choose one of {known}.")
    if flags.data and not Path(flags.data).exists():
        raise ValueError(
            f"--data {flags.data} does not exist; give the folder of the data set."
        )
    device = choose_device(flags.cuda)
    for folder in find_folders(Path(flags.folder)):
        make_page(folder, device, cast("Language | None", flags.lang), flags.data)


def make_page(
    folder: Path, device: torch.device, lang: Language | None = None, data: str = ""
) -> None:
    """Makes the page of a folder of results, and prints where it is."""
    with progress_bar("images for the report") as advance:
        path = write_report(
            folder,
            lang=lang or system_language(),
            device=device,
            data=data,
            progress=advance,
        )
    console.print(f"Report: {path}", soft_wrap=True, markup=False)


def system_language() -> Language:
    """Returns Chinese on a Chinese system, else English."""
    # As the C library does: the first of these that is set decides. Windows has none of them.
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if os.environ.get(name):
            return "zh" if os.environ[name].lower().startswith("zh") else "en"
    name = locale.getlocale()[0] or ""
    return "zh" if name.lower().startswith(("zh", "chinese")) else "en"
