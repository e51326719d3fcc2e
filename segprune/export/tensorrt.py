"""The command that builds a TensorRT engine from an .onnx file, for users who have TensorRT."""

from __future__ import annotations

import shlex
from pathlib import Path

from segprune.export.manifest import MIN_DYNAMIC, Manifest
from segprune.spec import RGB

SMALLEST = (
    1,
    MIN_DYNAMIC,
    MIN_DYNAMIC,
)  # batch, height and width between which an engine of any size is built
USUAL = (1, 512, 512)
LARGEST = (8, 2048, 2048)


def command_line(path: Path, manifest: Manifest) -> str:
    """Returns `trtexec` with its arguments, as TensorRT 10 takes them. The file itself says what is fp16 or int8."""
    words = ["trtexec", f"--onnx={path}", f"--saveEngine={path.with_suffix('.engine')}"]
    # Without this flag TensorRT may choose precisions itself, whatever the file says.
    if manifest.precision != "fp32":
        words.append("--stronglyTyped")

    # An engine of any size is tuned between bounds, which have to be named.
    if manifest.shape is None:
        name = "pixels" if manifest.preprocess else "images"
        channels = RGB if manifest.spec is None else manifest.spec.in_channels
        for flag, (batch, height, width) in (
            ("minShapes", SMALLEST),
            ("optShapes", USUAL),
            ("maxShapes", LARGEST),
        ):
            sizes = (
                (batch, height, width, channels)
                if manifest.preprocess
                else (batch, channels, height, width)
            )
            words.append(f"--{flag}={name}:{'x'.join(map(str, sizes))}")

    return shlex.join(words)
