"""A sweep on disk: networks cut at many rates, one row each, written as soon as it is measured.

sweep.json  the rows with all numbers, the knees, settings; read again where the sweep goes on after an interruption
sweep.csv   the numbers of each row
sweep.png   mIoU against cost, a curve for each file and criterion, knees ringed

A row that was written is never measured again. Fields are explained in docs/pruning.md.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segprune.files import read_json, write_csv, write_json
from segprune.runs.records import environment

RECORD, TABLE, PLOT = "sweep.json", "sweep.csv", "sweep.png"
COST = {"params": "parameters", "macs": "macs", "latency": "comparable_ms"}  # of a row, by unit
NAMES = {
    "parameters": "parameters",
    "macs": "MACs for one image",
    "comparable_ms": "latency of a pass (ms)",
}
CSV = (
    "file",
    "method",
    "phi",
    "rate",
    "skipped",
    "parameters",
    "macs",
    "comparable_ms",
    "speedup",
    "miou",
    "finetuned_miou",
    "best",
)
FELT = 0.005  # of mIoU: a curve that falls by less has no knee
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row to measure: which file, ranked how, and the share to remove."""

    file: str
    method: str
    rate: float


class SweepFolder:
    """The rows measured so far, in a folder. Raises ValueError where it holds a sweep with other settings.

    `settings` are those that change what is measured; `files` are the checkpoints. Rates, criteria and files may be
    added to a sweep.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], files: Sequence[str], rate_of: str
    ) -> None:
        self.path = folder / RECORD
        self.rate_of = rate_of
        # As JSON gives them back, so that they can be compared.
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.contents = {file: _digest(Path(file)) for file in files}
        self.rows: list[Row] = []

        if self.path.is_file():
            self._read()
        # A process that was killed while it wrote leaves a temporary file behind.
        for left in folder.glob(f".{RECORD}.*.tmp"):
            left.unlink(missing_ok=True)

    def _read(self) -> None:
        try:
            record = read_json(self.path, "that of a sweep")
            before, contents = record["settings"], record["contents"]
            self.rows = [dict(row) for row in record["rows"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is no sweep that can go on; remove it, or give another `save_dir`."
            ) from error

        for name, value in self.settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{self.path} was measured with `{name}` {before.get(name)}, and now it is {value}; give another "
                    "`save_dir`, or the same settings to go on."
                )
        for file, digest in self.contents.items():
            if contents.get(file, digest) != digest:
                raise ValueError(
                    f"{file} has changed since {self.path} was measured; give another `save_dir`."
                )
        self.contents = contents | self.contents

    def missing(self, cases: Sequence[Case]) -> list[Case]:
        """Returns those of the cases that have no row yet."""
        done = {Case(row["file"], row["method"], row["rate"]) for row in self.rows}
        return [case for case in cases if case not in done]

    def add(self, case: Case, row: Mapping[str, Any]) -> None:
        """Writes a row; when this returns, it is on the disk."""
        self.rows.append(asdict(case) | dict(row))
        write_json(self.record(), self.path)

    def record(self) -> dict[str, Any]:
        """Returns what sweep.json holds: rows by file, criterion and rate, with the best at their cost marked."""
        rows = sorted(self.rows, key=lambda row: (row["file"], row["method"], row["rate"]))
        rows = _make_comparable(rows)
        best = _find_best(rows, COST[self.rate_of])
        knees = []
        for curve in curves_of(rows):
            knee = find_knee(curve, COST[self.rate_of])
            if knee is not None:
                knees.append(knee)
        return {
            "rate_of": self.rate_of,
            "cost": COST[self.rate_of],
            "rows": [row | {"best": i in best} for i, row in enumerate(rows)],
            "knees": knees,
            "settings": self.settings,
            "contents": self.contents,
            "environment": environment(),
        }


def measure_cases(
    folder: SweepFolder,
    cases: Sequence[Case],
    measure: Callable[[Case], Mapping[str, Any]],
    on_row: Callable[[Row], None] | None = None,
) -> None:
    """Measures what is missing, case by case; whoever stops this goes on by calling it again."""
    for case in folder.missing(cases):
        folder.add(case, measure(case))
        if on_row is not None:
            on_row(folder.rows[-1])


def _make_comparable(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with latencies as if the machine had been as fast for all of them.

    Each network was timed in turns with its dense one, whose median over all rows of the file is the measure.
    """
    dense: dict[str, list[float]] = {}
    for row in rows:
        if row["skipped"] is None:
            dense.setdefault(row["file"], []).append(row["dense_latency_ms"])
    usual = {file: statistics.median(times) for file, times in dense.items()}

    comparable = []
    for row in rows:
        if row["skipped"] is None:
            share = row["latency_ms"] / row["dense_latency_ms"]
            row = row | {"comparable_ms": share * usual[row["file"]]}
        comparable.append(row)
    return comparable


def curves_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Returns the rows that were measured, a list for each file and criterion, by rate."""
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: float(row["rate"])):
        if row["skipped"] is None:
            curves.setdefault((row["file"], row["method"]), []).append(row)
    return list(curves.values())


def miou_of(row: Row) -> float:
    """Returns the mIoU that counts: after fine-tuning, where there was one."""
    tuned = row.get("finetuned_miou")
    return float(row["miou"] if tuned is None else tuned)


def find_knee(curve: Sequence[Row], cost: str) -> dict[str, Any] | None:
    """Returns the point behind which a curve falls most steeply compared with before, and why it is that one.

    That is the point farthest above the line between the ends, both axes scaled to the curve's own range ("Finding a
    'Kneedle' in a Haystack", Satopaa et al. 2011). None for fewer than three points, a fall of less than `FELT`, and
    a curve that lies nowhere above that line.
    """
    if len(curve) < 3:
        return None
    first, last = curve[0], curve[-1]
    saved, fallen = first[cost] - last[cost], miou_of(first) - miou_of(last)
    if saved <= 0.0 or fallen < FELT:
        return None

    heights = []
    for row in curve:
        # The line falls from 1 to 0 while the cost that is saved grows from 0 to 1.
        height = (miou_of(row) - miou_of(last)) / fallen
        heights.append(height - 1.0 + (first[cost] - row[cost]) / saved)
    place = max(range(len(curve)), key=heights.__getitem__)
    knee = curve[place]
    if not 0 < place < len(curve) - 1:
        return None

    following = curve[place + 1]
    before = 100.0 * (miou_of(first) - miou_of(knee))
    after = 100.0 * (miou_of(knee) - miou_of(following))
    share = 1.0 - knee[cost] / first[cost]
    return {
        "file": knee["file"],
        "method": knee["method"],
        "rate": knee["rate"],
        "saved": share,
        "points_lost": before,
        "next_rate": following["rate"],
        "next_points_lost": after,
        "reason": f"up to here {share:.0%} of the {NAMES[cost].split()[0]} is saved for {before:.1f} points of mIoU, "
        f"and the next step, to rate {following['rate']:g}, costs {after:.1f}",
    }


def _find_best(rows: Sequence[Row], cost: str) -> set[int]:
    """Returns the numbers of the rows than which none is both cheaper and better."""
    measured = [
        (i, row[cost], miou_of(row)) for i, row in enumerate(rows) if not row["skipped"]
    ]
    best = set()
    for i, own_cost, own_miou in measured:
        beaten = False
        for _, other_cost, other_miou in measured:
            no_worse = other_cost <= own_cost and other_miou >= own_miou
            beaten |= no_worse and (other_cost, other_miou) != (own_cost, own_miou)
        if not beaten:
            best.add(i)
    return best


def save_tables(folder: SweepFolder) -> dict[str, Any]:
    """Writes the table and the plot of all rows, and returns the record."""
    from segprune import plots  # drawing takes a second to import

    record = folder.record()
    write_json(record, folder.path)
    rows = [[row.get(name) for name in CSV] for row in record["rows"]]
    write_csv([CSV, *rows], folder.path.with_name(TABLE))

    # One curve for each file and criterion; the criterion is named where there are several.
    curves = curves_of(record["rows"])
    several = len({row["method"] for row in record["rows"]}) > 1
    points, ringed = {}, []
    knees = {(knee["file"], knee["method"], knee["rate"]) for knee in record["knees"]}
    for curve in curves:
        first = curve[0]
        name = first["file"] + (f" ({first['method']})" if several else "")
        points[name] = [(float(row[record["cost"]]), miou_of(row)) for row in curve]
        for row in curve:
            if (row["file"], row["method"], row["rate"]) in knees:
                ringed.append((float(row[record["cost"]]), miou_of(row)))
    if points:
        path = folder.path.with_name(PLOT)
        plots.trade_off(
            points, "mIoU on val", path, x_name=NAMES[record["cost"]], ringed=ringed
        )
    return record


def _digest(path: Path) -> str | None:
    """Returns what tells a file's contents; None for folders and names of a hub."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
