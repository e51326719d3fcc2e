"""The command that builds a TensorRT engine from an .onnx file, for users who have TensorRT."""

from __future__ import annotations

import shlex
from pathlib import Path

from segprune.export.manifest import MIN_DYNAMIC, Manifest

LARGEST = (8, 2048, 2048)  # batch, height and width that an engine of any size is built for
USUAL = (1, 512, 512)


def command_line(path: Path, manifest: Manifest) -> str:
    """`trtexec` as TensorRT 10 takes it. Where half precision and int8 are used stands in the file itself."""
    words = ["trtexec", f"--onnx={path}", f"--saveEngine={path.with_suffix('.engine')}"]
    if manifest.precision != "fp32":
        words.append("--stronglyTyped")
    if manifest.shape is None:
        name = "pixels" if manifest.preprocess else "images"
        for flag, (batch, height, width) in (
            ("minShapes", (1, MIN_DYNAMIC, MIN_DYNAMIC)),
            ("optShapes", USUAL),
            ("maxShapes", LARGEST),
        ):
            sizes = (batch, height, width, 3) if manifest.preprocess else (batch, 3, height, width)
            words.append(f"--{flag}={name}:{'x'.join(map(str, sizes))}")
    return shlex.join(words)
