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
from segprune.timing import PRECISIONS

DTYPES: tuple[str, ...] = PRECISIONS
OUTPUTS = ("logits", "classes")
LIVE = ("torch", "compile")  # run checkpoints themselves, on a GPU as well
COMPUTE_IN_HALF = (
    "onnx",
    "pt2",
    "aotinductor",
    "torchscript",
)  # others keep weights in fp16 and compute in float32
FORMAT_OF = {"onnxruntime" if format == "onnx" else format: format for format in FORMATS}
RUNTIME_OF = {format: name for name, format in FORMAT_OF.items()}
PACKAGE_OF = {name: name for name in ("onnxruntime", "openvino", "ncnn")}

# The dtypes in which each runtime computes checkpoints.
RUNTIMES: dict[str, tuple[str, ...]] = dict.fromkeys(LIVE, DTYPES)
RUNTIMES |= {
    name: ("fp32", "fp16") if format in COMPUTE_IN_HALF else ("fp32",)
    for name, format in FORMAT_OF.items()
}


@dataclass(frozen=True)
class Case:
    """`path` is the file as it was given, `file` what is opened: another one where the checkpoint was exported.

    `output` is what a checkpoint's pass ends with: logits of the input's size, or the classes alone.
    """

    path: str
    runtime: str
    dtype: str
    size: tuple[int, int]  # H W
    batch: int
    threads: int
    device: str = "cpu"
    fold: bool = False  # a checkpoint of torch and compile is folded for inference first
    file: str = ""
    output: str = "logits"

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
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    device: str = "cpu",
    fold: bool = False,
    trust: bool = False,
    output: str = "logits",
) -> list[Case]:
    """Returns all combinations, the first file's first.

    A file that `segprune export` wrote has one runtime and one dtype of its own. Without `runtimes` checkpoints run in
    torch; `trust` is that of `open_exported`. Raises ValueError for what is unknown, too small or cannot be combined,
    ImportError where a runtime's package is missing.
    """
    _check_numbers(sizes, batch_sizes, threads)
    # Refuse unknown words before files are opened, which takes a while.
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise ValueError(
                f"`runtimes` has {runtime}, which is unknown; choose from {', '.join(RUNTIMES)}."
            )
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(
                f"`dtypes` has {dtype}, which is unknown; choose from {', '.join(DTYPES)}."
            )
    if output not in OUTPUTS:
        raise ValueError(
            f"`output` is {output}, which is unknown; choose from {', '.join(OUTPUTS)}."
        )
    if device == "cpu" and "tf32" in dtypes:
        raise ValueError(
            "`dtypes` has tf32, in which only GPUs compute; leave it out, or run on a GPU."
        )

    cases = []
    for path in paths:
        # An exported file fixes its runtime and precision; a checkpoint runs in all.
        if is_exported(path):
            ways = [_way_of_exported(path, runtimes, sizes, batch_sizes, trust)]
        else:
            ways = list(product(runtimes or ("torch",), dtypes))
            _check_ways(ways)

        # Without this, rows of the CPU would stand among those of the GPU.
        cpu_only = sorted({runtime for runtime, _ in ways} - set(LIVE))
        if device != "cpu" and cpu_only:
            raise ValueError(
                f"{cpu_only[0]} runs on the CPU only; leave it out, or measure it without the GPU."
            )

        # Folding is done while exporting, so the option is for live networks alone.
        for (runtime, dtype), size, batch, number in product(ways, sizes, batch_sizes, threads):
            cases.append(
                Case(
                    path,
                    runtime,
                    dtype,
                    size,
                    batch,
                    number,
                    device,
                    fold and runtime in LIVE,
                    path,
                    "logits" if is_exported(path) else output,
                )
            )

    # An option without effect would let the user believe in a comparison.
    if fold and not any(case.fold for case in cases):
        raise ValueError(
            "`fold` has no effect here, since what is exported is folded; leave it out."
        )
    if output != "logits" and all(case.is_exported for case in cases):
        raise ValueError(
            "`output` has no effect on exported files, whose output is a part of them; leave it out."
        )
    return cases


def _check_numbers(
    sizes: Sequence[tuple[int, int]], batch_sizes: Sequence[int], threads: Sequence[int]
) -> None:
    for size in sizes:
        check_input((1, 3, *size))
    for name, numbers in (("batch_sizes", batch_sizes), ("threads", threads)):
        if numbers and min(numbers) < 1:
            raise ValueError(
                f"`{name}` has {min(numbers)}, where 1 and more is allowed; give a larger number."
            )


def _check_ways(ways: Sequence[tuple[str, str]]) -> None:
    """Refuses a runtime that is not installed or does not compute in that dtype."""
    for runtime, dtype in ways:
        # A missing package is reported now and not after minutes of measuring.
        if runtime in PACKAGE_OF:
            require(PACKAGE_OF[runtime], f"Running in {runtime}")
        if dtype not in RUNTIMES[runtime]:
            raise ValueError(
                f"{runtime} does not compute in {dtype} here, only in {', '.join(RUNTIMES[runtime])}; "
                "leave out one of them, or run them apart."
            )


def _way_of_exported(
    path: str,
    runtimes: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int],
    trust: bool,
) -> tuple[str, str]:
    """Returns the one runtime and dtype of the file."""
    # The file itself says what it is; its name may say anything.
    manifest = open_exported(path, trust=trust).manifest
    if manifest.format not in RUNTIME_OF:
        raise ValueError(
            f"{path} is of no format that segprune export writes; export it again."
        )
    runtime = RUNTIME_OF[manifest.format]
    if runtimes and runtime not in runtimes:
        raise ValueError(
            f"{path} runs in {runtime} alone, which is not among `runtimes`; add it, or leave out the file."
        )
    # A file of one size cannot run at any other one on the list.
    for size, batch in product(sizes, batch_sizes):
        _check_input_of_exported(path, manifest, size, batch)
    return runtime, manifest.precision


def _check_input_of_exported(
    path: str, manifest: Manifest, size: tuple[int, int], batch: int
) -> None:
    if manifest.shape is None:
        if min(size) < MIN_DYNAMIC:
            raise ValueError(
                f"{path} takes images of {MIN_DYNAMIC} pixels a side and more, got {size[0]}×{size[1]}; "
                "give larger `sizes`."
            )
    # Running other batches piece by piece would not be what was asked to measure.
    elif manifest.shape != (batch, *size):
        own, height, width = manifest.shape
        raise ValueError(
            f"{path} takes batches of {own} of {height}×{width} alone, got {batch} of {size[0]}×{size[1]}; "
            f"give `sizes` {height}x{width} and `batch_sizes` {own}, or export it again for any size."
        )


def export_cases(
    cases: Sequence[Case],
    folder: Path,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Case]:
    """Returns the cases with every checkpoint exported into `folder` whose runtime needs it."""
    written: dict[Case, str] = {}
    ready = []
    for done, case in enumerate(cases):
        # Exporting can take a minute per file, so say which one is being written.
        if progress is not None:
            progress(done, len(cases), case.text)
        if case.runtime in LIVE or case.is_exported:
            ready.append(case)
            continue

        # One file serves all numbers of threads.
        key = replace(case, threads=1)
        if key not in written:
            written[key] = str(_export(case, folder / str(len(written))))
        ready.append(replace(case, file=written[key]))
    return ready


def _export(case: Case, folder: Path) -> Path:
    # All other dtypes are refused for these runtimes.
    format = FORMAT_OF[case.runtime]
    precision: Precision = "fp16" if case.dtype == "fp16" else "fp32"
    path = folder / f"network{FORMATS[format].suffix}"
    model = checkpoint.load(case.path)
    export(
        model,
        path,
        format=format,
        precision=precision,
        size=case.size,
        batch=case.batch,
        argmax=case.output == "classes",
    )
    return path
