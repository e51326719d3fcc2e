"""What is measured: one case for every combination that was asked for, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from segprune import checkpoint
from segprune.export import FORMATS, Manifest, Precision, export, is_exported, open_exported
from segprune.export.manifest import MIN_DYNAMIC
from segprune.export.runtimes import require
from segprune.model import check_input

DTYPES = ("fp32", "tf32", "bf16", "fp16")
LIVE = ("torch", "compile")  # run checkpoints themselves, on a GPU as well
COMPUTE_IN_HALF = ("onnx", "pt2", "aotinductor", "torchscript")  # others keep weights in fp16 and compute in float32
FORMAT_OF = {"onnxruntime" if format == "onnx" else format: format for format in FORMATS}
RUNTIME_OF = {format: name for name, format in FORMAT_OF.items()}
PACKAGE_OF = {name: name for name in ("onnxruntime", "openvino", "ncnn")}
RUNTIMES: dict[str, tuple[str, ...]] = dict.fromkeys(LIVE, DTYPES)  # and the dtypes that each computes checkpoints in
RUNTIMES |= {name: ("fp32", "fp16") if f in COMPUTE_IN_HALF else ("fp32",) for name, f in FORMAT_OF.items()}


@dataclass(frozen=True)
class Case:
    """`path` is the file as it was given, `file` what is opened: another one where the checkpoint was exported."""

    path: str
    runtime: str
    dtype: str
    size: tuple[int, int]  # H W
    batch: int
    threads: int
    device: str = "cpu"
    fold: bool = False  # a checkpoint of torch and compile is folded for inference first
    file: str = ""

    @property
    def is_exported(self) -> bool:
        """Whether it was given as an exported file."""
        return is_exported(self.path)

    @property
    def condition(self) -> int | str:
        """What decides how fast the machine can be: the number of threads, on a GPU the precision."""
        return self.threads if self.device == "cpu" else self.dtype

    @property
    def text(self) -> str:
        return f"{self.path} in {self.runtime}, {self.dtype}, {self.size[0]}×{self.size[1]}, batch {self.batch}"


def grid(
    paths: Sequence[str],
    *,
    runtimes: Sequence[str] = (),
    dtypes: Sequence[str] = ("fp32",),
    sizes: Sequence[tuple[int, int]] = ((512, 512),),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    device: str = "cpu",
    fold: bool = False,
) -> list[Case]:
    """All combinations, the first file's first; a file that `segprune export` wrote has one runtime and one dtype.

    Without `runtimes` checkpoints run in torch. ValueError for what is unknown, too small or does not go together,
    ImportError where a runtime's package is missing.
    """
    _check_numbers(sizes, batches, threads)
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise ValueError(f"--runtimes {runtime} is unknown; choose of {', '.join(RUNTIMES)}.")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"--dtypes {dtype} is unknown; choose of {', '.join(DTYPES)}.")
    if device == "cpu" and "tf32" in dtypes:
        raise ValueError("--dtypes tf32 is how GPUs take products of float32; add --cuda, or leave it out.")
    cases = []
    for path in paths:
        ways = _ways_of_exported(path, runtimes, sizes, batches) if is_exported(path) else None
        if ways is None:
            ways = list(product(runtimes or ("torch",), dtypes))
            _check_ways(ways)
        if device != "cpu" and (cpu_only := sorted({runtime for runtime, _ in ways} - set(LIVE))):
            raise ValueError(f"{cpu_only[0]} runs on the CPU here; leave out --cuda, or {cpu_only[0]}.")
        for (runtime, dtype), size, batch, number in product(ways, sizes, batches, threads):
            cases.append(Case(path, runtime, dtype, size, batch, number, device, fold and runtime in LIVE, path))
    if fold and not any(case.fold for case in cases):
        raise ValueError("--fold has no effect here, since what is exported is folded; leave it out.")
    return cases


def _check_numbers(sizes: Sequence[tuple[int, int]], batches: Sequence[int], threads: Sequence[int]) -> None:
    for size in sizes:
        check_input((1, 3, *size))
    for flag, numbers in (("batch_sizes", batches), ("threads", threads)):
        if numbers and min(numbers) < 1:
            raise ValueError(f"--{flag} has {min(numbers)}, where 1 and more is allowed; give a larger number.")


def _check_ways(ways: Sequence[tuple[str, str]]) -> None:
    for runtime, dtype in ways:
        if runtime in PACKAGE_OF:
            require(PACKAGE_OF[runtime], f"Running in {runtime}")
        if dtype not in RUNTIMES[runtime]:
            raise ValueError(
                f"{runtime} does not compute in {dtype} here, only in {', '.join(RUNTIMES[runtime])}; "
                "leave out one of them, or run them apart."
            )


def _ways_of_exported(
    path: str, runtimes: Sequence[str], sizes: Sequence[tuple[int, int]], batches: Sequence[int]
) -> list[tuple[str, str]]:
    """The one runtime and dtype of the file."""
    manifest = open_exported(path).manifest
    runtime = RUNTIME_OF[manifest.format]
    if runtimes and runtime not in runtimes:
        raise ValueError(
            f"{path} runs in {runtime} alone, which is not among --runtimes; add it, or leave out the file."
        )
    for size, batch in product(sizes, batches):
        _check_taken(path, manifest, size, batch)
    return [(runtime, manifest.precision)]


def _check_taken(path: str, manifest: Manifest, size: tuple[int, int], batch: int) -> None:
    if manifest.shape is None and min(size) < MIN_DYNAMIC:
        raise ValueError(
            f"{path} takes pictures of {MIN_DYNAMIC} pixels a side and more, got {size[0]}×{size[1]}; "
            "give larger --sizes."
        )
    if manifest.shape is not None and (batch, *size) != manifest.shape:
        own, height, width = manifest.shape
        raise ValueError(
            f"{path} takes batches of {own} of {height}×{width} alone, got {batch} of {size[0]}×{size[1]}; "
            f"give --sizes {height}x{width} --batch_sizes {own}, or export it again with --dynamic."
        )


def export_cases(
    cases: Sequence[Case], folder: Path, *, progress: Callable[[int, int, str], None] | None = None
) -> list[Case]:
    """The cases with every checkpoint exported into `folder` whose runtime needs it, once for all threads."""
    written: dict[Case, str] = {}
    found = []
    for done, case in enumerate(cases):
        if progress is not None:
            progress(done, len(cases), case.text)
        if case.runtime in LIVE or case.is_exported:
            found.append(case)
            continue
        key = replace(case, threads=1)
        if key not in written:
            written[key] = str(_export(case, folder / str(len(written))))
        found.append(replace(case, file=written[key]))
    return found


def _export(case: Case, folder: Path) -> Path:
    format = FORMAT_OF[case.runtime]
    precision: Precision = "fp16" if case.dtype == "fp16" else "fp32"
    path = folder / f"network{FORMATS[format].suffix}"
    model = checkpoint.load(case.path)
    export(model, path, format=format, precision=precision, size=case.size, batch=case.batch)
    return path
