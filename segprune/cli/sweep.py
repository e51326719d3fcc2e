"""`segprune sweep FILE...`: every file cut at many rates, repaired, scored and timed; the curve, and where it bends.

What is written stands in runs/sweep.py. A sweep that was stopped goes on where it stood with the same command.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from typer import Argument, Option

from segprune import api, checkpoint
from segprune.checkpoint import Checkpoint
from segprune.cli.console import (
    choose_device,
    console,
    number_of,
    open_data,
    progress_bar,
    show_notes,
    show_settings,
    show_table,
)
from segprune.cli.flags import (
    Cuda,
    Data,
    InputFlags,
    Layout,
    LoaderProcesses,
    ValShare,
    ValSplit,
    Verbose,
    refuse_without_effect,
)
from segprune.cli.report import make_page
from segprune.data import DataChoices, Source
from segprune.data.unlabelled import batch_pixels, list_images, load_images
from segprune.files import check_writable
from segprune.inference.evaluate import EvalMode, Score, evaluate
from segprune.machine import choose_amp, choose_precision, fit_to_machine
from segprune.model import SegFormer
from segprune.pruning.budget.latency import LatencyTable, default_folder
from segprune.pruning.budget.rate import with_shares
from segprune.pruning.options import PruneOptions
from segprune.pruning.plan import Plan
from segprune.pruning.prepare import Prepared
from segprune.pruning.prune import make_pruner
from segprune.pruning.pruner import Pruner
from segprune.runs.records import network_record
from segprune.runs.sweep import (
    COST,
    NAMES,
    PLOT,
    RECORD,
    TABLE,
    Case,
    Row,
    SweepFolder,
    measure_cases,
    save_tables,
)
from segprune.spec import stated_preprocessing
from segprune.stats import count
from segprune.timing import measure_latency

MEASURED = (  # settings that a sweep cannot change when it goes on
    "data",
    "layout",
    "val_split",
    "val_share",
    "rate_of",
    "num_images",
    "epochs",
    "lr",
    "input_shape",
    "batch_size",
    "cuda",
    "seed",
)


@dataclass(frozen=True)
class SweepFlags:
    model_paths: Annotated[
        list[str], Argument(metavar="FILE...", help="Trained checkpoints of the same classes.")
    ]
    data: Data = "VOCdevkit"
    layout: Layout = None
    val_split: ValSplit = ""
    val_share: ValShare = None
    rates: Annotated[str, Option("--rates", help="Shares to remove; 0: fold alone.")] = (
        "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95"
    )
    rate_of: Annotated[
        str, Option("--rate_of", help="What they are shares of: params, macs, latency.")
    ] = "params"
    pruning_method: Annotated[
        str,
        Option("--pruning_method", help="Criteria side by side, as l1,taylor; see prune."),
    ] = "l1"
    num_images: Annotated[
        int, Option("--num_images", min=1, help="Images of the train part for plan and repair.")
    ] = 64
    epochs: Annotated[
        int, Option("--epochs", min=0, help="Fine-tune every network so many epochs, alike.")
    ] = 0
    lr: Annotated[
        float | None, Option("--lr", help="Of fine-tuning; if not given, as in prune.")
    ] = None
    input_shape: Annotated[
        tuple[int, int],
        Option(
            "--input_shape", metavar="H W", help="Height and width for all that is measured."
        ),
    ] = (512, 512)
    batch_size: Annotated[int, Option("--batch_size", min=1, help="Images at a time.")] = 8
    num_workers: LoaderProcesses = None
    cuda: Cuda = False
    seed: Annotated[int, Option("--seed", help="Of plans and of fine-tuning.")] = 11
    save_dir: Annotated[
        str, Option("--save_dir", help="Folder for the results; a sweep there goes on.")
    ] = "sweep"
    verbose: Verbose = False


def run(flags: SweepFlags, inputs: InputFlags, given: frozenset[str]) -> None:
    """Cut networks at many rates, repair, score and time each, and show what a share of the cost is worth.

    Several files and criteria stand side by side. Every row is saved as soon as it is measured: a sweep that was
    interrupted goes on where it stood, and rates or files may be added to it.
    """
    # What contradicts itself is refused before anything is opened.
    rates, methods = _parse_rates(flags.rates), _parse_names(flags.pruning_method)
    if flags.rate_of not in COST:
        raise ValueError(f"--rate_of is {flags.rate_of!r}; choose one of {', '.join(COST)}.")
    refuse_without_effect(given, ("lr", not flags.epochs, "without `epochs`"))
    options = {}
    for method in methods:
        options[method] = PruneOptions(
            pruning_method=method,
            rate_of=flags.rate_of,  # type: ignore[arg-type]
            input_shape=flags.input_shape,
            seed=flags.seed,
        )
    device = choose_device(flags.cuda)
    flags, chosen = fit_to_machine(flags, device)

    # Open the networks, which have to answer to the same labels.
    files = list(dict.fromkeys(flags.model_paths))
    opened = {file: inputs.apply(checkpoint.read(file)) for file in files}
    _check_files(opened)
    show_settings(
        "Sweep",
        asdict(flags) | asdict(inputs),
        given,
        {file: opened[file].spec.variant for file in files},
    )
    notes: list[str] = []
    for file in files:
        notes += opened[file].notes
    show_notes((*notes, *chosen))
    check_writable(flags.save_dir)

    # See what is left to measure, and open the data for it.
    settings = {name: getattr(flags, name) for name in MEASURED} | asdict(inputs)
    folder = SweepFolder(Path(flags.save_dir), settings, files, flags.rate_of)
    cases = []
    for file in files:
        for method in methods:
            cases += [Case(file, method, rate) for rate in rates]
    missing = folder.missing(cases)
    if len(missing) < len(cases):
        rest = number_of(len(missing), "row")
        console.print(
            f"{folder.path} holds {len(folder.rows)} rows; {rest} to go.", soft_wrap=True
        )

    if missing:
        measurer = _Measurer(flags, inputs, options, opened, device)
        try:
            measure_cases(folder, missing, measurer.measure, _show_row)
        except KeyboardInterrupt:
            saved = number_of(len(folder.rows), "row")
            raise KeyboardInterrupt(
                f"Interrupted; {folder.path} holds {saved}, and the same command goes on from there."
            ) from None
    _show_end(save_tables(folder), folder.path.parent)
    make_page(folder.path.parent, device)


def _parse_rates(text: str) -> list[float]:
    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise ValueError(f"--rates is {text!r}; give shares such as 0,0.3,0.6.") from error
    if not all(0.0 <= rate < 1.0 for rate in rates):
        raise ValueError(f"--rates is {text!r}; each must be at least 0 and below 1.")
    return rates


def _parse_names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _check_files(opened: dict[str, Checkpoint]) -> None:
    first = next(iter(opened))
    for file, other in opened.items():
        if other.backbone_only:
            raise ValueError(f"{file} holds only a backbone; train it first: segprune train.")
        if other.spec.num_classes != opened[first].spec.num_classes:
            raise ValueError(
                f"{first} has {opened[first].spec.num_classes} classes and {file} has {other.spec.num_classes}; give "
                "files that were trained on the same data."
            )
        if other.spec.in_channels != opened[first].spec.in_channels:
            raise ValueError(
                f"{first} takes images of {opened[first].spec.in_channels} channels and {file} of "
                f"{other.spec.in_channels}; give files that were trained on the same data."
            )
        if _labels_of(other) != _labels_of(opened[first]):
            raise ValueError(
                f"{first} and {file} read labels differently (`label_offset` and `ignore_index` {_labels_of(opened[first])}"
                f" and {_labels_of(other)}); give both flags, or sweep the files one by one."
            )


def _labels_of(opened: Checkpoint) -> tuple[int, int]:
    own = opened.spec.preprocessing
    return own.label_offset, own.ignore_index


class _Measurer:
    """Measures rows. What all rates of one file and criterion share is measured once, and kept until the next."""

    def __init__(
        self,
        flags: SweepFlags,
        inputs: InputFlags,
        options: dict[str, PruneOptions],
        opened: dict[str, Checkpoint],
        device: torch.device,
    ) -> None:
        self.flags, self.options, self.opened, self.device = flags, options, opened, device
        assert flags.num_workers is not None
        spec = next(iter(opened.values())).spec
        choices = DataChoices(
            inputs.label_offset,
            flags.val_split,
            flags.val_share,
            flags.seed,
            stated_preprocessing(spec),
        )
        self.source: Source
        self.source, _ = open_data(
            flags.data,
            flags.layout,
            spec.num_classes,
            ("train", "val") if flags.epochs else ("val",),
            choices=choices,
            num_workers=flags.num_workers,
        )
        channels = choices.expected.num_channels
        places = list_images(self.source)
        loaded = load_images(places, flags.num_images, flags.input_shape, channels)
        # Pixels, which each network's pruner normalises as that one was trained.
        self.images: list[Tensor] = [batch.to(device) for batch in batch_pixels(loaded)]
        self.key: tuple[str, str] | None = None

    def measure(self, case: Case) -> Row:
        """Returns the numbers of one row: cut, repaired, scored, timed beside the dense network, fine-tuned."""
        seconds: dict[str, float] = {}
        clock = _Clock(seconds)
        if self.key != (case.file, case.method):
            self._plan(case)
            clock.stop("plan")

        row: Row = {"phi": self.opened[case.file].spec.variant, "skipped": None}
        try:
            plan, network = self._cut(case)
        except ValueError as error:
            # Rates that cannot be met are rows too, which say why.
            return row | {"skipped": str(error)}
        clock.stop("cut")

        score = self._score(network)
        clock.stop("score")
        latencies = measure_latency(
            [self.dense, network],
            self.flags.input_shape,
            device=self.device,
            precision=choose_precision(choose_amp(self.device), self.device),
        )
        clock.stop("time")

        shape = self.flags.input_shape
        row |= network_record(count(network.spec, shape), latencies[1], score)
        row |= {
            "decided_by": plan.decided_by,
            "removed": dict(plan.removed),
            "dense_latency_ms": latencies[0].median_ms,
            "speedup": latencies[0].median_ms / latencies[1].median_ms,
        }
        if self.flags.epochs:
            row["finetuned_miou"] = self._finetune(case, network)
            clock.stop("finetune")
        return row | {"seconds": seconds}

    def _plan(self, case: Case) -> None:
        """Measures what does not depend on the rate."""
        options = self.options[case.method]
        dense = checkpoint.build(self.opened[case.file])
        table = None
        if self.flags.rate_of == "latency":
            precision = choose_precision(choose_amp(self.device), self.device)
            table = LatencyTable(self.device, precision, default_folder())
        with progress_bar(f"planning {case.file}") as advance:
            self.dense: SegFormer = dense.to(self.device).eval()
            self.pruner: Pruner = make_pruner(
                self.dense,
                images=self.images,
                options=options,
                latency_table=table,
                progress=advance,
            )
            self.prepared: Prepared = self.pruner.prepare()
            scores = self.pruner.score(self.prepared)
            self.decide: Callable[[PruneOptions], Plan] = self.pruner.make_decider(
                self.prepared, scores
            )
        self.key = (case.file, case.method)

    def _cut(self, case: Case) -> tuple[Plan, SegFormer]:
        # At rate 0 the decode head is folded and nothing else: the same logits for less.
        prepared = self.prepared
        if not case.rate:
            whole = {group.name: tuple(range(group.num_channels)) for group in prepared.groups}
            plan, network = with_shares(prepared, Plan(whole)), prepared.model
        else:
            plan = self.decide(replace(self.options[case.method], pruning_rate=case.rate))
            with progress_bar(f"repairing at rate {case.rate:g}") as advance:
                self.pruner.progress = advance
                network = self.pruner.cut_and_repair(prepared, plan)
        assert isinstance(network, SegFormer)
        return plan, network

    def _score(self, network: SegFormer) -> Score:
        assert self.flags.num_workers is not None
        with progress_bar("scoring") as advance:
            return evaluate(
                network,
                self.source.split("val"),
                network.spec.num_classes,
                EvalMode(input_shape=self.flags.input_shape),
                device=self.device,
                batch_size=self.flags.batch_size,
                num_workers=self.flags.num_workers,
                progress=advance,
            )

    def _finetune(self, case: Case, network: SegFormer) -> float:
        """Returns the mIoU after the same fine-tuning that every row gets, the dense network as the teacher."""
        with progress_bar(f"fine-tuning at rate {case.rate:g}") as advance:
            tuned = api.finetune(
                network,
                self.source,
                teacher=self.dense,
                extra=self.opened[case.file].extra,
                progress=advance,
                epochs=self.flags.epochs,
                lr=self.flags.lr,
                batch_size=self.flags.batch_size,
                input_shape=self.flags.input_shape,
                num_workers=self.flags.num_workers,
                seed=self.flags.seed,
            )
        return tuned.score.miou


class _Clock:
    """Writes down the seconds of each part of a row."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.start = time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self.start, 3)
        self.start = now


def _show_row(row: Row) -> None:
    name = f"{row['file']} {row['method']} rate {row['rate']:g}"
    if row["skipped"] is not None:
        console.print(f"  {name}: left out. {row['skipped']}", soft_wrap=True)
        return
    tuned = f", fine-tuned {row['finetuned_miou']:.4f}" if "finetuned_miou" in row else ""
    console.print(
        f"  {name}: mIoU {row['miou']:.4f}{tuned}, {row['latency_ms']:.1f} ms, {row['speedup']:.2f} × faster",
        soft_wrap=True,
    )


def _show_end(record: dict[str, Any], folder: Path) -> None:
    """Prints all rows, best ones starred, and the knees."""
    rows = []
    for row in record["rows"]:
        if row["skipped"] is not None:
            continue
        star = "*" if row["best"] else ""
        tuned = row.get("finetuned_miou")
        rows.append(
            [
                row["file"],
                row["method"],
                f"{row['rate']:g}",
                f"{row['parameters_M']:.3f}",
                f"{row['macs_G']:.3f}",
                f"{row['comparable_ms']:.1f}",
                f"{row['speedup']:.2f}",
                f"{row['miou']:.4f}{star if tuned is None else ''}",
                "–" if tuned is None else f"{tuned:.4f}{star}",
            ]
        )
    columns = [
        "file",
        "criterion",
        "rate",
        "params (M)",
        "MACs (G)",
        "ms",
        "× faster",
        "mIoU",
        "fine-tuned",
    ]
    show_table("Sweep", columns, rows, ("MACs (G)", "criterion"))
    cost = NAMES[record["cost"]].split()[0]
    console.print(
        f"* No other row has at least this mIoU for less {cost}, or a higher one for as much."
    )
    for knee in record["knees"]:
        console.print(
            f"Knee of {knee['file']} ({knee['method']}): rate {knee['rate']:g}; {knee['reason']}.",
            soft_wrap=True,
        )
    if not record["knees"]:
        console.print(
            "No knee: the curves are straight, or lose next to nothing as far as they go."
        )
    files = ", ".join(name for name in (RECORD, TABLE, PLOT) if (folder / name).is_file())
    console.print(f"Saved: {files} in {folder}", soft_wrap=True)
