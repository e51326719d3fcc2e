"""ncnn, for phones and small boards: .ncnn.param and .ncnn.bin, converted from a trace by pnnx.

ncnn's files have no room for the manifest, so it lies in a third one, .ncnn.json.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from segprune.export.job import Job
from segprune.export.runtimes import require
from segprune.export.torch_files import write_torchscript
from segprune.spec import Spec

SUFFIX = ".ncnn.param"


def write(job: Job, path: Path) -> None:
    """Writes the three files. fp16 halves the weights; the precision of computing is chosen where the file runs."""
    manifest = job.manifest
    if (
        manifest.shape is None
        or manifest.shape[0] > 1
        or manifest.preprocess
        or manifest.argmax
    ):
        raise ValueError(
            "A file of the format ncnn takes one normalised image of one size and returns logits; leave out `dynamic`, "
            "`batch_size` and `bake`."
        )
    assert manifest.spec is not None
    _check_windows(manifest.spec, job.size)

    # Ask for the converter before the trace, which takes much longer.
    pnnx = require("pnnx", "Exporting to ncnn")

    height, width = manifest.shape[1:]
    stem = path.name.removesuffix(SUFFIX)
    with TemporaryDirectory() as folder:  # pnnx writes eight files
        # pnnx names its files after the trace, so it works in a folder of its own.
        trace = Path(folder) / "it.pt"
        write_torchscript(job, trace)

        # Absolute paths, since the command runs in the temporary folder.
        command = [
            pnnx.EXEC_PATH,
            trace.name,
            f"inputshape=[1,{job.in_channels},{height},{width}]",
            f"fp16={int(manifest.precision == 'fp16')}",
            f"ncnnparam={path.resolve()}",
            f"ncnnbin={path.resolve().with_name(f'{stem}.ncnn.bin')}",
        ]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)

    # An exit status of 0 alone does not show that the file was written.
    if result.returncode or not path.is_file():
        raise ValueError(
            f"pnnx could not convert the network ({result.stderr[-200:].strip()}); choose another format."
        )
    # Last, so that there is no manifest without a network.
    path.with_name(f"{stem}.ncnn.json").write_text(manifest.text, encoding="utf-8")


def _check_windows(spec: Spec, size: tuple[int, int]) -> None:
    """Raises ValueError for averages over windows larger than the map, which ncnn divides by zero."""
    shorter = min(size)
    for i, stage in enumerate(spec.stages, 1):
        shorter = -(-shorter // stage.stride)  # padded by half the kernel, so rounded up
        side = shorter // stage.reduction_ratio
        factor = max(block.kv_reduction for block in stage.blocks)
        if factor > max(side, 1):
            raise ValueError(
                f"Keys and values of stage {i} are averaged over {factor} × {factor}, and at {size[0]}×{size[1]} their map "
                f"is {side} high or wide, which ncnn cannot do; give a larger `input_shape`."
            )
