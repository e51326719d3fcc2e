"""What is seen of a training run: a live table on a terminal, a line per epoch in a log."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from segprune.cli import console as console_module
from segprune.cli.train import view
from segprune.inference.evaluate import Score
from segprune.training.state import EpochResult

RATIOS = (0.5, None)


def result(epoch: int, miou: float | None, best: bool = False) -> EpochResult:
    score = None if miou is None else Score(miou, 0.5, 0.75, RATIOS, RATIOS, RATIOS, 3)
    return EpochResult(epoch, 1.23456, 6e-5, score, best, 12.34)


def shown(
    monkeypatch: pytest.MonkeyPatch, results: list[EpochResult], *, terminal: bool
) -> str:
    """All that is written while epochs of two steps each go by, without the terminal's control codes."""
    file = io.StringIO()
    console = Console(
        file=file,
        force_terminal=terminal,
        width=100,
        height=40,
        highlight=False,
        color_system=None,
    )
    for part in (console_module, view):
        monkeypatch.setattr(part, "console", console)
    total = 2 * len(results)
    with view.training_view() as seen:
        for number, one in enumerate(results):
            seen.step(2 * number + 1, total, 2.5, 1e-4)
            seen.step(2 * number + 2, total, 2.25, 5e-5)
            seen.epoch(one)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


def last_table(text: str) -> tuple[list[list[str]], str]:
    """The rows as they were drawn for the last time, and what stands below them."""
    table, _, below = text[text.rindex("┏") :].partition("┘")
    lines = [line for line in table.splitlines() if re.match("[│┃]", line)]
    return [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines
    ], " ".join(below.split())


def test_on_a_terminal_epochs_stand_in_a_table_over_the_bar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = [result(1, 0.25, best=True), result(2, None), result(3, 0.125)]
    out = shown(monkeypatch, results, terminal=True)
    rows, below = last_table(out)
    assert rows == [
        ["epoch", "loss", "val mIoU", "pixel accuracy", "lr", "images/s"],
        ["1", "1.2346", "0.2500 *", "0.7500", "6.0e-05", "12.3"],
        ["2", "1.2346", "–", "–", "6.0e-05", "12.3"],
        ["3", "1.2346", "0.1250", "0.7500", "6.0e-05", "12.3"],
    ]
    assert re.fullmatch(
        r"\* best so far training \S+ 6/6 \S+ \S+ loss 2\.250 lr 5\.0e-05", below
    ), below
    assert "epoch 1:" not in out  # the lines are for logs


def test_the_table_keeps_the_latest_epochs_and_counts_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, below = last_table(
        shown(monkeypatch, [result(epoch, 0.5) for epoch in range(1, 16)], terminal=True)
    )
    assert [row[0] for row in rows[1:]] == [str(epoch) for epoch in range(4, 16)]
    assert below.startswith("* best so far; 3 earlier epochs not shown training ")


def test_in_a_log_every_epoch_is_a_line_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = [result(1, 0.25, best=True), result(2, None), result(3, 0.125)]
    assert shown(monkeypatch, results, terminal=False).splitlines() == [
        "epoch 1: loss 1.2346, val mIoU 0.2500 (best so far), 12.3 images/s",
        "epoch 2: loss 1.2346, 12.3 images/s",
        "epoch 3: loss 1.2346, val mIoU 0.1250, 12.3 images/s",
    ]
