"""How a run of `segprune prune` ends: pruning_results.json completed, and the closing table.

Of a run that was cut short while it fine-tuned, `segprune train --resume` does this when the fine-tuning is done.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from segprune.cli.console import console, eager_beside, latency_text, measured_on, number_of, show_table
from segprune.files import write_json
from segprune.runs.folder import Fit
from segprune.runs.records import score_record
from segprune.timing import Latency

RESULTS = "pruning_results.json"


def finetuned_folder(path: Path) -> Path:
    """Where a network that was pruned into `path` is fine-tuned by the same command."""
    return path.with_name(path.stem + "_finetuned")


def add_finetuned(record: dict[str, Any], done: Fit, folder: Path) -> None:
    """Put what fine-tuning gave into the record, and the record into the folder."""
    record["finetuned_model"] = record["pruned_model"] | score_record(done.score) | {"best_epoch": done.epoch}
    record["finetuned_save_path"] = str(done.path)
    write_json(record, folder / RESULTS)


def unfinished(tuned: Path, epochs: int) -> dict[str, Any] | None:
    """What a run of `segprune prune` left that was to fine-tune in the folder `tuned` for so many epochs, and did not
    come to its end; None where there is none."""
    tuned = tuned.resolve()
    path = tuned.parent / RESULTS
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    of_it = finetuned_folder(Path(record["model_save_path"])).name == tuned.name
    waits = record.get("settings", {}).get("epochs") == epochs and "finetuned_model" not in record
    return record if of_it and waits else None


def show_closing(record: dict[str, Any], folder: Path) -> None:
    """The closing table."""
    latencies = {name: Latency(**record[name]["latency"]) for name in ("original_model", "pruned_model")}
    dense, pruned = (latency_text(latency) for latency in latencies.values())
    networks = [("dense", "original_model", dense), ("pruned", "pruned_model", pruned)]
    if record["folded_model"]["parameters"] < record["original_model"]["parameters"]:
        networks.insert(1, ("decode head folded", "folded_model", "–"))
    if "finetuned_model" in record:
        networks.append(("fine-tuned", "finetuned_model", pruned))
    rows = []
    for name, key, latency in networks:
        values = record[key]
        miou = f"{values['miou']:.4f}" if "miou" in values else "–"
        rows.append([name, f"{values['parameters_M']:.3f}", f"{values['macs_G']:.3f}", latency, miou])
    show_table("Results", ["network", "params (M)", "MACs (G)", "latency (ms)", "mIoU"], rows)
    how = record["pruning_config"]
    if how["repaired"]:
        console.print(f"Repaired with {number_of(how['num_images'], 'picture')}, before any training.")
    reduction = record["reduction"]
    console.print(
        f"Parameters −{reduction['parameters_reduction_percent']:.1f} % "
        f"(folding {reduction['parameters_by_folding_percent']:.1f}), "
        f"FLOPs −{reduction['flops_reduction_percent']:.1f} % (folding {reduction['flops_by_folding_percent']:.1f}), "
        f"{reduction['speedup']:.2f} × faster."
    )
    height, width = record["model_config"]["input_shape"]
    console.print(measured_on(latencies["original_model"], (height, width)))
    if sentence := eager_beside(latencies["original_model"], latencies["pruned_model"]):
        console.print(sentence)
    for label, path in (
        ("Pruned network", record["model_save_path"]),
        ("Fine-tuned network", record.get("finetuned_save_path")),
        ("All numbers", folder / RESULTS),
    ):
        if path:
            console.print(f"{label}: {path}", soft_wrap=True)
