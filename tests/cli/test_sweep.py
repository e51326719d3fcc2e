"""`segprune sweep`: rows that agree with the networks, a sweep that goes on, and what is refused."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from segprune import load
from segprune.cli import sweep
from segprune.data import open_source
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.stats import count
from segprune.timing import measure_latency
from tests.commands import HERE, SIZE, done, invoke, refused

SMALL = (*SIZE, *HERE, "--num_images", 1, "--pruning_method", "l2")


@pytest.fixture(autouse=True)
def _few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "measure_latency", partial(measure_latency, max_runs=3))


@pytest.fixture(scope="module")
def swept(
    dense: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("sweep")
    flags = ("--data", data, "--rates", "0.6,0,0.05", "--save_dir", folder)
    return folder, done("sweep", dense, *SMALL, *flags)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    record = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = record["rows"]
    return rows


def test_rows_say_what_was_cut_and_what_it_scores(
    swept: tuple[Path, str], dense: Path, data: Path
) -> None:
    folder, out = swept
    whole, folding, pruned = rows_in(folder)
    network = load(dense)
    score = evaluate(network, open_source(data).split("val"), 8, EvalMode(input_shape=(32, 32)))

    # At rate 0 the decode head is folded: fewer parameters, the same classes.
    parameters = count(network.spec, (32, 32)).parameters
    assert whole["parameters"] < parameters
    assert whole["miou"] == pytest.approx(score.miou, abs=1e-3)
    assert 1 - pruned["parameters"] / parameters == pytest.approx(0.6, abs=0.01)
    assert pruned["removed"]["params"] == pytest.approx(0.6, abs=0.01)
    assert pruned["seconds"].keys() == {"cut", "score", "time"}
    for row in (whole, pruned):
        assert row["speedup"] == pytest.approx(row["dense_latency_ms"] / row["latency_ms"])
        assert f"{row['miou']:.4f}" in out

    # What folding alone exceeds is a row that says so.
    assert "less than folding" in folding["skipped"]
    assert "rate 0.05: left out. Rate 0.05 is less than folding" in out
    assert {path.name for path in folder.iterdir()} == {
        "sweep.json",
        "sweep.csv",
        "sweep.png",
        "report.html",
    }


def test_the_same_command_goes_on_and_rates_may_be_added(
    swept: tuple[Path, str], dense: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = swept
    before, cut = rows_in(folder), []
    measure = sweep._Measurer.measure
    monkeypatch.setattr(
        sweep._Measurer,
        "measure",
        lambda self, case: cut.append(case.rate) or measure(self, case),
    )
    flags = (*SMALL, "--data", data, "--save_dir", folder, "--rates")
    out = done("sweep", dense, *flags, "0,0.05,0.6")
    assert "holds 3 rows; 0 rows to go" in out
    assert cut == []

    done("sweep", dense, *flags, "0.5")
    assert cut == [0.5]
    rows = rows_in(folder)
    assert [row["rate"] for row in rows] == [0.0, 0.05, 0.5, 0.6]
    assert [rows[0]["miou"], rows[3]["latency_ms"]] == [
        before[0]["miou"],
        before[2]["latency_ms"],
    ]


def test_whoever_stops_a_sweep_is_told_what_is_saved(
    swept: tuple[Path, str], dense: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep._Measurer, "measure", stop)
    flags = (*SMALL, "--data", data, "--save_dir", swept[0], "--rates", "0.7")
    status, _, errors = invoke("sweep", dense, *flags)
    assert status == 130
    assert re.search(r"sweep\.json holds \d rows, and the same command goes on", errors)


def test_every_row_may_be_fine_tuned_alike(dense: Path, data: Path, tmp_path: Path) -> None:
    flags = ("--data", data, "--epochs", 1, "--rates", 0.8, "--rate_of", "macs")
    out = done("sweep", dense, *SMALL, *flags, "--save_dir", tmp_path)
    (row,) = rows_in(tmp_path)
    assert f"fine-tuned {row['finetuned_miou']:.4f}" in out
    assert row["removed"]["macs"] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rates", "half"), r"--rates is 'half'; give shares such as"),
        (("--rates", "0.5,1"), r"--rates is '0\.5,1'; each must be at least 0 and below 1\."),
        (("--rate_of", "channels"), r"--rate_of is 'channels'; choose one of params, macs, latency\."),
        (("--pruning_method", "l3"), r"--pruning_method is 'l3', which is unknown"),
        (("--lr", 1e-3), r"--lr has no effect without --epochs"),
        (("--data", "nowhere"), r"nowhere "),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_refused(
    flags: tuple[object, ...], message: str, dense: Path, tmp_path: Path
) -> None:
    said = refused("sweep", dense, *SIZE, *HERE, *flags, "--save_dir", tmp_path / "out")
    assert re.match(message, said), said
    assert not (tmp_path / "out").exists()


def test_files_of_other_classes_and_other_settings_are_refused(
    swept: tuple[Path, str], dense: Path, data: Path, tmp_path: Path, small_model: Any
) -> None:
    from segprune import save

    save(small_model.float(), tmp_path / "five.pth")
    said = refused("sweep", dense, tmp_path / "five.pth", *SMALL, "--data", data)
    assert "has 8 classes and" in said
    assert "five.pth has 5" in said
    flags = (*SMALL, "--data", data, "--save_dir", swept[0], "--seed", 3)
    assert "was measured with --seed 11, and now it is 3" in refused("sweep", dense, *flags)
