"""`segprune export FILE`: writes a checkpoint for other runtimes, runs the file and compares it before keeping it.

NAME.onnx, NAME.xml …   the file, which also says what it takes and gives
NAME.onnx.json          the settings and how far the file is from the network in PyTorch
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from segprune import checkpoint
from segprune.cli.console import (
    console,
    number_of,
    open_data,
    quiet_exporters,
    show_notes,
    show_settings,
)
from segprune.cli.flags import (
    Dialect,
    InputFlags,
    Layout,
    ModelFile,
    Verbose,
    refuse_without_effect,
    switch,
)
from segprune.data import DataChoices, Source
from segprune.data.transforms import Bytes
from segprune.data.unlabelled import list_images, load_images
from segprune.export import (
    BAKED,
    FORMATS,
    PRECISIONS,
    LayerCost,
    Limits,
    Precision,
    Runtime,
    check_choice,
    choose_limits,
    export,
)
from segprune.export.tensorrt import command_line
from segprune.files import check_writable, write_json
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.model import SegFormer, check_input
from segprune.runs.records import environment
from segprune.spec import Spec, stated_preprocessing


@dataclass(frozen=True)
class ExportFlags:
    model_path: ModelFile
    format: Annotated[str, Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "onnx"
    output: Annotated[
        str,
        Option(
            "--output",
            metavar="PATH",
            help="The file to write; if not given, named after FILE in exported/.",
        ),
    ] = ""
    precision: Annotated[
        str, Option("--precision", help=f"One of {', '.join(PRECISIONS)}.")
    ] = "fp32"
    input_shape: Annotated[
        tuple[int, int],
        Option("--input_shape", metavar="H W", help="The size that the file takes."),
    ] = (512, 512)
    batch_size: Annotated[
        int, Option("--batch_size", min=1, help="Images that the file takes at a time.")
    ] = 1
    dynamic: Annotated[bool, switch("--dynamic", "Any batch and size; slower to export.")] = (
        False
    )
    bake: Annotated[
        str,
        Option(
            "--bake",
            help="Into the file, as a,b: preprocess (uint8 RGB B H W 3 in), argmax or coarser argmax_quarter (classes out).",
        ),
    ] = ""
    opset: Annotated[
        int, Option("--opset", help="Of ONNX, 13 to 18: older ones for compilers of NPUs.")
    ] = 18
    data: Annotated[
        str,
        Option(
            "--data",
            help="Data set whose images calibrate int8, show fp16's ranges and are compared.",
        ),
    ] = ""
    layout: Layout = None
    split: Annotated[str, Option("--split", help="The part of --data to take images from.")] = (
        "train"
    )
    calibration: Annotated[
        str, Option("--calibration", metavar="DIR", help="Folder of images, instead of --data.")
    ] = ""
    num_calibration: Annotated[
        int, Option("--num_calibration", min=1, help="Images to take, spread evenly.")
    ] = 100
    tolerance: Annotated[
        float | None,
        Option(
            "--tolerance",
            min=0.0,
            help="Allowed difference of logits over the largest; 1e-4 for fp32.",
        ),
    ] = None
    agreement: Annotated[
        float | None,
        Option(
            "--agreement",
            min=0.0,
            max=1.0,
            help="Share of pixels that must keep their class; 0.9 for int8, where layers are left in float32 for it.",
        ),
    ] = None
    max_drop: Annotated[
        float | None,
        Option(
            "--max_drop",
            min=0.0,
            metavar="POINTS",
            help="int8: mIoU that may be lost on val of --data; layers are left in float32 until this holds.",
        ),
    ] = None
    tensorrt: Annotated[
        bool, switch("--tensorrt", "Print the command that builds a TensorRT engine.")
    ] = False
    dialect: Dialect = None
    verbose: Verbose = False


def run(flags: ExportFlags, inputs: InputFlags, given: frozenset[str]) -> None:
    """Write a checkpoint as a file for another runtime, run it, compare it with PyTorch and keep it if it agrees."""
    # Refuse what cannot be exported before anything is read.
    check_choice(flags.format, flags.precision)
    baked = _parse_bake(flags.bake)
    _check_flags(flags, given, baked)
    check_input((flags.batch_size, 3, *flags.input_shape))

    # Open the checkpoint, and find out where the file goes.
    opened = inputs.apply(checkpoint.read(flags.model_path, dialect=flags.dialect))
    output = _choose_output(flags)
    spec = opened.spec
    read = {
        "output": str(output),
        "dialect": opened.dialect,
        "variant": spec.variant,
        "num_classes": spec.num_classes,
    }
    settings = asdict(flags) | asdict(inputs)
    show_settings("Export", settings, given, read)
    show_notes(opened.notes)
    # Find out now whether the file can be written, not after minutes of exporting.
    check_writable(output.parent)
    names, palette = opened.extra.get("class_names", []), opened.extra.get("palette", [])

    # Write the file, run it and compare it.
    # Images calibrate int8, and both networks are compared on them.
    images = _load_images(flags, inputs, spec)
    network = checkpoint.build(opened)
    accept = None if flags.max_drop is None else _limit_drop(flags, inputs, network)
    costs: list[LayerCost] = []
    with quiet_exporters():
        manifest, difference = export(
            network,
            output,
            format=flags.format,
            precision=flags.precision,
            size=flags.input_shape,
            batch=flags.batch_size,
            dynamic=flags.dynamic,
            opset=flags.opset,
            preprocess="preprocess" in baked,
            argmax="argmax" in baked,
            argmax_quarter="argmax_quarter" in baked,
            class_names=names,
            palette=palette,
            images=images,
            limits=_choose_limits(flags, baked),
            accept=accept,
            on_ranked=costs.extend,
        )
    compared = number_of(difference.num_images, "image")
    console.print(f"Run again on {compared} and compared with PyTorch: {difference.text}.")
    if manifest.float32:
        reason = "since their values pass half of fp16's range"
        if flags.precision == "int8":
            reason = f"of {len(costs)} layers, since quantising them costs most"
        console.print(f"Left in float32, {reason}: {', '.join(manifest.float32)}.")
    if manifest.argmax_quarter:
        share = 100 * (1 - difference.agreement)
        console.print(
            f"Classes chosen at a quarter of the size: {share:.2f} % of pixels have another than by the full logits."
        )
    if flags.precision == "int8":
        show_notes(("To see what int8 costs, score the file on data with segprune eval.",))

    # Record what was done beside the file.
    record: dict[str, Any] = {
        "settings": settings,
        "manifest": asdict(manifest),
        "difference": asdict(difference),
        "layers": [asdict(cost) for cost in costs],
        "bytes": output.stat().st_size,
        "environment": environment(),
    }
    write_json(record, f"{output}.json")
    console.print(f"Saved: {output}\n       {output}.json", soft_wrap=True)
    if flags.tensorrt:
        console.print(f"TensorRT: {command_line(output, manifest)}", soft_wrap=True)


def _parse_bake(words: str) -> frozenset[str]:
    baked = frozenset(filter(None, re.split(r"[,\s]+", words)))
    if unknown := sorted(baked - set(BAKED)):
        raise ValueError(f"--bake {unknown[0]} is unknown; choose of {', '.join(BAKED)}.")
    return baked


def _check_flags(flags: ExportFlags, given: frozenset[str], baked: frozenset[str]) -> None:
    """Raises ValueError for flags that contradict each other, and for one that was given and would change nothing."""
    if flags.data and flags.calibration:
        raise ValueError(
            "--data and --calibration are two sources of the same images; give one of them."
        )

    # Quantising needs images.
    images = flags.data or flags.calibration
    if flags.precision == "int8" and not images:
        raise ValueError(
            "--precision int8 needs images to calibrate on, like those the network will see; give a data set as "
            "--data, or a folder of images as --calibration."
        )

    if flags.max_drop is not None and not flags.data:
        raise ValueError("--max_drop needs --data: files are scored on its val.")

    # A flag that changes nothing is refused, since its user expects a change.
    refuse_without_effect(
        given,
        ("batch_size", flags.dynamic, "with --dynamic, which takes any batch"),
        ("layout", not flags.data, "without --data"),
        ("split", not flags.data, "without --data"),
        ("max_drop", flags.precision != "int8", f"with --precision {flags.precision}"),
        ("num_calibration", not images, "without --data or --calibration"),
        (
            "tolerance",
            bool(baked - {"preprocess"}),
            f"with --bake {flags.bake}, which leaves no logits to compare",
        ),
        (
            "tensorrt",
            flags.format != "onnx",
            f"with --format {flags.format}, since TensorRT reads onnx",
        ),
        (
            "tensorrt",
            flags.precision == "int8",
            "with --precision int8, whose scales are made for ONNX Runtime",
        ),
    )


def _choose_output(flags: ExportFlags) -> Path:
    """Returns --output, or in exported/ the checkpoint's name, followed by the precision unless it is fp32."""
    suffix = FORMATS[flags.format].suffix
    if flags.output:
        if not flags.output.endswith(suffix):
            raise ValueError(
                f"--output {flags.output} must end in {suffix}, as files of {flags.format} do."
            )
        return Path(flags.output)

    source = Path(flags.model_path)
    # A checkpoint may be a folder, whose name can hold a dot that begins no ending.
    stem = source.stem if source.is_file() else source.name
    precision = "" if flags.precision == "fp32" else f"_{flags.precision}"
    return Path("exported") / f"{stem}{precision}{suffix}"


def _choose_limits(flags: ExportFlags, baked: frozenset[str]) -> Limits:
    precision: Precision = flags.precision  # type: ignore[assignment]
    limits = choose_limits(precision, "argmax_quarter" in baked)
    if flags.tolerance is not None:
        limits = replace(limits, tolerance=flags.tolerance)
    return limits if flags.agreement is None else replace(limits, agreement=flags.agreement)


def _limit_drop(
    flags: ExportFlags, inputs: InputFlags, network: SegFormer
) -> Callable[[Runtime], bool]:
    """Returns what tells whether a file loses no more than --max_drop points of mIoU on val."""
    samples = _open_split(flags, inputs, network.spec, "val").split("val")

    def score(predict: SegFormer | Runtime) -> float:
        how = EvalMode(input_shape=flags.input_shape)
        return 100 * evaluate(predict, samples, network.spec.num_classes, how).miou

    assert flags.max_drop is not None
    least = score(network) - flags.max_drop
    return lambda runtime: score(runtime) >= least


def _open_split(flags: ExportFlags, inputs: InputFlags, spec: Spec, split: str) -> Source:
    source, _ = open_data(
        flags.data,
        flags.layout,
        spec.num_classes,
        (split,),
        choices=DataChoices(inputs.label_offset, expected=stated_preprocessing(spec)),
    )
    return source


def _load_images(flags: ExportFlags, inputs: InputFlags, spec: Spec) -> Sequence[Bytes]:
    """Loads those of --data or --calibration, letterboxed to --input_shape [H, W, C]."""
    if not flags.calibration and not flags.data:
        return ()
    own = stated_preprocessing(spec)
    if flags.calibration:
        places = list_images(flags.calibration)
    else:
        places = list_images(_open_split(flags, inputs, spec, flags.split), flags.split)
    return load_images(places, flags.num_calibration, flags.input_shape, own.num_channels)
