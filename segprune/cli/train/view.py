"""A training run as it is watched: on a terminal a live table of epochs over a bar, in a log one line per epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.table import Table

from segprune.cli.console import console, new_progress
from segprune.training.state import EpochResult

SHOWN = 12  # latest epochs in the live table


class TrainingView:
    """`step` after every step, `epoch` after every epoch."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []
        self.bar = new_progress(transient=False)
        self.task = self.bar.add_task("training", total=None, text="")

    def step(self, done: int, total: int, loss: float, lr: float) -> None:
        self.bar.update(
            self.task, completed=done, total=total, text=f"loss {loss:.3f}  lr {lr:.1e}"
        )

    def epoch(self, result: EpochResult) -> None:
        score = result.score
        best = " *" if result.best else "  "
        self.rows.append(
            (
                str(result.epoch),
                f"{result.loss:.4f}",
                "–" if score is None else f"{score.miou:.4f}{best}",
                "–" if score is None else f"{score.pixel_accuracy:.4f}",
                f"{result.lr:.1e}",
                f"{result.images_per_second:.1f}",
            )
        )

        # A terminal shows the live table; a log gets one line per epoch instead.
        if not console.is_terminal:
            line = f"epoch {result.epoch}: loss {result.loss:.4f}"
            if score is not None:
                line += f", val mIoU {score.miou:.4f}" + (
                    " (best so far)" if result.best else ""
                )
            console.print(f"{line}, {result.images_per_second:.1f} images/s")

    def __rich__(self) -> Group:
        return Group(self._table(), self.bar)

    def _table(self) -> Table:
        # All epochs of a long run would not fit on the screen.
        left_out = len(self.rows) - SHOWN
        table = Table(
            caption="* best so far"
            + (f"; {left_out} earlier epochs not shown" if left_out > 0 else "")
        )
        for name in ("epoch", "loss", "val mIoU", "pixel accuracy", "lr", "images/s"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows[-SHOWN:]:
            table.add_row(*row)
        return table


@contextmanager
def training_view() -> Iterator[TrainingView]:
    view = TrainingView()
    if console.is_terminal:
        with Live(view, console=console, refresh_per_second=4):
            yield view
    else:
        yield view
