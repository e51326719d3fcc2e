"""A score on disk: its numbers, tables of them, and plots.

scores.json           all numbers and the settings, the confusion matrix too
scores.csv            a row per class: IoU, recall, precision, boundary IoU, labelled pixels
confusion_matrix.csv  pixel counts, rows are labels; confusion_matrix.png has them as shares of each row
mIoU.png, mPA.png, mRecall.png, mPrecision.png   bars per class, the mean in the title
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segprune.files import write_csv, write_json
from segprune.inference.evaluate import Score

SCORES, TABLE, MATRIX = "scores.json", "scores.csv", "confusion_matrix.csv"


def save_scores(
    record: Mapping[str, Any], score: Score, class_names: Sequence[str], folder: Path
) -> None:
    """Writes the files above; `record` is what scores.json holds."""
    from segprune import plots  # drawing takes a second to import

    write_json(record, folder / SCORES)

    # A row per class.
    numbers = range(len(score.iou))
    names = [class_names[k] if k < len(class_names) else "" for k in numbers]
    columns: dict[str, Iterable[Any]] = {
        "class": numbers,
        "name": names,
        "iou": score.iou,
        "recall": score.recall,
        "precision": score.precision,
    }
    if score.boundary_iou is not None:
        columns["boundary_iou"] = score.boundary_iou
    # A row of the matrix holds all pixels with this label.
    columns["pixels"] = [sum(row) for row in score.confusion]
    write_csv([list(columns), *zip(*columns.values(), strict=True)], folder / TABLE)

    # The confusion matrix, with classes as its titles.
    titles = [name or str(k) for k, name in zip(numbers, names, strict=True)]
    rows = [[title, *row] for title, row in zip(titles, score.confusion, strict=True)]
    write_csv([["label \\ predicted", *titles], *rows], folder / MATRIX)

    plots.confusion(score.confusion, class_names, folder / "confusion_matrix.png")
    # mPA and mRecall are one quantity, drawn under both names that are in use.
    for name, values in (
        ("mIoU", score.iou),
        ("mPA", score.recall),
        ("mRecall", score.recall),
        ("mPrecision", score.precision),
    ):
        # Classes that do not occur are left out of the mean.
        known = [value for value in values if value is not None]
        title = f"{name} {sum(known) / len(known):.4f}"
        plots.bars(values, class_names, title, folder / f"{name}.png")
