"""`segprune prune --max_drop`: the network it finds, what is saved of the trials, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import segprune
from segprune import load
from segprune.data import open_source
from segprune.inference.drop import Drop, DropScorer
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.pruning.budget import Trial
from tests.commands import HERE, SIZE, done, refused

POINTS = 2.0
HOW = EvalMode(input_shape=(32, 32))


@pytest.fixture(scope="module")
def searched(
    dense: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder and the output of a run by scores and without a repair, which takes no time."""
    folder = tmp_path_factory.mktemp("searched")
    flags = ("--max_drop", POINTS, "--no_repair", "--data", data, "--save_dir", folder)
    return folder / "l1/b0", done("prune", "--model_path", dense, *SIZE, *HERE, *flags)


def record_in(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(
        (folder / "pruning_results.json").read_text(encoding="utf-8")
    )
    return record


def test_the_network_that_is_saved_stays_within_the_drop(
    searched: tuple[Path, str], dense: Path, data: Path
) -> None:
    folder, out = searched
    record = record_in(folder)
    samples = open_source(data).split("val")
    before, after = (
        evaluate(load(path), samples, 8, HOW)
        for path in (dense, folder / "b0_pruned_drop2.pth")
    )
    assert 100 * (before.miou - after.miou) <= POINTS
    assert record["original_model"]["miou"] == before.miou
    assert record["pruned_model"]["miou"] == after.miou
    assert record["pruning_config"]["max_drop"] == POINTS
    assert record["pruning_config"]["pruning_rate"] == record["search"]["rate"]
    assert f"Chosen: rate {record['search']['rate']:g}," in out
    assert "before fine-tuning" in out


def test_every_trial_is_shown_and_recorded_and_the_neighbours_are_saved(
    searched: tuple[Path, str],
) -> None:
    folder, out = searched
    search = record_in(folder)["search"]
    trials = sorted(search["trials"], key=lambda trial: trial["rate"])
    assert 1 <= len(trials) <= 8
    for trial in trials:
        assert f"rate {trial['rate']:.2f}: loses {trial['drop_points']:.2f} points" in out

    place = [trial["chosen"] for trial in trials].index(True)
    for number, trial in enumerate(trials):
        assert (trial["path"] is not None) == (abs(number - place) <= 1)
        if trial["path"]:
            parameters = sum(p.numel() for p in load(trial["path"]).parameters())
            assert trial["parameters"] == parameters
    beyond = trials[place + 1 :]
    assert all(trial["drop_points"] > POINTS for trial in beyond) or search["limit"]


def test_in_python_it_is_the_same_search(
    searched: tuple[Path, str], dense: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segprune.api, "choose_workers", lambda: 0)
    seen: list[Trial] = []
    pruned = segprune.prune(
        load(dense),
        max_drop=POINTS,
        data=data,
        input_shape=(32, 32),
        repair=False,
        on_trial=seen.append,
    )
    search = record_in(searched[0])["search"]
    assert pruned.search is not None
    assert pruned.search.chosen.network is pruned.network
    assert pruned.search.chosen.rate == search["rate"]
    assert [trial.rate for trial in seen] == [trial["rate"] for trial in search["trials"]]
    assert pruned.plan == pruned.search.chosen.plan
    assert pruned.after is not None


def test_with_data_its_train_images_serve_the_repair(
    dense: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def prune(model: Any, *, images: Any, **_: Any) -> None:
        given.extend(images)

    monkeypatch.setattr(segprune.api, "prune_network", prune)
    segprune.prune(load(dense), 0.5, data=data, input_shape=(32, 32))
    assert sum(map(len, given)) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_drop": 0.0}, "`max_drop` is 0; give the points of mIoU .* above 0"),
        ({"max_drop": -1.0}, "`max_drop` is -1; give the points"),
        ({"max_drop": 1.0}, "`max_drop` needs `data`"),
        (
            {"max_drop": 1.0, "pruning_rate": 0.5},
            "`max_drop` cannot be combined with `pruning_rate`",
        ),
        ({"max_drop": 1.0, "plan": {"a": 1}}, "`max_drop` cannot be combined with `plan`"),
    ],
)
def test_python_refuses_what_contradicts_it(
    arguments: dict[str, Any], message: str, dense: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        segprune.prune(load(dense), **arguments)


def test_a_pruner_by_itself_cannot_score(dense: Path) -> None:
    with pytest.raises(
        ValueError, match="`max_drop` needs networks to be scored; call segprune"
    ):
        segprune.L1Pruner(load(dense), max_drop=1.0).prune()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max_drop", 0, "--data", "."), "--max_drop is 0; give the points"),
        (("--max_drop", 1), "--max_drop needs --data"),
        (("--max_drop", 1, "--data", ".", "--pruning_rate", 0.5), "--max_drop cannot be combined with --pruning_rate"),
        (("--max_drop", 1, "--data", ".", "--plan_only"), "--max_drop cannot be combined with --plan_only"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_refused(
    flags: tuple[object, ...], message: str, dense: Path, tmp_path: Path
) -> None:
    said = refused("prune", "--model_path", dense, *SIZE, *flags, "--save_dir", tmp_path)
    assert said.startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_budget_that_no_network_keeps_is_refused_with_the_least_loss(
    dense: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segprune.pruning.budget.accuracy.MAX_TRIALS", 1)
    monkeypatch.setattr(DropScorer, "drop", lambda *arguments: Drop(3.0, 0.0, 3))
    flags = ("--max_drop", 1, "--no_repair", "--data", data, "--save_dir", tmp_path)
    said = refused("prune", "--model_path", dense, *SIZE, *HERE, *flags)
    assert "No network within 1 points" in said
    assert "3.00 points, at rate 0.5" in said
    assert "--max_drop" in said
