"""`segprune scan`: its files, the way back into `segprune prune`, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from segprune import load
from tests.commands import HERE, SIZE, done, refused


@pytest.fixture(scope="module")
def scanned(
    dense: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("scan")
    flags = ("--images", data, "--num_images", 2, "--rates", "0.5,0.25", "--save_dir", folder)
    return folder, done("scan", dense, *SIZE, *flags)


def test_the_files_hold_what_the_table_shows(scanned: tuple[Path, str]) -> None:
    folder, out = scanned
    record = json.loads((folder / "scan.json").read_text(encoding="utf-8"))
    assert record["unit"] == "divergence"
    rows = list(csv.DictReader((folder / "scan.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == len(record["findings"]) == 2 * len({row["part"] for row in rows})
    for row, finding in zip(rows, record["findings"], strict=True):
        assert (row["part"], float(row["divergence"])) == (finding["part"], finding["loss"])
        assert f"{finding['loss']:.4f}" in out
    assert {"head", "stages.0 ffn", "stages.3 stage"} <= {row["part"] for row in rows}
    with Image.open(folder / "scan.png") as picture:
        assert picture.size[1] > 400


def test_a_scan_steers_pruning(scanned: tuple[Path, str], dense: Path, tmp_path: Path) -> None:
    for name, flags in (
        ("plain", ()),
        ("scanned", ("--sensitivity", scanned[0] / "scan.json")),
    ):
        done("prune", "--model_path", dense, *SIZE, *flags, "--save_dir", tmp_path / name)
    specs = [
        load(tmp_path / name / "l1/b0/b0_pruned_0.5.pth").spec for name in ("plain", "scanned")
    ]
    assert specs[0] != specs[1]


def test_with_labels_the_loss_is_in_miou(dense: Path, data: Path, tmp_path: Path) -> None:
    done("scan", dense, *SIZE, *HERE, "--data", data, "--rates", "0.9", "--save_dir", tmp_path)
    record = json.loads((tmp_path / "scan.json").read_text(encoding="utf-8"))
    assert record["unit"] == "mIoU lost"
    assert all(-1 <= finding["loss"] <= 1 for finding in record["findings"])
    assert any(finding["loss"] > 0 for finding in record["findings"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (),
            r"Give either --images, images without labels, or --data, a data set to score on\.",
        ),
        (("--images", ".", "--data", "."), r"Give either --images, .*, or --data, .*\."),
        (
            ("--images", ".", "--rates", "half"),
            r"--rates is 'half'; give shares such as 0\.25,0\.5,0\.75\.",
        ),
        (
            ("--images", ".", "--rates", "0.5,1"),
            r"--rates is '0\.5,1'; each must lie between 0 and 1\.",
        ),
        (("--images", "nowhere"), r"nowhere holds no image; give a folder with"),
    ],
)
def test_a_wrong_flag_is_refused(
    flags: tuple[object, ...], message: str, dense: Path, tmp_path: Path
) -> None:
    said = refused("scan", dense, *SIZE, *flags, "--save_dir", tmp_path / "out")
    assert re.match(message, said), said
