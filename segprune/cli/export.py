"""`segprune export FILE`: a checkpoint out to what other runtimes read, run again and compared before it is kept.

NAME.onnx, NAME.xml …   the file, which says itself what it takes and gives
NAME.onnx.json          the settings and how far the file is from the network in PyTorch
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from segprune import checkpoint
from segprune.cli.calibration import load_pictures, places_in, places_of
from segprune.cli.console import console, number_of, open_data, quiet_exporters, show_notes, show_settings
from segprune.cli.flags import Layout, switch
from segprune.cli.predict import palette_in
from segprune.data.transforms import Bytes
from segprune.export import BAKED, FORMATS, LIMITS, PRECISIONS, Limits, Precision, check_choice, export
from segprune.export.tensorrt import command_line
from segprune.files import check_writable, write_json
from segprune.model import check_input
from segprune.runs.records import environment


@dataclass(frozen=True)
class ExportConfig:
    model_path: Annotated[
        str, Argument(metavar="FILE", help=".pth, .pt, .safetensors, a Hugging Face folder or hub name.")
    ]
    format: Annotated[str, Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "onnx"
    output: Annotated[
        str, Option("--output", metavar="PATH", help="The file to write; if not given, named after FILE in exported/.")
    ] = ""
    precision: Annotated[str, Option("--precision", help=f"One of {', '.join(PRECISIONS)}.")] = "fp32"
    input_shape: Annotated[
        tuple[int, int], Option("--input_shape", metavar="H W", help="The size that the file takes.")
    ] = (512, 512)
    batch_size: Annotated[int, Option("--batch_size", min=1, help="Pictures that the file takes at a time.")] = 1
    dynamic: Annotated[bool, switch("--dynamic", "Any batch and size; slower to export.")] = False
    bake: Annotated[
        str,
        Option(
            "--bake", help="Into the file: preprocess (uint8 RGB B H W 3 in), argmax (classes out), or both, as a,b."
        ),
    ] = ""
    data: Annotated[str, Option("--data", help="Data set whose pictures calibrate int8 and are compared.")] = ""
    layout: Layout = None
    split: Annotated[str, Option("--split", help="The part of --data to take pictures of.")] = "train"
    calibration: Annotated[
        str, Option("--calibration", metavar="DIR", help="Folder of pictures, instead of --data.")
    ] = ""
    num_calibration: Annotated[int, Option("--num_calibration", min=1, help="Pictures to take, spread evenly.")] = 100
    tolerance: Annotated[
        float | None,
        Option("--tolerance", min=0.0, help="Allowed difference of logits over the largest; 1e-4 for fp32."),
    ] = None
    agreement: Annotated[
        float | None,
        Option("--agreement", min=0.0, max=1.0, help="Share of pixels that must keep their class; 0.9 for int8."),
    ] = None
    tensorrt: Annotated[bool, switch("--tensorrt", "Print the command that builds a TensorRT engine.")] = False
    dialect: Annotated[str | None, Option("--dialect", help="Overrules the dialect that is recognised.")] = None


def run(config: ExportConfig, given: frozenset[str]) -> None:
    """Write a checkpoint as a file for another runtime, run it, compare it with PyTorch and keep it if it agrees."""
    check_choice(config.format, config.precision)
    baked = _baked(config.bake)
    _check_effects(config, given, baked)
    check_input((config.batch_size, 3, *config.input_shape))
    found = checkpoint.read(config.model_path, dialect=config.dialect)
    output = _output(config)
    read = {"output": str(output), "dialect": found.dialect, "variant": found.spec.variant}
    show_settings("Export", asdict(config) | read | {"num_classes": found.spec.num_classes})
    show_notes(found.notes)
    check_writable(output.parent)
    names, palette = found.extra.get("class_names"), palette_in(found, config.model_path)
    with quiet_exporters():
        manifest, difference = export(
            checkpoint.build(found),
            output,
            format=config.format,
            precision=config.precision,  # type: ignore[arg-type]
            size=config.input_shape,
            batch=config.batch_size,
            dynamic=config.dynamic,
            preprocess="preprocess" in baked,
            argmax="argmax" in baked,
            class_names=names if isinstance(names, list) else (),
            palette=palette,
            pictures=_pictures(config, found.spec.num_classes),
            limits=_limits(config),
        )
    console.print(
        f"Run again on {number_of(difference.num_images, 'picture')} and compared with PyTorch: {difference.text}."
    )
    notes = {"int8": ("How much int8 costs is told by the score: segprune eval it on data.",)}
    show_notes(notes.get(config.precision, ()))
    record: dict[str, Any] = {
        "settings": asdict(config),
        "manifest": asdict(manifest),
        "difference": asdict(difference),
    }
    record |= {"bytes": output.stat().st_size, "environment": environment()}
    write_json(record, f"{output}.json")
    console.print(f"Saved: {output}\n       {output}.json", soft_wrap=True, markup=False)
    if config.tensorrt:
        console.print(f"TensorRT: {command_line(output, manifest)}", soft_wrap=True, markup=False)


def _baked(words: str) -> frozenset[str]:
    baked = frozenset(filter(None, re.split(r"[,\s]+", words)))
    if unknown := sorted(baked - set(BAKED)):
        raise ValueError(f"--bake {unknown[0]} is unknown; choose of {', '.join(BAKED)}.")
    return baked


def _check_effects(config: ExportConfig, given: frozenset[str], baked: frozenset[str]) -> None:
    """ValueError for flags that contradict each other, and for one that was given and would change nothing."""
    if config.data and config.calibration:
        raise ValueError("--data and --calibration are two sources of the same pictures; give one of them.")
    pictures = config.data or config.calibration
    if config.precision == "int8" and not pictures:
        raise ValueError(
            "--precision int8 needs pictures to calibrate on, like those the network will see; give a data set as "
            "--data, or a folder of pictures as --calibration."
        )
    for flag, without_effect, where in (
        ("batch_size", config.dynamic, "with --dynamic, which takes any batch"),
        ("layout", not config.data, "without --data"),
        ("split", not config.data, "without --data"),
        ("num_calibration", not pictures, "without --data or --calibration"),
        ("tolerance", "argmax" in baked, "with --bake argmax, which leaves no logits to compare"),
        ("tensorrt", config.format != "onnx", f"with --format {config.format}, where TensorRT reads onnx"),
        ("tensorrt", config.precision == "int8", "with --precision int8, whose scales are made for ONNX Runtime"),
    ):
        if flag in given and without_effect:
            raise ValueError(f"--{flag} has no effect {where}; leave it out.")


def _output(config: ExportConfig) -> Path:
    """--output, or the checkpoint's name with the precision if it is not fp32, in exported/."""
    suffix = FORMATS[config.format].suffix
    if config.output:
        if not config.output.endswith(suffix):
            raise ValueError(f"--output {config.output} must end in {suffix}, as files of {config.format} do.")
        return Path(config.output)
    source = Path(config.model_path)
    stem = source.stem if source.is_file() else source.name
    return Path("exported") / f"{stem}{'' if config.precision == 'fp32' else f'_{config.precision}'}{suffix}"


def _limits(config: ExportConfig) -> Limits:
    precision: Precision = config.precision  # type: ignore[assignment]
    limits = LIMITS[precision]
    if config.tolerance is not None:
        limits = replace(limits, tolerance=config.tolerance)
    return limits if config.agreement is None else replace(limits, agreement=config.agreement)


def _pictures(config: ExportConfig, num_classes: int) -> Sequence[Bytes]:
    """Those of --data or --calibration, letterboxed to --input_shape [H, W, 3]."""
    if config.calibration:
        places = places_in(config.calibration, "--calibration")
    elif config.data:
        source, _ = open_data(config.data, config.layout, num_classes, (config.split,))
        places = places_of(source, config.split)
    else:
        return ()
    return load_pictures(places, config.num_calibration, config.input_shape)
