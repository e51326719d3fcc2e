"""`segprune scan FILE`: what each kind of group in each stage is worth, as a table, files and a plot.

scan.json  all numbers; `segprune prune --sensitivity scan.json` weighs the groups by them
scan.csv   a row per part and rate
scan.png   the same as a picture, the dearest parts dark
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from torch import Tensor
from typer import Argument, Option

from segprune import checkpoint
from segprune.cli.console import choose_device, console, open_data, progress_bar, show_notes, show_settings, show_table
from segprune.cli.flags import Layout, LoaderProcesses, switch
from segprune.data.unlabelled import batch_images, list_images, load_images
from segprune.files import check_writable, write_csv, write_json
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.machine import fit_to_machine
from segprune.model import SegFormer, check_input
from segprune.pruning.importance import NEED_IMAGES
from segprune.pruning.pruner import Pruner
from segprune.pruning.scan import Finding, output_distance, scan, sensitivities
from segprune.runs.records import environment


@dataclass(frozen=True)
class ScanConfig:
    model_path: Annotated[
        str, Argument(metavar="FILE", help=".pth, .pt, .safetensors, a Hugging Face folder or hub name.")
    ]
    images: Annotated[
        str,
        Option("--images", help="Folder of pictures, without labels: how far the network's output moves."),
    ] = ""
    data: Annotated[str, Option("--data", help="Data set: what the mIoU on its val part loses.")] = ""
    layout: Layout = None
    rates: Annotated[str, Option("--rates", help="Shares of a part's channels that are cut.")] = "0.25,0.5,0.75"
    num_images: Annotated[int, Option("--num_images", min=1, help="So many of --images are used.")] = 64
    pruning_method: Annotated[str, Option("--pruning_method", help="How channels are ranked; see segprune prune.")] = (
        "l1"
    )
    keep_decoder: Annotated[bool, switch("--keep_decoder", "Do not fold the decode head.")] = False
    input_shape: Annotated[
        tuple[int, int], Option("--input_shape", metavar="H W", help="Pictures are fitted whole into this size.")
    ] = (512, 512)
    batch_size: Annotated[int, Option("--batch_size", min=1, help="Pictures at a time, with --data.")] = 8
    num_workers: LoaderProcesses = None
    cuda: Annotated[bool, switch("--cuda", "Use the GPU.")] = False
    save_dir: Annotated[str, Option("--save_dir", help="Files go there.")] = "scan"
    dialect: Annotated[str | None, Option("--dialect", help="Overrules the dialect that is recognised.")] = None


def run(config: ScanConfig, given: frozenset[str]) -> None:
    """Cut one kind of group in one stage at a time, and measure what the network loses.

    With --data the loss is in mIoU, with --images it is the divergence from the uncut network's classes, which needs
    no labels. The file that comes out weighs the groups in `segprune prune --sensitivity`.
    """
    from segprune import plots  # here, since drawing takes a second to import

    if bool(config.images) == bool(config.data):
        raise ValueError("Give either --images, pictures without labels, or --data, a data set to score on.")
    rates = _rates(config.rates)
    check_input((1, 3, *config.input_shape))
    device = choose_device(config.cuda)
    config, chosen = fit_to_machine(config, device)
    found = checkpoint.read(config.model_path, dialect=config.dialect)
    show_settings("Scan", asdict(config) | {"dialect": found.dialect, "variant": found.spec.variant})
    show_notes((*found.notes, *(chosen if config.data else ())))
    check_writable(config.save_dir)
    model = checkpoint.build(found).to(device)
    measure, unit, images = _measure(config, model)
    pruner = Pruner(
        model, pruning_method=config.pruning_method, images=images, repair=False, keep_decoder=config.keep_decoder
    )
    with progress_bar("scanning") as advance:
        findings = scan(model, measure, rates, pruner=pruner, progress=advance)

    folder = Path(config.save_dir)
    rows = [[part, *(f"{loss:.4f}" for loss in losses)] for part, losses in _by_part(findings).items()]
    show_table(_TITLE.format(unit), ["part", *(f"{rate:g}" for rate in rates)], rows)
    record = {
        "unit": unit,
        "findings": [asdict(finding) for finding in findings],
        "sensitivity": sensitivities(findings),
        "settings": asdict(config),
        "environment": environment(),
    }
    write_json(record, folder / "scan.json")
    write_csv([["part", "rate", unit], *([f.part, f.rate, f.loss] for f in findings)], folder / "scan.csv")
    plots.grid(_by_part(findings), [f"{rate:g}" for rate in rates], _TITLE.format(unit), folder / "scan.png")
    console.print(
        f"Saved: scan.json (for segprune prune --sensitivity), scan.csv, scan.png in {folder}", soft_wrap=True
    )


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(sorted(float(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(f"--rates is {text!r}; give shares such as 0.25,0.5,0.75.") from error
    if not all(0.0 < rate < 1.0 for rate in rates):
        raise ValueError(f"--rates is {text!r}; each must lie between 0 and 1.")
    return rates


def _measure(config: ScanConfig, model: SegFormer) -> tuple[Callable[[SegFormer], float], str, list[Tensor]]:
    """What is measured, its name, and pictures for methods that need some."""
    device = next(model.parameters()).device
    if config.images:
        loaded = batch_images(load_images(list_images(config.images), config.num_images, config.input_shape))
        images = [batch.to(device) for batch in loaded]
        return output_distance(model, images), "divergence", images
    num_classes, num_workers = model.spec.num_classes, config.num_workers
    assert num_workers is not None
    source, _ = open_data(config.data, config.layout, num_classes, ("val",), num_workers=num_workers)
    samples = source.split("val")

    def score(network: SegFormer) -> float:
        return evaluate(
            network,
            samples,
            num_classes,
            EvalMode(input_shape=config.input_shape, boundary=False),
            device=device,
            batch_size=config.batch_size,
            num_workers=num_workers,
        ).miou

    dense = score(model)
    images = []
    if config.pruning_method in NEED_IMAGES:
        images = batch_images(load_images(list_images(source), config.num_images, config.input_shape))
    return lambda network: dense - score(network), "mIoU lost", [batch.to(device) for batch in images]


_TITLE = "{} when a share of one part's channels is cut"


def _by_part(findings: list[Finding]) -> dict[str, list[float]]:
    parts: dict[str, list[float]] = {}
    for finding in findings:
        parts.setdefault(finding.part, []).append(finding.loss)
    return parts
