"""The tables of docs/gpu.md in their form, without a GPU and without training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu


def test_the_tables_have_every_network_and_the_file_every_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--cpu", "--minutes", "0", "--out", str(out)])
    monkeypatch.setattr(gpu, "measure_waiting", lambda *_: "Waiting was not measured.")
    monkeypatch.setattr(gpu, "measure_steps", lambda *_, **__: [])
    gpu.main()

    record = json.loads(out.read_text(encoding="utf-8"))
    names = [row["network"] for row in record["logits"]]
    assert names == ["dense", "folded", "pruned 0.5"]
    macs = [row["floor"]["macs_ms"] for row in record["logits"]]
    assert macs == sorted(macs, reverse=True)

    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| b0")]
    for row in record["logits"]:
        lines = [line for line in table if f"b0 {row['network']}, 2 " in line]
        assert any(f"{row['ms']:.2f}" in line for line in lines)
    assert "Waiting was not measured." in record["notes"]
    assert any("compiled" in note for note in record["notes"])  # what --minutes left out
