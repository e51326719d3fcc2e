"""The table of docs/gpu.md in its form, without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu


def test_the_table_has_every_network_and_batch_and_the_file_every_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--cpu", "--out", str(out)])
    gpu.main()

    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["network"], row["batch"]) for row in rows] == [
        (name, batch) for batch in (1, 2) for name in ("dense", "folded", "pruned 0.5")
    ]
    assert rows[0]["macs"] > rows[1]["macs"] > rows[2]["macs"]

    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| b0")]
    for line, row in zip(table, rows, strict=True):
        assert f"b0 {row['network']}, {row['batch']} " in line
        assert f"{row['latency']['fp32']['median_ms']:.2f}" in line
