"""`segprune scan FILE`: what each kind of group in each stage is worth, as a table, files and a plot.

scan.json  all numbers; `segprune prune --sensitivity scan.json` weighs the groups by them
scan.csv   a row per part and rate
scan.png   the same as an image, the most expensive parts dark
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from torch import Tensor
from typer import Option

from segprune import checkpoint
from segprune.cli.console import (
    choose_device,
    console,
    open_data,
    progress_bar,
    show_notes,
    show_settings,
    show_table,
)
from segprune.cli.flags import (
    Cuda,
    Dialect,
    Layout,
    LoaderProcesses,
    ModelFile,
    Verbose,
    switch,
)
from segprune.data.unlabelled import batch_images, list_images, load_images
from segprune.files import check_writable, write_csv, write_json
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.machine import fit_to_machine
from segprune.model import SegFormer, check_input
from segprune.pruning.importance import NEED_IMAGES
from segprune.pruning.pruner import Pruner
from segprune.pruning.scan import output_distance, scan, sensitivities
from segprune.runs.records import environment

TITLE = "{} when a share of one part's channels is cut"


@dataclass(frozen=True)
class ScanFlags:
    model_path: ModelFile
    images: Annotated[
        str,
        Option(
            "--images",
            help="Folder of images, without labels: how far the network's output moves.",
        ),
    ] = ""
    data: Annotated[
        str, Option("--data", help="Data set: what the mIoU on its val part loses.")
    ] = ""
    layout: Layout = None
    rates: Annotated[
        str, Option("--rates", help="Shares of a part's channels that are cut.")
    ] = "0.25,0.5,0.75"
    num_images: Annotated[
        int, Option("--num_images", min=1, help="How many of --images are used.")
    ] = 64
    pruning_method: Annotated[
        str, Option("--pruning_method", help="How channels are ranked; see segprune prune.")
    ] = "l1"
    keep_decoder: Annotated[bool, switch("--keep_decoder", "Do not fold the decode head.")] = (
        False
    )
    input_shape: Annotated[
        tuple[int, int],
        Option("--input_shape", metavar="H W", help="Images are fitted whole into this size."),
    ] = (512, 512)
    batch_size: Annotated[
        int, Option("--batch_size", min=1, help="Images at a time, with --data.")
    ] = 8
    num_workers: LoaderProcesses = None
    cuda: Cuda = False
    save_dir: Annotated[str, Option("--save_dir", help="Folder for the results.")] = "scan"
    dialect: Dialect = None
    verbose: Verbose = False


def run(flags: ScanFlags, given: frozenset[str]) -> None:
    """Cut one kind of group in one stage at a time, and measure what the network loses.

    With --data the loss is in mIoU; with --images it is the divergence from the uncut network's classes, which needs
    no labels. The file that comes out weighs the groups in `segprune prune --sensitivity`.
    """
    if bool(flags.images) == bool(flags.data):
        raise ValueError(
            "Give either --images, images without labels, or --data, a data set to score on."
        )
    rates = _parse_rates(flags.rates)
    check_input((1, 3, *flags.input_shape))
    device = choose_device(flags.cuda)
    flags, chosen = fit_to_machine(flags, device)

    # Open the network and what it is measured on.
    opened = checkpoint.read(flags.model_path, dialect=flags.dialect)
    read = {"dialect": opened.dialect, "variant": opened.spec.variant}
    show_settings("Scan", asdict(flags), given, read)
    show_notes((*opened.notes, *(chosen if flags.data else ())))
    check_writable(flags.save_dir)
    model = checkpoint.build(opened).to(device)
    measure, unit, images = _choose_measure(flags, model)

    # Cut one part at a time, at each rate.
    # Without a repair, which would hide what a part is worth.
    pruner = Pruner(
        model,
        pruning_method=flags.pruning_method,
        images=images,
        repair=False,
        keep_decoder=flags.keep_decoder,
    )
    with progress_bar("scanning") as advance:
        findings = scan(model, measure, rates, pruner=pruner, progress=advance)

    # The parts keep the order in which they were cut, for the table and the plot alike.
    losses: dict[str, list[float]] = {}
    for finding in findings:
        losses.setdefault(finding.part, []).append(finding.loss)

    # Show and save what was measured.
    columns = [f"{rate:g}" for rate in rates]
    rows = [[part, *(f"{loss:.4f}" for loss in values)] for part, values in losses.items()]
    show_table(TITLE.format(unit), ["part", *columns], rows)

    folder = Path(flags.save_dir)
    record = {
        "unit": unit,
        "findings": [asdict(finding) for finding in findings],
        "sensitivity": sensitivities(findings),
        "settings": asdict(flags),
        "environment": environment(),
    }
    write_json(record, folder / "scan.json")
    write_csv(
        [["part", "rate", unit], *([f.part, f.rate, f.loss] for f in findings)],
        folder / "scan.csv",
    )

    from segprune import plots  # drawing takes a second to import

    plots.grid(losses, columns, TITLE.format(unit), folder / "scan.png")
    files = "scan.json (for segprune prune --sensitivity), scan.csv, scan.png"
    console.print(f"Saved: {files} in {folder}", soft_wrap=True)


def _parse_rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(sorted(float(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(f"--rates is {text!r}; give shares such as 0.25,0.5,0.75.") from error
    if not all(0.0 < rate < 1.0 for rate in rates):
        raise ValueError(f"--rates is {text!r}; each must lie between 0 and 1.")
    return rates


def _choose_measure(
    flags: ScanFlags, model: SegFormer
) -> tuple[Callable[[SegFormer], float], str, list[Tensor]]:
    """Returns what is measured of a cut network, its name, and images for methods that need some."""
    device = next(model.parameters()).device
    # Without labels the uncut network's own classes are the truth.
    if flags.images:
        loaded = batch_images(
            load_images(list_images(flags.images), flags.num_images, flags.input_shape)
        )
        images = [batch.to(device) for batch in loaded]
        return output_distance(model, images), "divergence", images

    # With labels it is the mIoU that is lost, on the validation images.
    num_classes, num_workers = model.spec.num_classes, flags.num_workers
    assert num_workers is not None
    source, _ = open_data(
        flags.data, flags.layout, num_classes, ("val",), num_workers=num_workers
    )
    samples = source.split("val")

    def score(network: SegFormer) -> float:
        return evaluate(
            network,
            samples,
            num_classes,
            EvalMode(input_shape=flags.input_shape, boundary=False),
            device=device,
            batch_size=flags.batch_size,
            num_workers=num_workers,
        ).miou

    # The uncut network is scored once, since every loss is a difference to it.
    dense = score(model)
    images = []
    # The ranking may need images too; those of the data set are at hand.
    if flags.pruning_method in NEED_IMAGES:
        loaded = batch_images(
            load_images(list_images(source), flags.num_images, flags.input_shape)
        )
        images = [batch.to(device) for batch in loaded]
    return lambda network: dense - score(network), "mIoU lost", images
