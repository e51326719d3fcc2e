"""A network out to what other runtimes read; every file is run again and compared before it is kept.

    onnx         for ONNX Runtime, TensorRT and most others
    openvino     Intel's IR, two files: .xml and .bin
    pt2          a graph of torch.export
    aotinductor  that graph compiled for this machine; also .pt2
    torchscript  a trace, for programs written around torch.jit
    ncnn         for phones and small boards, three files: .ncnn.param, .ncnn.bin and .ncnn.json

Files are written and checked on the CPU. What a file takes and gives stands in its `Manifest`, inside the file.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segprune.compare import TOLERANCE, Difference, Limits, compare
from segprune.data.transforms import Bytes, normalise
from segprune.export import ncnn, onnx, openvino, torch_files
from segprune.export.half import halve
from segprune.export.int8 import LayerCost, find_fewest, rank_layers
from segprune.export.job import Job
from segprune.export.manifest import PRECISIONS, Manifest, Precision
from segprune.export.network import Deployed
from segprune.export.runtimes import PROGRAMS, Runtime, is_exported, open_exported
from segprune.files import atomic_files
from segprune.model import SegFormer, check_input
from segprune.spec import preprocessing_of

__all__ = [
    "BAKED",
    "FORMATS",
    "LIMITS",
    "PRECISIONS",
    "PROGRAMS",
    "Difference",
    "ExportOptions",
    "LayerCost",
    "Limits",
    "Manifest",
    "Precision",
    "Runtime",
    "check_choice",
    "choose_limits",
    "export",
    "is_exported",
    "open_exported",
]

BAKED = ("preprocess", "argmax", "argmax_quarter")
QUARTER_AGREEMENT = 0.9  # classes chosen at a quarter of the size are coarser at every edge
LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(TOLERANCE, 0.999),
    "fp16": Limits(2e-2, 0.98),
    "int8": Limits(
        None, 0.9
    ),  # where logits are far apart anyway, their difference tells little
}


@dataclass(frozen=True)
class Format:
    """`write` makes the file, which ends in `suffix`, and those beside it if the format has several.

    With `stores_half`, fp16 says how the weights are stored; in other formats the graph itself is in half precision.
    """

    suffix: str
    precisions: tuple[Precision, ...]
    write: Callable[[Job, Path], None]
    stores_half: bool = False


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", PRECISIONS, onnx.write),
    "openvino": Format(".xml", PRECISIONS, openvino.write),
    "pt2": Format(".pt2", ("fp32", "fp16"), torch_files.write_pt2),
    "aotinductor": Format(".pt2", ("fp32", "fp16"), torch_files.write_aotinductor),
    "torchscript": Format(".torchscript", ("fp32", "fp16"), torch_files.write_torchscript),
    "ncnn": Format(ncnn.SUFFIX, ("fp32", "fp16"), ncnn.write, stores_half=True),
}


def check_choice(format: str, precision: str) -> None:
    """Raises ValueError for a format that is unknown or does not come in the precision."""
    if format not in FORMATS:
        raise ValueError(
            f"The format {format!r} is unknown; choose one of {', '.join(FORMATS)}."
        )
    # Only some of the formats can be quantised to int8.
    if precision not in FORMATS[format].precisions:
        allowed = ", ".join(FORMATS[format].precisions)
        raise ValueError(
            f"The format {format} does not come in {precision!r}; choose one of {allowed}."
        )


@dataclass(frozen=True)
class ExportOptions:
    """What the file shall be. `size` is H W; a `dynamic` file takes any size and batch.

    With `preprocess` the file takes pixels, with `argmax` or `argmax_quarter` it returns classes; see `Manifest`.
    `class_names` and `palette` are kept in the file. `opset` is that of ONNX.
    """

    format: str = "onnx"
    precision: Precision = "fp32"
    size: tuple[int, int] = (512, 512)
    batch: int = 1
    dynamic: bool = False
    preprocess: bool = False
    argmax: bool = False
    argmax_quarter: bool = False
    opset: int = onnx.OPSET
    class_names: Sequence[str] = ()
    palette: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_choice(self.format, self.precision)
        check_input((self.batch, 3, *self.size))
        if self.opset not in onnx.OPSETS:
            first, last = onnx.OPSETS[0], onnx.OPSETS[-1]
            raise ValueError(
                f"`opset` is {self.opset}, where {first} to {last} is allowed; give one of these."
            )
        if self.opset != onnx.OPSET and (self.format != "onnx" or self.dynamic):
            raise ValueError(
                f"`opset` {self.opset} is for the format onnx and one fixed size; leave out `opset`, or `dynamic` and "
                "other formats."
            )
        if self.format == "torchscript" and self.precision == "fp16" and self.dynamic:
            raise ValueError(
                "fp16 in the format torchscript is for one fixed size; leave out `dynamic`, or choose pt2 or fp32."
            )
        if self.argmax and self.argmax_quarter:
            raise ValueError(
                "argmax and argmax_quarter in `bake` are two ways to the same classes; give one of them."
            )


def export(
    model: SegFormer,
    path: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    images: Sequence[Bytes] = (),
    limits: Limits | None = None,
    accept: Callable[[Runtime], bool] | None = None,
    on_ranked: Callable[[Sequence[LayerCost]], None] | None = None,
    **changes: Any,
) -> tuple[Manifest, Difference]:
    """Writes the network to `path`, runs the file and compares it with the network.

    `changes` are single options of `ExportOptions`, such as `format`. `images` [H, W, C] uint8 of its `size`
    calibrate int8, which needs some, show what overflows in fp16, and are compared; without them images are generated.
    `accept` judges the open file as well. Where int8 does not hold, layers are ranked, which `on_ranked` gets, and the
    fewest of them that help are left in float32. Raises ValueError for what cannot be done and for a file that differs
    by more than `limits`, which is not kept; OSError where `path` cannot be written.
    """
    options = replace(options or ExportOptions(), **changes)
    format = FORMATS[options.format]
    precision = options.precision
    path = Path(path)
    # The suffix decides how the file is opened again, so a wrong one is refused now.
    if not path.name.endswith(format.suffix):
        raise ValueError(
            f"{path} ends in {path.suffix!r}, where a file of the format {options.format} ends in {format.suffix}."
        )
    # Images, unlike generated ones, wait for what the network's file does not say.
    if images:
        preprocessing_of(model)
    # Generated images would calibrate the ranges of activations for the wrong data.
    if precision == "int8" and not images:
        raise ValueError(
            "int8 needs images to calibrate on, like those the network will see; give some."
        )

    # The file is compared with the network as it came, in float32, whatever is done to the network for the file.
    reference = copy.deepcopy(model).cpu().float().eval()
    network = Deployed(
        reference,
        preprocess=options.preprocess,
        argmax=options.argmax,
        argmax_quarter=options.argmax_quarter,
    )
    spec = network.network.spec
    # The manifest describes the folded network, since that is what the file computes.
    manifest = Manifest(
        spec.variant,
        spec.num_classes,
        options.format,
        precision,
        shape=None if options.dynamic else (options.batch, *options.size),
        preprocess=options.preprocess,
        argmax=options.argmax or options.argmax_quarter,
        argmax_quarter=options.argmax_quarter,
        class_names=tuple(options.class_names),
        spec=spec,
        palette=tuple(options.palette),
    )
    job = Job(network, manifest, options.size, images, options.opset)
    # Where only storage is halved, the writer does it; the network stays in float32.
    if precision == "fp16" and not format.stores_half:
        job = _halve(job)

    # Write beside the target, and move the file there only if it agrees.
    limits = limits or choose_limits(precision, options.argmax_quarter)
    with atomic_files(path) as temporary:

        def attempt(job: Job) -> tuple[Difference, bool]:
            """Returns how far the file is off, and whether that may be."""
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # PyTorch's exporters call what PyTorch deprecates
                format.write(job, temporary)
            runtime = open_exported(temporary, trust=True)
            difference = compare(run_both(reference, runtime, job))
            accepted = difference.within(limits) and (accept is None or accept(runtime))
            return difference, accepted

        # An error in here leaves no file behind.
        difference, accepted = attempt(job)
        if precision == "int8" and not accepted:
            costs = rank_layers(job)
            if on_ranked is not None:
                on_ranked(costs)
            job, difference, accepted = _leave_fewest(job, difference, costs, attempt)
        if not accepted:
            raise ValueError(_describe_difference(difference, limits, precision))

    return job.manifest, difference


def choose_limits(precision: Precision, argmax_quarter: bool = False) -> Limits:
    """Returns how far a file may be from its network, where nothing else is asked for."""
    limits = LIMITS[precision]
    if argmax_quarter:
        return replace(limits, agreement=min(limits.agreement, QUARTER_AGREEMENT))
    return limits


def _halve(job: Job) -> Job:
    """Returns the job with its network in half precision, save for what would overflow, which the manifest names."""
    network, names = halve(job.trace(), job.make_batches())
    return replace(job, network=network, manifest=replace(job.manifest, float32=names))


def _leave_fewest(
    job: Job,
    difference: Difference,
    costs: Sequence[LayerCost],
    attempt: Callable[[Job], tuple[Difference, bool]],
) -> tuple[Job, Difference, bool]:
    """Returns the job that leaves as few layers in float32 as will do; its file is the last that was written."""
    tried = {0: (job, difference, False)}

    def holds(number: int) -> bool:
        names = tuple(cost.name for cost in costs[:number])
        trial = replace(job, manifest=replace(job.manifest, float32=names))
        tried[number] = (trial, *attempt(trial))
        return tried[number][2]

    # With all but one of them in float32 there is hardly any int8 left to save.
    fewest = find_fewest(len(costs) - 1, holds)
    if fewest is not None and fewest != list(tried)[-1]:
        holds(fewest)
    return tried[0] if fewest is None else tried[fewest]


def run_both(
    reference: nn.Module, runtime: Runtime, job: Job
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields what the network, in eval mode on the CPU, and its file give for the same images."""
    for images in job.choose_compared():
        with torch.no_grad():
            # The network always takes normalised images, whatever the file takes.
            own = job.preprocessing
            logits = reference(torch.stack([normalise(image, own) for image in images]))
        yield logits, runtime.run_any(job.prepare(images))


def _describe_difference(difference: Difference, limits: Limits, precision: Precision) -> str:
    """Returns the message for a file that differs too much."""
    # Of a class map only the agreement is known, so only that limit is named.
    allowed = f"at least {100 * limits.agreement:g} %"
    if difference.relative is not None and limits.tolerance is not None:
        allowed = f"at most {limits.tolerance:g} and {allowed}"

    if difference.within(limits):
        return (
            f"The exported file is close to the network ({difference.text}) but scores too low, even with all layers "
            "but one in float32, and was not kept; allow a larger `max_drop`, or export as fp32."
        )

    # What helps depends on where the precision was lost.
    remedies = {
        "fp32": "give a larger `tolerance` if that is enough for you",
        "fp16": "give images like those the network will see, or export as fp32",
        "int8": "give more images to calibrate on, a lower `agreement` or a larger `max_drop`, or export as fp32",
    }
    return (
        f"The exported file is too far from the network ({difference.text}; {allowed} were allowed) and was not kept; "
        f"{remedies[precision]}."
    )
