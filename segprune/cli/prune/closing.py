"""How a run of `segprune prune` ends: pruning_results.json, and the closing table.

Of a run that was cut short while it fine-tuned, `segprune train --resume` does this when the fine-tuning is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from segprune.checkpoint import Checkpoint
from segprune.cli.console import (
    console,
    eager_beside,
    latency_text,
    measured_on,
    number_of,
    show_notes,
    show_table,
)
from segprune.files import read_json, write_json
from segprune.inference.evaluate import Score
from segprune.model import SegFormer
from segprune.pruning.options import PruneOptions
from segprune.runs.folder import Fit
from segprune.runs.records import (
    environment,
    network_record,
    network_size,
    reduction_record,
    score_record,
)
from segprune.spec import spec_to_dict, with_folded_head
from segprune.stats import count
from segprune.timing import Latency
from segprune.training.state import fingerprint_of

RESULTS = "pruning_results.json"
STARTED_FROM = (
    "started_from"  # in results, and in the extra of a run's files: a fingerprint of weights
)


NOTED = (
    "scope",
    "round_to",
    "max_rate",
    "ignore",
    "plan",
    "heads",
    "keep_decoder",
    "uniform",
    "kv_reduction",
    "seed",
)  # options that say what was removed


def pruning_config(
    options: PruneOptions, images: Sequence[Tensor], *, synthetic: bool
) -> dict[str, Any]:
    """Returns what was asked; `pruning_rate` is None where something else than one rate said it."""
    budgets = options.budgets
    # A single number is recorded only where one budget alone decided.
    one = next(iter(budgets.items())) if len(budgets) == 1 else (None, None)
    return {
        "method": options.pruning_method,
        "pruning_rate": one[1],
        "rate_of": one[0],
        "budgets": budgets,
        "rates": options.shares_by_name,
        "repaired": bool(images) and options.repair is not False,
        "num_images": sum(map(len, images)),
        "synthetic_images": synthetic,
        "price": options.group_price,
        "normalise": options.normalise,
        **{name: getattr(options, name) for name in NOTED},
    }


def results_record(
    opened: Checkpoint,
    pruned: SegFormer,
    latencies: Sequence[Latency],
    parts_ms: Sequence[Mapping[str, float]],
    scores: Mapping[str, Score],
    how: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what pruning_results.json holds, fine-tuning apart; times are of the dense and the pruned network."""
    shape = settings["input_shape"]
    original, after = count(opened.spec, shape), count(pruned.spec, shape)
    # Folding changes no logits, so what it saves is told apart from what pruning saves.
    folded = count(with_folded_head(opened.spec), shape) if pruned.spec.folded else original
    # Dense first, as they were timed: above 1 the pruned network is faster.
    speedup = latencies[0].median_ms / latencies[1].median_ms
    return {
        "model_config": {
            "phi": opened.spec.variant,
            "num_classes": opened.spec.num_classes,
            "input_shape": list(shape),
            "dialect": opened.dialect,
            "model_path": settings["model_path"],
            "random_weights": not settings["model_path"],
        },
        "pruning_config": dict(how),
        "original_model": network_record(original, latencies[0], scores.get("dense"))
        | {"spec": spec_to_dict(opened.spec), "parts_ms": dict(parts_ms[0])},
        "folded_model": network_size(folded),
        "pruned_model": network_record(after, latencies[1], scores.get("pruned"))
        | {"spec": spec_to_dict(pruned.spec), "parts_ms": dict(parts_ms[1])},
        "reduction": reduction_record(original, folded, after) | {"speedup": speedup},
        "settings": dict(settings),
        "environment": environment(),
        STARTED_FROM: fingerprint_of(pruned, prefix=""),
    }


def finetuned_folder(path: Path) -> Path:
    """Where a network that was pruned into `path` is fine-tuned by the same command."""
    return path.with_name(path.stem + "_finetuned")


def add_finetuned(record: dict[str, Any], done: Fit, folder: Path) -> None:
    """Put what fine-tuning gave into the record, and the record into the folder."""
    record["finetuned_model"] = (
        record["pruned_model"] | score_record(done.score) | {"best_epoch": done.epoch}
    )
    record["finetuned_save_path"] = str(done.path)
    write_json(record, folder / RESULTS)


def unfinished(tuned: Path, epochs: int, extra: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run of `segprune prune` left that was to fine-tune in the folder `tuned` for so many epochs, and did not
    come to its end; None where there is none.

    `extra` is that of the run to resume. Where it started from another network than the one pruned, a note says so.
    """
    tuned = tuned.resolve()
    # The folder for fine-tuning lies beside the results of the run that started it.
    path = tuned.parent / RESULTS
    if not path.is_file():
        return None
    record = read_json(path, "the results of a run of segprune prune")
    try:
        describe_closing(record, path.parent)
        of_it = finetuned_folder(Path(record["model_save_path"])).name == tuned.name
        epochs_then = record["settings"]["epochs"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is no result of segprune prune; remove it, or give the folder of another run."
        ) from error

    # It is that run if it has the same epochs and no fine-tuned network yet.
    waits = epochs_then == epochs and "finetuned_model" not in record
    if not of_it or not waits:
        return None

    # The same command may have pruned another network since, and stopped before its own fine-tuning was saved.
    if record.get(STARTED_FROM) != extra.get(STARTED_FROM):
        show_notes(
            (
                f"This run did not start from {record['model_save_path']}, so {path} is left as it is; "
                "to fine-tune that network, run segprune prune again.",
            )
        )
        return None
    return record


def show_closing(record: dict[str, Any], folder: Path) -> None:
    """Prints the closing table and what belongs under it."""
    rows, lines = describe_closing(record, folder)
    show_table("Results", ["network", "params (M)", "MACs (G)", "latency (ms)", "mIoU"], rows)
    for line in lines:
        console.print(line, soft_wrap=True)


def describe_closing(
    record: Mapping[str, Any], folder: Path
) -> tuple[list[list[str]], list[str]]:
    """Returns the rows of the closing table, and the lines under it."""
    latencies = {
        name: Latency(**record[name]["latency"]) for name in ("original_model", "pruned_model")
    }
    dense, pruned = (latency_text(latency) for latency in latencies.values())
    networks = [("dense", "original_model", dense), ("pruned", "pruned_model", pruned)]
    # Folding gets a row only where it saved something.
    if record["folded_model"]["parameters"] < record["original_model"]["parameters"]:
        networks.insert(1, ("decode head folded", "folded_model", "–"))
    # Fine-tuning changes no widths, so the pruned network's latency is its own, too.
    if "finetuned_model" in record:
        networks.append(("fine-tuned", "finetuned_model", pruned))

    rows = []
    for name, key, latency in networks:
        values = record[key]
        miou = f"{values['miou']:.4f}" if "miou" in values else "–"
        rows.append(
            [name, f"{values['parameters_M']:.3f}", f"{values['macs_G']:.3f}", latency, miou]
        )

    lines = []
    how = record["pruning_config"]
    if how["repaired"]:
        lines.append(
            f"Repaired with {number_of(how['num_images'], 'image')}, before any training."
        )
    reduction = record["reduction"]
    lines.append(
        f"Parameters -{reduction['parameters_reduction_percent']:.1f} % "
        f"(folding {reduction['parameters_by_folding_percent']:.1f}), "
        f"FLOPs -{reduction['flops_reduction_percent']:.1f} % (folding {reduction['flops_by_folding_percent']:.1f}), "
        f"{reduction['speedup']:.2f} × faster."
    )

    height, width = record["model_config"]["input_shape"]
    lines.append(measured_on(latencies["original_model"], (height, width)))
    if sentence := eager_beside(latencies["original_model"], latencies["pruned_model"]):
        lines.append(sentence)
    # Without fine-tuning there is no second checkpoint.
    for label, path in (
        ("Pruned network", record["model_save_path"]),
        ("Fine-tuned network", record.get("finetuned_save_path")),
        ("All numbers", folder / RESULTS),
    ):
        if path:
            lines.append(f"{label}: {path}")
    return rows, lines
