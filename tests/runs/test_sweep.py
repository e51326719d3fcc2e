"""A sweep on disk: what is written is never measured again, whatever ends the process; and what it concludes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from segprune.runs.sweep import (
    Case,
    Row,
    SweepFolder,
    find_knee,
    measure_cases,
    save_tables,
)

ROOT = Path(__file__).parents[2]
SETTINGS = {"epochs": 0, "input_shape": (32, 64)}
CASES = [Case("a.pth", "l1", rate) for rate in (0.0, 0.3, 0.6, 0.9)]


def row_at(cost: int, miou: float, **more: Any) -> Row:
    sizes = {"parameters": cost, "macs": cost, "latency_ms": 1.0, "dense_latency_ms": 1.0}
    return {"phi": "b0", "skipped": None, "miou": miou, **sizes, **more}


def measure(case: Case) -> Mapping[str, Any]:
    return row_at(round(1000 * (1 - case.rate)), 0.8 - (0.7 if case.rate > 0.8 else 0.0))


def open_sweep(folder: Path, **changes: Any) -> SweepFolder:
    return SweepFolder(folder, SETTINGS | changes, ["a.pth"], "params")


def test_what_was_measured_is_there_at_once_and_not_measured_again(tmp_path: Path) -> None:
    def stop_at_the_third(case: Case) -> Mapping[str, Any]:
        if case.rate == 0.6:
            raise KeyboardInterrupt
        return measure(case)

    with pytest.raises(KeyboardInterrupt):
        measure_cases(open_sweep(tmp_path), CASES, stop_at_the_third)
    again = open_sweep(tmp_path)
    assert [row["rate"] for row in again.rows] == [0.0, 0.3]

    # The rest is measured, and rates that are added later come to those that are there.
    seen: list[Row] = []
    measure_cases(again, CASES, measure, seen.append)
    assert [row["rate"] for row in seen] == [0.6, 0.9]
    more = [*CASES, Case("a.pth", "l1", 0.75)]
    assert open_sweep(tmp_path).missing(more) == more[-1:]


# Imports once, then forks a process for every start. Each prunes a tiny network and times it, and says which row it
# begins; one that is to be killed gets SIGKILL at a random moment.
NURSERY = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from segprune.model import SegFormer
from segprune.pruning.options import PruneOptions
from segprune.pruning.pruner import Pruner
from segprune.runs.sweep import Case, SweepFolder, measure_cases
from segprune.spec import spec_from_dict
from segprune.stats import count
from segprune.timing import measure_latency

torch.set_num_threads(1)
out, log = Path(sys.argv[1]), Path(sys.argv[2])
pruner = Pruner(SegFormer(spec_from_dict(json.loads(sys.argv[3]))), round_to=1, input_shape=(32, 32), repair=False)
cases = [Case("a.pth", "l1", round(0.3 + 0.03 * i, 2)) for i in range(18)]

def sweep():
    prepared = pruner.prepare()
    decide = pruner.make_decider(prepared, pruner.score(prepared))

    def measure(case):
        with log.open("a") as file:
            print(case.rate, file=file)
        plan = decide(PruneOptions(pruning_rate=case.rate, round_to=1, repair=False))
        network = pruner.cut_and_repair(prepared, plan)
        dense, latency = measure_latency([pruner.model, network], (32, 32), max_runs=3)
        parameters = count(network.spec, (32, 32)).parameters
        return {
            "skipped": None,
            "miou": 0.5,
            "parameters": parameters,
            "latency_ms": latency.median_ms,
            "dense_latency_ms": dense.median_ms,
        }

    measure_cases(SweepFolder(out, {}, ["a.pth"], "params"), cases, measure)

def start():
    child = os.fork()
    if not child:
        sweep()
        os._exit(0)
    return child

def rows():
    path = out / "sweep.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []

random.seed(1)
history = []
for number in range(6):
    begun = log.stat().st_size if log.exists() else 0
    child, saved = start(), len(rows())
    if number < 5:
        while len(rows()) < saved + 2:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with log.open() as file:
        file.seek(begun)
        history.append([status, [float(line) for line in file], rows()])
print(json.dumps(history))
"""


def test_five_kills_lose_no_row_and_none_is_measured_twice(
    tmp_path: Path, small_spec: Any
) -> None:
    from segprune.spec import spec_to_dict

    spec = json.dumps(spec_to_dict(small_spec))
    command = [sys.executable, "-W", "error", "-c", NURSERY, tmp_path, tmp_path / "log", spec]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    history = json.loads(result.stdout.splitlines()[-1])

    known: dict[float, Row] = {}
    for status, begun, rows in history:
        # Nothing that was on the disk is begun again, and all of it is still there.
        assert not known.keys() & set(begun)
        now = {row["rate"]: row for row in rows}
        for rate, row in known.items():
            assert now[rate]["latency_ms"] == row["latency_ms"]
        known = now
        assert status in (0, -9)
    assert [status for status, *_ in history].count(-9) == 5
    assert len(known) == 18
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"epochs": 2},
            r"sweep\.json was measured with `epochs` 0, and now it is 2; .*`save_dir`",
        ),
        ({"input_shape": (64, 64)}, r"`input_shape` \[32, 64\], and now it is \[64, 64\]"),
    ],
)
def test_other_settings_do_not_mix_into_a_sweep(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    measure_cases(open_sweep(tmp_path), CASES[:1], measure)
    with pytest.raises(ValueError, match=message):
        open_sweep(tmp_path, **changes)


def test_a_file_that_changed_and_a_record_of_another_kind_are_refused(tmp_path: Path) -> None:
    network = tmp_path / "b0.pth"
    network.write_bytes(b"one")
    folder = SweepFolder(tmp_path, {}, [str(network)], "params")
    folder.add(Case(str(network), "l1", 0.0), measure(CASES[0]))
    SweepFolder(tmp_path, {}, [str(network)], "params")
    network.write_bytes(b"two")
    with pytest.raises(
        ValueError, match=r"b0\.pth has changed since .*sweep\.json was measured"
    ):
        SweepFolder(tmp_path, {}, [str(network)], "params")

    for text in ("{", "[]", '{"rows": []}'):
        (tmp_path / "sweep.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="is no sweep that can go on"):
            open_sweep(tmp_path)


def test_the_knee_is_where_the_curve_begins_to_fall() -> None:
    mious = {1000: 0.8, 700: 0.8, 400: 0.79, 200: 0.6, 100: 0.4}
    curve = []
    for cost, miou in mious.items():
        curve.append(row_at(cost, miou, file="a", method="l1", rate=1 - cost / 1000))
    knee = find_knee(curve, "parameters")
    assert knee is not None
    assert knee["rate"] == pytest.approx(0.6)
    assert "60% of the parameters is saved for 1.0 points" in knee["reason"]
    assert "to rate 0.8, costs 19.0" in knee["reason"]

    # After a fine-tune it is that score that counts.
    for row, tuned in zip(curve, (0.8, 0.8, 0.8, 0.79, 0.5), strict=True):
        row["finetuned_miou"] = tuned
    knee = find_knee(curve, "parameters")
    assert knee is not None
    assert knee["rate"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "mious", [(0.8, 0.8, 0.798), (0.8, 0.7, 0.6), (0.8, 0.5, 0.45), (0.8, 0.4)]
)
def test_a_curve_that_is_flat_straight_hollow_or_short_has_no_knee(mious: Any) -> None:
    curve = []
    for i, miou in enumerate(mious):
        curve.append(row_at(300 - 100 * i, miou, file="a", method="l1", rate=i / 10))
    assert find_knee(curve, "parameters") is None


def test_latencies_are_compared_as_if_the_machine_had_not_changed(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path, SETTINGS, ["a.pth"], "latency")
    times = {
        0.0: (10.0, 5.0),
        0.3: (80.0, 32.0),
        0.6: (10.0, 2.0),
    }  # dense and pruned, in turns
    for rate, (dense, pruned) in times.items():
        row = row_at(1, 0.8 - rate / 10, latency_ms=pruned, dense_latency_ms=dense)
        folder.add(Case("a.pth", "l1", rate), row)
    rows = folder.record()["rows"]
    assert [row["comparable_ms"] for row in rows] == pytest.approx([5.0, 4.0, 2.0])
    assert [row["latency_ms"] for row in rows] == [5.0, 32.0, 2.0]
    assert all(row["best"] for row in rows)


def test_the_tables_hold_every_row_and_mark_the_best_at_their_cost(tmp_path: Path) -> None:
    folder = open_sweep(tmp_path)
    measure_cases(folder, CASES, measure)
    folder.add(Case("b.pth", "l1", 0.3), row_at(900, 0.79))
    folder.add(Case("b.pth", "l1", 0.6), row_at(100, 0.2))
    folder.add(Case("b.pth", "l1", 0.9), {"phi": "b1", "skipped": "Rate 0.9 is out of reach."})
    record = save_tables(folder)

    best = {(row["file"], row["rate"]) for row in record["rows"] if row["best"]}
    assert best == {("a.pth", 0.6), ("b.pth", 0.6)}
    (knee,) = record["knees"]
    assert (knee["file"], knee["rate"], knee["next_rate"]) == ("a.pth", 0.6, 0.9)
    assert knee["points_lost"] < knee["next_points_lost"]
    assert json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8")) == record
    rows = list(
        csv.DictReader((tmp_path / "sweep.csv").read_text(encoding="utf-8").splitlines())
    )
    assert [row["miou"] for row in rows] == [
        "0.8",
        "0.8",
        "0.8",
        "0.10000000000000009",
        "0.79",
        "0.2",
        "",
    ]
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.size[0] > 500
