"""PyTorch's own formats: a graph of torch.export, that graph compiled by AOTInductor, a TorchScript trace."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from segprune.export.job import Job
from segprune.export.manifest import KEY

COMPILERS = ("g++", "clang++", "c++")


def write_pt2(job: Job, path: Path) -> None:
    torch.export.save(job.trace(), path, extra_files={f"{KEY}.json": job.manifest.text})


def write_aotinductor(job: Job, path: Path) -> None:
    """Compiles for a minute or more. The package runs only on machines like this one, with this version of PyTorch."""
    # Compiling fails late and at length without a compiler, so ask first.
    if not any(map(shutil.which, COMPILERS)):
        raise ValueError(
            "The format aotinductor needs a C++ compiler, and there is none here; install g++ or clang++, or choose "
            "another format."
        )

    from torch._inductor import aoti_compile_and_package

    # The package's metadata can be read without running its code.
    settings = {"aot_inductor.metadata": {KEY: job.manifest.text}}
    with torch.no_grad():
        aoti_compile_and_package(job.trace(), package_path=str(path), inductor_configs=settings)


def write_torchscript(job: Job, path: Path) -> None:
    with torch.no_grad():
        # Freezing turns weights into constants, which lets runtimes fold and fuse them.
        trace = torch.jit.freeze(torch.jit.trace(job.network, job.make_example()))
        torch.jit.save(trace, str(path), _extra_files={f"{KEY}.json": job.manifest.text})
