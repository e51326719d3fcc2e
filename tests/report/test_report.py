"""What a page is made of: records of any age gathered, images chosen by rule, and everything escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from segprune.files import write_json
from segprune.inference.evaluate import EvalMode
from segprune.report import find_folders, write_report
from segprune.report.examples import choose_examples
from segprune.report.gather import gather
from segprune.report.render import Gallery, render
from segprune.report.words import WORDS
from tests.report.conftest import EVIL

Change = Callable[[Callable[[dict[str, Any]], None]], Path]


def test_the_class_that_lost_most_stands_first(results: Path) -> None:
    facts = gather(results)
    changes = [row.change for row in facts.classes if row.change is not None]
    assert changes == sorted(changes)
    assert {network.name for network in facts.networks} == {"dense", "pruned"}


def test_widths_are_those_of_the_specs(results: Path) -> None:
    facts = gather(results)
    assert facts.widths[0].widths[-1] == (32, 16)  # the FFN of the first block
    dense = facts.networks[0]
    assert sum(part.macs[0] for part in facts.parts) == dense.macs
    assert sum(part.parameters[0] for part in facts.parts) == dense.parameters


def test_text_of_strangers_is_escaped(results: Path) -> None:
    page = render(gather(results), Gallery(), "en")
    assert EVIL not in page
    assert "&lt;script&gt;" in page


def test_a_page_names_what_is_missing(changed: Change) -> None:
    def strip(record: dict[str, Any]) -> None:
        # As an older version left it, and with a data set that was moved.
        del record["original_model"]["spec"], record["class_names"]
        del record["pruned_model"]["iou"]
        record["settings"] |= {"model_path": "gone.pth", "data": "moved", "epochs": 3}

    folder = changed(strip)
    page = write_report(folder).read_text(encoding="utf-8")
    assert {note.key for note in gather(folder).notes} == {
        "missing_finetuned",
        "missing_scores",
        "missing_specs",
    }
    assert "gone.pth" in page
    assert "<figure>" not in page


@pytest.mark.parametrize(
    ("miou", "iou", "said", "advised"),
    [
        (0.501, 0.499, ("quality_kept", "none_suffers"), "do_export"),
        (0.45, 0.3, ("quality_fell", "suffers"), "do_finetune"),
        (0.55, 0.3, ("quality_rose", "suffers"), "do_export"),
    ],
)
def test_the_verdict_and_the_advice_follow_from_what_was_lost(
    miou: float, iou: float, said: tuple[str, ...], advised: str, changed: Change
) -> None:
    def score(record: dict[str, Any]) -> None:
        record["original_model"] |= {"miou": 0.5, "iou": [0.5] * 8}
        record["pruned_model"] |= {"miou": miou, "iou": [iou] * 8}

    folder = changed(score)
    page = write_report(folder).read_text(encoding="utf-8")
    summary = page.partition('id="summary"')[2].partition("</section>")[0]
    starts = {key: sentence[0].partition("{")[0] for key, sentence in WORDS.items()}
    sentences = ("quality_kept", "quality_fell", "quality_rose", "suffers", "none_suffers")
    assert {key for key in sentences if starts[key] in summary} == set(said)
    assert starts[advised] in summary


def test_what_folding_saved_is_told_apart_where_the_head_was_folded(
    results: Path, changed: Change
) -> None:
    def fold(record: dict[str, Any]) -> None:
        dense = record["original_model"]
        record["folded_model"] |= {
            "macs": dense["macs"] // 4,
            "parameters": dense["parameters"] - 1,
        }

    assert "75 % went by folding" in write_report(changed(fold)).read_text(encoding="utf-8")
    assert "went by folding" not in write_report(results).read_text(encoding="utf-8")


def test_images_that_moved_are_named_and_found_again(results: Path, changed: Change) -> None:
    folder = changed(lambda record: record["settings"].update(data="moved"))
    assert "moved" in write_report(folder).read_text(encoding="utf-8")
    page = write_report(folder, data=str(results / "data")).read_text(encoding="utf-8")
    assert page.count("<figure>") == 5


@pytest.mark.parametrize("value", [None, "x", [], {}, [[1]], -1, float("nan")])
def test_values_of_another_type_are_left_out(value: object, changed: Change) -> None:
    def spoil(record: dict[str, Any]) -> None:
        for name in record:
            if isinstance(record[name], dict):
                record[name] = dict.fromkeys(record[name], value)
        record["settings"]["data"] = ""

    assert "<html" in write_report(changed(spoil)).read_text(encoding="utf-8")


def test_a_record_cut_off_in_the_middle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pruning_results.json").write_text('{"settings": {', encoding="utf-8")
    with pytest.raises(ValueError, match=r"pruning_results\.json"):
        write_report(tmp_path)


def test_folders_are_found_below_one_that_has_no_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="sweep"):
        find_folders(tmp_path)
    write_json({}, tmp_path / "a" / "b" / "sweep.json")
    assert find_folders(tmp_path) == [tmp_path / "a" / "b"]


@pytest.mark.parametrize(
    ("unit", "cost", "said"),
    [
        ("params", "parameters", "are saved for 1.2 points"),
        ("latency", "comparable_ms", "of the time is saved for 1.2 points"),
        ("macs", "macs", "it bends"),  # as older files have it: a sentence alone
    ],
)
def test_a_sweep_shows_its_points_and_the_knee(
    unit: str, cost: str, said: str, tmp_path: Path
) -> None:
    rows = []
    for rate in (0.0, 0.5, 0.9):
        row = {"file": EVIL, "method": "l1", "rate": rate, cost: 1e6 * (1 - rate)}
        rows.append(row | {"miou": 0.5 - rate / 4})
    knee: dict[str, Any] = {"file": EVIL, "method": "l1", "rate": 0.5, "reason": "it bends"}
    if said != "it bends":
        knee |= {"saved": 0.5, "points_lost": 1.2, "next_rate": 0.9, "next_points_lost": 8.0}
    record = {"rate_of": unit, "cost": cost, "rows": rows, "knees": [knee]}
    write_json(record | {"settings": {"data": "my data"}}, tmp_path / "sweep.json")

    page = write_report(tmp_path).read_text(encoding="utf-8").replace("</span> <span>", " ")
    assert len(gather(tmp_path).points) == 3
    assert said in page
    assert f"--pruning_rate 0.5 --rate_of {unit} --data &#39;my data&#39;" in page
    assert EVIL not in page


def test_a_training_run_and_an_evaluation_have_pages_too(tmp_path: Path) -> None:
    epochs = [
        {"epoch": k, "loss": 1 / k, "miou": k / 4, "best": k == 2, "iou": [0.5, k / 4]}
        for k in (1, 2)
    ]
    record = {"epochs": epochs, "settings": {"epochs": 3, "data": ""}}
    write_json(record, tmp_path / "train" / "training_results.json")
    facts = gather(tmp_path / "train")
    assert facts.networks[0].miou == 0.5
    assert [note.key for note in facts.notes] == ["missing_epochs"]
    assert write_report(tmp_path / "train").read_text(encoding="utf-8").count("<svg") == 2

    score = {"miou": 0.4, "iou": [0.5, None, 0.3], "class_names": ["a", "b", "c"]}
    write_json(score, tmp_path / "eval" / "scores.json")
    assert [row.name for row in gather(tmp_path / "eval").classes] == ["c", "a", "b"]
    assert "<html" in write_report(tmp_path / "eval").read_text(encoding="utf-8")


class Drawn:
    """An image whose number stands in its pixels; class 1 is labelled everywhere."""

    def __init__(self, number: int) -> None:
        self.number, self.name = number, str(number)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        image = np.full((32, 32, 3), self.number, dtype=np.uint8)
        return image, np.ones((32, 32), dtype=np.uint8)


def test_the_worst_images_and_those_around_the_median_are_chosen() -> None:
    mean, std = torch.tensor([123.675]), torch.tensor([58.395])

    def dense(pixels: Tensor) -> Tensor:
        return torch.stack([torch.zeros(32, 32), torch.ones(32, 32)])[None]

    def pruned(pixels: Tensor) -> Tensor:
        # Image k loses its first k rows.
        number = int((pixels[0, 0, 0, 0] * std + mean).round())
        logits = dense(pixels)
        logits[:, 1, :number] = -1.0
        return logits

    samples = [Drawn(number) for number in range(21)]
    palette = np.arange(768) % 256
    examples = choose_examples(
        [dense, pruned],
        samples,
        2,
        palette.tolist(),
        EvalMode(input_shape=(32, 32)),
        torch.device("cpu"),
    )
    worst = [int(one.name) for one in examples if one.rule == "worst"]
    typical = [int(one.name) for one in examples if one.rule == "typical"]
    assert worst == [20, 19, 18, 17, 16, 15]
    assert len(typical) == 6
    assert min(typical) <= 10 <= max(typical)
    assert examples[0].right == (1.0, 12 / 32)


def test_every_sentence_is_there_in_both_languages() -> None:
    for english, chinese in WORDS.values():
        assert sorted(re.findall(r"{\w+}", english)) == sorted(re.findall(r"{\w+}", chinese))
        assert english and chinese  # noqa: PT018


def test_the_page_says_what_its_json_says(results: Path) -> None:
    record = json.loads((results / "pruning_results.json").read_text(encoding="utf-8"))
    page = render(gather(results), Gallery(), "zh")
    assert f"{record['original_model']['miou']:.4f}" in page
    assert 'data-lang="zh"' in page
