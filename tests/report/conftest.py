"""One folder of results for all tests of the page: a small network pruned, its classes named by a stranger."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.trained_like import fill
from segprune import api, checkpoint
from segprune.data import open_source, write_shapes
from segprune.files import write_json
from segprune.inference.evaluate import Score
from segprune.model import SegFormer
from segprune.runs.records import environment, network_record, network_size
from segprune.spec import BlockSpec, Numerics, Spec, StageSpec, spec_to_dict
from segprune.stats import count

EVIL = "<script>document.title='run'</script>"
SIZE = (64, 96)


def _small_spec() -> Spec:
    stages = []
    for width, heads in ((16, 1), (24, 2), (32, 4), (40, 4)):
        last = width == 40
        block = BlockSpec(heads, 8, 8, 2 * width, None if last else width, 0.3)
        kernel, stride = (7, 4) if width == 16 else (3, 2)
        stages.append(StageSpec(width, kernel, stride, 1 if last else 2, (block,)))
    return Spec("b0", 8, tuple(stages), (24,) * 4, 24, Numerics(drop_path=0.0))


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `segprune prune` leaves: two checkpoints, a data set, pruning_results.json; never changed by a test."""
    folder = tmp_path_factory.mktemp("results")
    write_shapes(folder / "data", num_train=1, num_val=5, size=SIZE, seed=5)
    torch.manual_seed(0)
    spec = _small_spec()
    narrow = tuple(
        replace(stage, blocks=tuple(replace(block, ffn_dim=16) for block in stage.blocks))
        for stage in spec.stages
    )
    names = [EVIL, *(f"class {k}" for k in range(1, 8))]

    # Dense and pruned, each scored.
    source = open_source(folder / "data")
    records: list[dict[str, Any]] = []
    for name, own in (("dense", spec), ("pruned", replace(spec, stages=narrow))):
        model = fill(SegFormer(own)).eval()
        assert isinstance(model, SegFormer)
        checkpoint.save(model, folder / f"{name}.pth", extra={"class_names": names})
        score: Score = api.evaluate(model, source, input_shape=SIZE)
        records.append(network_record(count(own, SIZE), None, score))
        records[-1]["spec"] = spec_to_dict(own)

    record = {
        "model_config": {"phi": "b0", "num_classes": 8, "input_shape": list(SIZE)},
        "pruning_config": {"repaired": True, "num_images": 4},
        "original_model": records[0],
        "folded_model": network_size(count(spec, SIZE)),
        "pruned_model": records[1],
        "class_names": names,
        "settings": {
            "model_path": str(folder / "dense.pth"),
            "data": str(folder / "data"),
            "input_shape": list(SIZE),
            "epochs": 0,
        },
        "environment": environment(),
        "model_save_path": str(folder / "pruned.pth"),
    }
    write_json(record, folder / "pruning_results.json")
    return folder


@pytest.fixture
def changed(
    results: Path, tmp_path: Path
) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """Returns a folder with the record alone, after a change."""

    def change(how: Callable[[dict[str, Any]], None]) -> Path:
        record = json.loads((results / "pruning_results.json").read_text(encoding="utf-8"))
        how(record)
        write_json(record, tmp_path / "pruning_results.json")
        return tmp_path

    return change
