"""What a folder of results holds, read into one record for the page.

Files may be older than this version, half-written or made by a stranger: whatever is missing or of another type is None
here, and a note says so where it leaves a hole in the page. Units as in runs/records.py; ratios lie in [0, 1].
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from segprune.checkpoint import read
from segprune.files import read_json
from segprune.model import PARTS
from segprune.report.words import WORDS
from segprune.spec import Spec, spec_from_dict, standard_spec
from segprune.stats import layers

T = TypeVar("T")
Kind = Literal["prune", "sweep", "eval", "train"]
Settings = Mapping[str, Any]

# The file of each kind of result. A folder may hold several; the first one is what its page is about.
RECORDS: dict[Kind, str] = {
    "prune": "pruning_results.json",
    "sweep": "sweep.json",
    "eval": "scores.json",
    "train": "training_results.json",
}
WIDTHS = ("stage", "heads", "qk", "v", "reduction", "ffn")  # by kind of group, of one block


@dataclass(frozen=True)
class Note:
    """A sentence of words.py, and what is filled into it."""

    key: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class NetworkRow:
    """One network's numbers; `name` is dense, folded, pruned, finetuned, best or network."""

    name: str
    parameters: float | None = None
    macs: float | None = None
    latency_ms: float | None = None
    miou: float | None = None


@dataclass(frozen=True)
class ClassRow:
    """IoU of one class; `before` is None where there is one network alone."""

    name: str
    before: float | None
    after: float | None

    @property
    def change(self) -> float | None:
        if self.before is None or self.after is None:
            return None
        return self.after - self.before


@dataclass(frozen=True)
class WidthRow:
    """The widths of one block or of the decode head, by kind: (dense, kept), None where it has none."""

    name: str
    widths: tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class PartRow:
    """What one part of the network costs: (dense, kept) of parameters, MACs and, if measured, ms."""

    name: str
    parameters: tuple[float, float]
    macs: tuple[float, float]
    ms: tuple[float, float] | None


@dataclass(frozen=True)
class Point:
    """A network on the trade-off curve. `curve` is the file and criterion, or "" for one that stands alone."""

    curve: str
    label: str
    cost: float
    miou: float
    part: bool = False  # scored on a part of the images


@dataclass(frozen=True)
class Facts:
    """All that a page shows, images apart."""

    kind: Kind
    title: str
    networks: tuple[NetworkRow, ...] = ()
    classes: tuple[ClassRow, ...] = ()
    widths: tuple[WidthRow, ...] = ()
    parts: tuple[PartRow, ...] = ()
    points: tuple[Point, ...] = ()
    cost: str = "macs"  # of the points: parameters, macs or latency_ms
    knees: tuple[tuple[str, Note], ...] = ()  # of a sweep: name and reason
    epochs: tuple[tuple[float, float | None, float | None], ...] = ()  # number, loss, mIoU
    measured: tuple[Note, ...] = ()
    commands: tuple[tuple[str, str], ...] = ()  # what for, and what to type
    tables: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()  # settings and versions
    notes: tuple[Note, ...] = ()  # what is missing, and why
    random: bool = False  # whether the weights were never trained
    # For the images: the networks to compare, and how their data was read and scored.
    before: str = ""
    after: str = ""
    settings: Settings | None = None


def find_folders(folder: Path) -> list[Path]:
    """Returns the folder if it holds results, else those below it that do. FileNotFoundError if there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; give the one that holds {', '.join(RECORDS.values())}."
        )
    names = set(RECORDS.values())
    if any((folder / name).is_file() for name in names):
        return [folder]
    below = sorted({path.parent for path in folder.rglob("*.json") if path.name in names})
    if not below:
        raise FileNotFoundError(
            f"{folder} holds no results (looked for {', '.join(RECORDS.values())}); give the folder that a run of "
            "segprune prune, sweep, eval or train wrote."
        )
    return below


def gather(folder: Path) -> Facts:
    """Reads the results in a folder. ValueError if its only file cannot be read."""
    for kind, name in RECORDS.items():
        if (folder / name).is_file():
            record = read_json(folder / name, f"a result of segprune {kind}")
            match kind:
                case "prune":
                    return _gather_prune(folder, record)
                case "sweep":
                    return _gather_sweep(folder, record)
                case "eval":
                    return _gather_eval(folder, record)
                case "train":
                    return _gather_train(folder, record)
    raise FileNotFoundError(f"{folder} holds none of {', '.join(RECORDS.values())}.")


def _gather_prune(folder: Path, record: Mapping[str, Any]) -> Facts:
    settings = _pick(record, dict, "settings") or {}
    notes: list[Note] = []

    # The networks, in the order in which they were made.
    networks = [_network_row("dense", record, "original_model")]
    folded = _network_row("folded", record, "folded_model")
    if folded.parameters != networks[0].parameters:
        networks.append(folded)
    networks.append(_network_row("pruned", record, "pruned_model"))
    tuned = _pick(record, dict, "finetuned_model") is not None
    if tuned:
        networks.append(_network_row("finetuned", record, "finetuned_model"))
    elif _number(settings, "epochs"):
        notes.append(Note("missing_finetuned", {"epochs": settings["epochs"]}))

    # The files, which may have been moved together with their folder.
    before = _find_file(folder, _text(settings, "model_path"))
    pruned = _find_file(folder, _text(record, "model_save_path"))
    after = _find_file(folder, _text(record, "finetuned_save_path")) if tuned else pruned
    last = "finetuned_model" if tuned else "pruned_model"
    names = _class_names(record, after)
    classes = _class_rows(
        names, _pick(record, list, "original_model", "iou"), _pick(record, list, last, "iou")
    )
    if not classes:
        notes.append(Note("missing_scores", {}))

    # Widths and parts need both specs; older records have the pruned one alone.
    shape = _shape(record)
    dense_spec = _spec(_pick(record, dict, "original_model", "spec")) or _spec_in(before)
    if dense_spec is None and _pick(record, bool, "model_config", "random_weights"):
        dense_spec = standard_spec(
            str(record["model_config"]["phi"]), int(record["model_config"]["num_classes"])
        )
    kept_spec = _spec(_pick(record, dict, "pruned_model", "spec")) or _spec_in(pruned)
    widths: tuple[WidthRow, ...] = ()
    parts: tuple[PartRow, ...] = ()
    if dense_spec is not None and kept_spec is not None and shape is not None:
        widths = _width_rows(dense_spec, kept_spec)
        ms = [
            _pick(record, dict, name, "parts_ms") for name in ("original_model", "pruned_model")
        ]
        parts = _part_rows(dense_spec, kept_spec, shape, ms)
        if not all(ms):
            notes.append(Note("missing_parts_ms", {}))
    else:
        notes.append(Note("missing_specs", {}))

    # Training curves lie beside the fine-tuned network.
    epochs: tuple[tuple[float, float | None, float | None], ...] = ()
    if tuned and after:
        training = Path(after).with_name(RECORDS["train"])
        if training.is_file():
            epochs = _epoch_rows(read_json(training, "the results of fine-tuning"))

    return Facts(
        kind="prune",
        title=_text(record, "model_config", "phi") or folder.name,
        networks=tuple(networks),
        classes=classes,
        widths=widths,
        parts=parts,
        points=_points(record, networks),
        epochs=epochs,
        measured=_measured(record, settings, shape),
        commands=_next_commands(settings, before, pruned, after, shape, tuned=tuned),
        tables=_tables(record, "settings", "pruning_config", "environment"),
        notes=tuple(notes),
        random=bool(_pick(record, bool, "model_config", "random_weights")),
        before=before,
        after=after,
        settings=settings,
    )


def _gather_sweep(folder: Path, record: Mapping[str, Any]) -> Facts:
    spent_as = _text(record, "cost") or "parameters"  # the rows' name for it
    cost = "latency_ms" if spent_as == "comparable_ms" else spent_as
    settings = _pick(record, dict, "settings") or {}
    rows = [row for row in _pick(record, list, "rows") or [] if isinstance(row, dict)]
    several = len({_text(row, "method") for row in rows}) > 1

    def name_curve(row: Mapping[str, Any]) -> str:
        return _text(row, "file") + (f" ({_text(row, 'method')})" if several else "")

    points = []
    for row in rows:
        spent = _number(row, spent_as)
        miou = _number(row, "finetuned_miou")
        miou = _number(row, "miou") if miou is None else miou
        if spent is not None and miou is not None:
            points.append(
                Point(name_curve(row), f"{_number(row, 'rate') or 0.0:g}", spent, miou)
            )

    # The knee is what the next command asks for.
    knees, commands = [], []
    for knee in _pick(record, list, "knees") or []:
        if isinstance(knee, dict) and _number(knee, "rate") is not None:
            rate = f"{knee['rate']:g}"
            knees.append((f"{name_curve(knee)}: {rate}", _explain_knee(knee, cost)))
            command = ["segprune", "prune", "--model_path", _text(knee, "file")]
            command += ["--pruning_rate", rate, "--rate_of", _text(record, "rate_of")]
            command += ["--data", _text(settings, "data"), "--epochs", "50"]
            commands.append(("prune", shlex.join(command)))

    notes = [] if points else [Note("missing_rows", {})]
    return Facts(
        kind="sweep",
        title=folder.name,
        points=tuple(points),
        cost=cost,
        knees=tuple(knees),
        measured=(Note("how_counts", {}), Note("how_scored", {"split": "val"})),
        commands=tuple(commands),
        tables=_tables(record, "settings", "environment"),
        notes=tuple(notes),
    )


def _explain_knee(knee: Mapping[str, Any], cost: str) -> Note:
    names = ("saved", "points_lost", "next_rate", "next_points_lost")
    saved, lost, rate, next_lost = (_number(knee, name) for name in names)
    key = f"knee_{cost}"
    if saved is None or lost is None or rate is None or next_lost is None or key not in WORDS:
        return Note("knee_other", {"reason": _text(knee, "reason")})
    told = {"saved": f"{saved:.0%}", "lost": f"{lost:.1f}", "rate": f"{rate:g}"}
    return Note(key, told | {"next_lost": f"{next_lost:.1f}"})


def _gather_eval(folder: Path, record: Mapping[str, Any]) -> Facts:
    settings = _pick(record, dict, "settings") or {}
    path = _find_file(folder, _text(settings, "model_path"))
    split = _text(settings, "split") or "val"
    classes = _class_rows(_class_names(record, path), None, _pick(record, list, "iou"))
    command = ["segprune", "prune", "--model_path", path, "--pruning_rate", "0.5"]
    command += ["--data", _text(settings, "data")]
    return Facts(
        kind="eval",
        title=Path(path).name,
        networks=(NetworkRow("network", miou=_number(record, "miou")),),
        classes=classes,
        measured=(Note("how_scored", {"split": split}),),
        commands=(("prune", shlex.join(command)),),
        tables=_tables(record, "settings", "environment"),
        notes=() if classes else (Note("missing_scores", {}),),
        after=path,
        settings=settings,
    )


def _gather_train(folder: Path, record: Mapping[str, Any]) -> Facts:
    settings = _pick(record, dict, "settings") or {}
    rows = [row for row in _pick(record, list, "epochs") or [] if isinstance(row, dict)]
    best = [row for row in rows if _pick(row, bool, "best")]
    last = best[-1] if best else {}
    notes = []
    planned = _number(settings, "epochs")
    if planned is not None and len(rows) < planned:
        notes.append(Note("missing_epochs", {"done": len(rows), "epochs": settings["epochs"]}))

    path = folder / "best_epoch_weights.pth"
    after = str(path) if path.is_file() else ""
    classes = _class_rows(_class_names(record, after), None, _pick(last, list, "iou"))
    command = ["segprune", "prune", "--model_path", str(path), "--pruning_rate", "0.5"]
    command += ["--data", _text(settings, "data"), "--epochs", "50"]
    return Facts(
        kind="train",
        title=folder.name,
        networks=(NetworkRow("best", miou=_number(last, "miou")),),
        classes=classes,
        epochs=_epoch_rows(record),
        measured=(Note("how_scored", {"split": "val"}),),
        commands=(("prune", shlex.join(command)),),
        tables=_tables(record, "settings", "environment"),
        notes=tuple(notes) if classes else (*notes, Note("missing_scores", {})),
        after=after,
        settings=settings,
    )


def _pick(record: Any, kind: type[T], *path: str) -> T | None:
    """Returns the value at a path of names if it is of that type, else None."""
    for name in path:
        if not isinstance(record, Mapping):
            return None
        record = record.get(name)
    return record if isinstance(record, kind) else None


def _number(record: Any, *path: str) -> float | None:
    # True is an integer to isinstance, and NaN would be no number on the page.
    value = _pick(record, object, *path)
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        return None
    return float(value)  # type: ignore[arg-type]


def _text(record: Any, *path: str) -> str:
    return _pick(record, str, *path) or ""


def _shape(record: Mapping[str, Any]) -> tuple[int, int] | None:
    shape = _pick(record, list, "model_config", "input_shape") or []
    whole = [side for side in shape if type(side) is int and side >= 32]
    return (whole[0], whole[1]) if len(whole) == 2 == len(shape) else None


def _find_file(folder: Path, path: str) -> str:
    """Returns where a file is now: as recorded, or else inside the folder under its name or its folder's."""
    if not path:
        return ""
    recorded = Path(path)
    beside = folder / recorded.name
    within = folder / recorded.parent.name / recorded.name
    for place in (recorded, beside, within):
        if place.exists():
            return str(place)
    return path


def _network_row(name: str, record: Mapping[str, Any], key: str) -> NetworkRow:
    numbers = {
        field: _number(record, key, field)
        for field in ("parameters", "macs", "latency_ms", "miou")
    }
    return NetworkRow(name, **numbers)


def _class_names(record: Mapping[str, Any], path: str) -> list[str]:
    """Returns the names in the record or, for older ones, in the checkpoint; none where neither has any."""
    names = _pick(record, list, "class_names") or _pick(
        record, list, "model_config", "class_names"
    )
    if names is None and path.endswith((".pth", ".safetensors")) and Path(path).is_file():
        names = list(read(path).extra.get("class_names", ()))
    return [str(name) for name in names or []]


def _class_rows(
    names: Sequence[str], before: list[Any] | None, after: list[Any] | None
) -> tuple[ClassRow, ...]:
    """Returns the classes, those that lose most first; of one network, the worst first."""
    after = after or []
    before = before if before is not None and len(before) == len(after) else [None] * len(after)
    rows = []
    for k, (old, new) in enumerate(zip(before, after, strict=True)):
        name = names[k] if k < len(names) and names[k].strip() else str(k)
        rows.append(ClassRow(name, _number({"": old}, ""), _number({"": new}, "")))

    def rank(row: ClassRow) -> float:
        # Classes that do not occur come last.
        if row.change is not None:
            return row.change
        return math.inf if row.after is None else row.after

    return tuple(sorted(rows, key=rank))


def _spec(data: dict[str, Any] | None) -> Spec | None:
    """Returns the spec; None where there is none, or one of another version."""
    if data is None:
        return None
    try:
        return spec_from_dict(data)
    except ValueError:
        return None


def _spec_in(path: str) -> Spec | None:
    """Returns the spec of a checkpoint; None where the file is no longer there or cannot be read."""
    if not Path(path).is_file():
        return None
    try:
        return read(path).spec
    except (ValueError, OSError):
        return None


def _width_rows(dense: Spec, kept: Spec) -> tuple[WidthRow, ...]:
    rows = []
    for i, (stage, cut) in enumerate(zip(dense.stages, kept.stages, strict=True)):
        # Removed blocks leave no trace in a spec but their widths of 0.
        for j, (block, rest) in enumerate(zip(stage.blocks, cut.blocks, strict=False)):
            pairs: list[tuple[int, int] | None] = [(stage.width, cut.width)]
            pairs.append((block.num_heads, rest.num_heads))
            pairs.append((block.num_heads * block.qk_dim, rest.num_heads * rest.qk_dim))
            pairs.append((block.num_heads * block.v_dim, rest.num_heads * rest.v_dim))
            reduction = (
                (block.reduction_dim, rest.reduction_dim or 0) if block.reduction_dim else None
            )
            pairs += [reduction, (block.ffn_dim, rest.ffn_dim)]
            rows.append(WidthRow(f"{i + 1}.{j + 1}", tuple(pairs)))
    head = (dense.decoder_dim, kept.decoder_dim)
    rows.append(WidthRow("head", (head, *[None] * (len(WIDTHS) - 1))))
    return tuple(rows)


def _part_rows(
    dense: Spec, kept: Spec, shape: tuple[int, int], ms: Sequence[dict[str, Any] | None]
) -> tuple[PartRow, ...]:
    """Returns the cost of every stage and of the decode head, before and after."""
    lists = [layers(spec, shape) for spec in (dense, kept)]
    rows = []
    for name in PARTS:
        costs: dict[str, list[float]] = {"params": [], "macs": []}
        for own in lists:
            inside = [layer for layer in own if layer.name.startswith(f"{name}.")]
            costs["params"].append(sum(layer.cost("params") for layer in inside))
            costs["macs"].append(sum(layer.cost("macs") for layer in inside))
        times = [_number(record, name) for record in ms]
        both = (times[0], times[1]) if None not in times else None
        rows.append(
            PartRow(
                name,
                (costs["params"][0], costs["params"][1]),
                (costs["macs"][0], costs["macs"][1]),
                both,  # type: ignore[arg-type]
            )
        )
    return tuple(rows)


def _points(record: Mapping[str, Any], networks: Sequence[NetworkRow]) -> tuple[Point, ...]:
    """Returns the networks that were scored, and the trials of a search."""
    points = []
    for network in networks:
        # Folding changes no logits, so the folded network has the dense one's score.
        miou = networks[0].miou if network.name == "folded" else network.miou
        if network.macs is not None and miou is not None:
            points.append(Point("", network.name, network.macs, miou))

    dense = networks[0].miou
    for trial in _pick(record, list, "search", "trials") or []:
        macs, drop = _number(trial, "macs"), _number(trial, "drop_points")
        if dense is not None and macs is not None and drop is not None:
            part = bool(_number(trial, "margin_points"))
            label = f"{_number(trial, 'rate') or 0.0:g}"
            points.append(Point("search", label, macs, dense - drop / 100, part))
    return tuple(points)


def _epoch_rows(
    record: Mapping[str, Any],
) -> tuple[tuple[float, float | None, float | None], ...]:
    rows = []
    for row in _pick(record, list, "epochs") or []:
        number = _number(row, "epoch")
        if number is not None:
            rows.append((number, _number(row, "loss"), _number(row, "miou")))
    return tuple(rows)


def _measured(
    record: Mapping[str, Any], settings: Settings, shape: tuple[int, int] | None
) -> tuple[Note, ...]:
    notes = [Note("how_counts", {})]
    latency = _pick(record, dict, "original_model", "latency")
    if latency is not None:
        size = "" if shape is None else f"{shape[0]}×{shape[1]}"
        names = ("runs", "batch", "precision", "device", "threads")
        facts = {name: latency.get(name, "?") for name in names}
        notes.append(Note("how_timed", facts | {"size": size}))
    if _number(record, "original_model", "miou") is not None:
        split = _text(settings, "val_split") or "val"
        notes.append(Note("how_scored", {"split": split}))
    how = _pick(record, dict, "pruning_config") or {}
    if how.get("repaired"):
        notes.append(Note("how_repaired", {"images": how.get("num_images", "?")}))
    return tuple(notes)


def _next_commands(
    settings: Settings,
    before: str,
    pruned: str,
    after: str,
    shape: tuple[int, int] | None,
    *,
    tuned: bool,
) -> tuple[tuple[str, str], ...]:
    """Returns commands to copy; words in capitals stand for what is not known."""
    size = [] if shape is None else ["--input_shape", str(shape[0]), str(shape[1])]
    data = _text(settings, "data") or "DATA"
    commands = []
    if not tuned:
        train = ["segprune", "train", "--model_path", pruned, "--data", data, *size]
        train += ["--epochs", "50"]
        # A network with random weights has nothing to teach.
        train += ["--teacher", before] if before else []
        commands.append(
            ("finetune", [*train, "--save_dir", str(Path(pruned).with_suffix("")) + "_tuned"])
        )
    export = ["segprune", "export", after, "--format", "onnx", *size]
    commands.append(("export", export))
    compared = [before, after] if before else [after]
    sizes = [] if shape is None else ["--sizes", f"{shape[0]}x{shape[1]}"]
    commands.append(("benchmark", ["segprune", "benchmark", *compared, *sizes]))
    commands.append(("predict", ["segprune", "predict", after, "--input", "IMAGES", *size]))
    return tuple((name, shlex.join(command)) for name, command in commands)


def _tables(
    record: Mapping[str, Any], *names: str
) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    tables = []
    for name in names:
        values = _pick(record, dict, name)
        if values:
            tables.append((name, tuple((str(key), _cell(values[key])) for key in values)))
    return tuple(tables)


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items()) or "–"
    return str(value)
