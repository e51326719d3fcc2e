"""What was measured, a row for each network in each way, and how rows are printed as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.on_gpu.floors import Floor


@dataclass(frozen=True)
class Row:
    """One network in one way, as "fp16 graph". `ms` is of one batch, and None where it did not run; a note says why."""

    variant: str
    network: str
    batch: int
    way: str
    ms: float | None
    floor: Floor
    memory_mb: float | None = None

    @property
    def name(self) -> str:
        return f"{self.variant} {self.network}, {self.batch}"


def find_base(row: Row, rows: Sequence[Row]) -> Row:
    """Returns the first network of the same variant, batch and way: the dense one, or the one that stands for it."""
    own = (row.variant, row.batch, row.way)
    return next(other for other in rows if (other.variant, other.batch, other.way) == own)


def show_time(row: Row, base: Row) -> str:
    if row.ms is None:
        return "–"
    return f"{row.ms:.2f}{_ratio(base.ms, row.ms)}"


def show_speed(row: Row, base: Row) -> str:
    """Returns images per second and memory, each with its ratio to the base's."""
    if row.ms is None:
        return "–"
    text = f"{1e3 * row.batch / row.ms:.0f}{_ratio(base.ms, row.ms)}"
    if row.memory_mb is not None:
        text += f"; {row.memory_mb / 1e3:.1f} GB{_ratio(row.memory_mb, base.memory_mb)}"
    return text


def _ratio(number: float | None, other: float | None) -> str:
    if number is None or other is None or number == other:
        return ""
    return f" ({number / other:.2f} ×)"


def print_table(title: str, rows: Sequence[Row], show: Callable[[Row, Row], str]) -> None:
    """Prints a line for each network and batch, and a column for each way."""
    columns = list(dict.fromkeys(row.way for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(row.name, {})[row.way] = show(row, find_base(row, rows))

    print(f"\n{title}\n")
    print(f"| network, batch | {' | '.join(columns)} |")
    print("|" + "---|" * (1 + len(columns)))
    for name, cells in lines.items():
        print(f"| {name} | {' | '.join(cells.get(column, '–') for column in columns)} |")


def print_floors(title: str, tables: Mapping[str, Sequence[Row]]) -> None:
    """Prints every row beside the time for its bytes and for its multiply-adds."""
    print(f"\n{title}\n")
    print("| measured | network, batch | way | ms | bytes (ms) | MACs (ms) | × the larger |")
    print("|---|---|---|---|---|---|---|")
    for measured, rows in tables.items():
        for row in rows:
            if row.ms is not None:
                floor = row.floor
                print(
                    f"| {measured} | {row.name} | {row.way} | {row.ms:.2f} | {floor.bytes_ms:.3f} "
                    f"| {floor.macs_ms:.3f} | {row.ms / floor.ms:.1f} |"
                )
