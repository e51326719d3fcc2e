"""`segprune predict FILE --input X`: images, folders, videos and cameras segmented, and drawn to look at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
from torch import Tensor
from typer import Option

from segprune import checkpoint
from segprune.checkpoint import Checkpoint
from segprune.cli.console import (
    choose_device,
    console,
    number_of,
    progress_bar,
    show_notes,
    show_settings,
    show_table,
)
from segprune.cli.flags import (
    Compile,
    Cuda,
    Dialect,
    InputFlags,
    ModelFile,
    Verbose,
    refuse_without_effect,
    switch,
)
from segprune.compiler import CompiledParts
from segprune.data import voc_palette
from segprune.files import atomic_path, check_writable, write_json
from segprune.inference.draw import legend
from segprune.inference.inputs import check_sources_kept, find_images, recognise_input
from segprune.inference.label_maps import MODES, EvalMode, Network, Upsampling
from segprune.inference.predict import (
    KINDS,
    Predictions,
    PredictJob,
    predict_images,
    predict_video,
)
from segprune.inference.video import open_video
from segprune.model import SegFormer, check_input
from segprune.spec import preprocessing_of

RECORD = "predictions.json"
AMPS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_CLASSES = 256  # what a palette PNG can tell apart


@dataclass(frozen=True)
class PredictFlags:
    model_path: ModelFile
    input: Annotated[
        str,
        Option(
            "--input",
            metavar="X",
            help="Image, folder of images, video file, or number of a camera.",
        ),
    ]
    save_dir: Annotated[str, Option("--save_dir", help="Folder for what is written.")] = (
        "predictions"
    )
    kind: Annotated[
        str, Option("--kind", help="What is written: overlay, mask, side_by_side or all.")
    ] = "overlay"
    alpha: Annotated[
        float, Option("--alpha", min=0.0, max=1.0, help="Share of the colours in an overlay.")
    ] = 0.5
    mode: Annotated[
        str,
        Option(
            "--mode",
            help="letterbox: fitted into --input_shape; whole: at its own size; slide: in windows of --input_shape.",
        ),
    ] = "letterbox"
    input_shape: Annotated[
        tuple[int, int],
        Option("--input_shape", metavar="H W", help="Size of the letterbox or of the window."),
    ] = (512, 512)
    batch_size: Annotated[
        int, Option("--batch_size", min=1, help="Images or frames at a time.")
    ] = 8
    num_workers: Annotated[
        int, Option("--num_workers", min=1, help="Threads that load and write images.")
    ] = 4
    amp: Annotated[str, Option("--amp", help="Mixed precision: no, fp16 or bf16.")] = "no"
    cuda: Cuda = False
    compile: Compile = False
    max_frames: Annotated[
        int | None, Option("--max_frames", min=1, help="Of a video or camera.")
    ] = None
    skip_bad: Annotated[bool, switch("--skip_bad", "Leave out images that cannot be read.")] = (
        False
    )
    classes: Annotated[
        str,
        Option(
            "--classes",
            metavar="PATH",
            help="Text file with a class name per line, instead of the checkpoint's.",
        ),
    ] = ""
    dialect: Dialect = None
    verbose: Verbose = False


def run(flags: PredictFlags, inputs: InputFlags, given: frozenset[str]) -> None:
    """Segment images, a video or what a camera sees, and write overlays, masks or both side by side.

    The labels are those of the original pixels. Masks are palette PNGs whose values are the classes. Ctrl-C ends a
    camera's film.
    """
    # What the input is decides which flags have an effect, so it comes first.
    source = recognise_input(flags.input)
    _check_words(flags)
    _check_effects(flags, given, source)
    check_input((1, 3, *flags.input_shape))
    device = choose_device(flags.cuda)

    # Open the checkpoint.
    opened = inputs.apply(checkpoint.read(flags.model_path, dialect=flags.dialect))
    names = choose_class_names(flags, opened)
    palette = opened.extra.get("palette") or list(voc_palette())
    spec = opened.spec
    read = {"dialect": opened.dialect, "variant": spec.variant, "num_classes": spec.num_classes}
    settings = asdict(flags) | asdict(inputs)
    show_settings("Prediction", settings, given, read)
    show_notes(opened.notes)

    # Predict, and write a file of each kind.
    job = PredictJob(
        network=_place_network(checkpoint.build(opened), device, flags),
        how=EvalMode(mode=flags.mode, input_shape=flags.input_shape),  # type: ignore[arg-type]
        batch_size=flags.batch_size,
        num_workers=flags.num_workers,
        kinds=KINDS if flags.kind == "all" else (flags.kind,),
        alpha=flags.alpha,
        palette=palette,
        folder=Path(flags.save_dir),
    )
    moving = source in ("video", "camera")
    done, seconds = (
        _film(flags, job, camera=source == "camera") if moving else _photograph(flags, job)
    )

    # Without any result there is nothing to record.
    thing = "frame" if moving else "image"
    number = sum(record.get("frames", 1) for record in done.records)
    if not number and done.interrupted:
        raise KeyboardInterrupt(f"Interrupted before any of the {thing}s was written.")
    if not number:
        raise ValueError(
            f"None of the images could be read, the first because: {done.skipped[0]['reason']}"
        )

    # Write the legend and the record.
    with atomic_path(job.folder / "legend.png") as temporary:
        legend(names, palette, done.counts.nonzero()[0].tolist()).save(temporary, format="PNG")
    record = {
        "settings": settings,
        "num_classes": spec.num_classes,
        "class_names": list(names),
    }
    record |= {"seconds": seconds, f"{thing}s_per_second": number / seconds}
    write_json(record | {"results": done.records, "skipped": done.skipped}, job.folder / RECORD)

    # Tell what was done.
    if len(done.records) == 1:
        _show_shares(done.records[0], names)
    if done.skipped:
        first = ", ".join(bad["name"] for bad in done.skipped[:3]) + (
            ", …" if len(done.skipped) > 3 else ""
        )
        done.notes.append(
            f"Skipped {number_of(len(done.skipped), 'image')} that could not be read: {first}"
        )
    if isinstance(job.network.upsampling, CompiledParts):
        done.notes += job.network.upsampling.notes
    show_notes(tuple(done.notes))
    console.print(
        f"{number_of(number, thing)} in {seconds:.1f} s, {number / seconds:.1f} {thing}s per second."
    )
    _show_paths(job, done)
    # What was written is recorded by now; the exit status still tells of Ctrl-C.
    if done.interrupted:
        raise KeyboardInterrupt(
            f"Interrupted after {number_of(number, thing)}; what was written until then is whole."
        )


def _check_words(flags: PredictFlags) -> None:
    for name, value, allowed in (
        ("kind", flags.kind, (*KINDS, "all")),
        ("mode", flags.mode, MODES),
        ("amp", flags.amp, tuple(AMPS)),
    ):
        if value not in allowed:
            raise ValueError(
                f"`{name}` {value} is unknown; choose one of {', '.join(allowed)}."
            )


def _check_effects(flags: PredictFlags, given: frozenset[str], source: str) -> None:
    moving = source in ("video", "camera")
    refuse_without_effect(
        given,
        ("alpha", flags.kind not in ("overlay", "all"), f"with --kind {flags.kind}"),
        ("input_shape", flags.mode == "whole", "with --mode whole"),
        ("max_frames", not moving, "on images"),
        ("num_workers", moving, "on a video"),
        ("skip_bad", source != "folder", "without a folder of images"),
        ("label_offset", True, "on images without labels"),
        ("ignore_index", True, "on images without labels"),
    )


def choose_class_names(flags: PredictFlags, opened: Checkpoint) -> tuple[str, ...]:
    """Returns the names from --classes, else the checkpoint's, else numbers. ValueError unless one per class."""
    number = opened.spec.num_classes
    if number > MAX_CLASSES:
        raise ValueError(
            f"The network has {number} classes, where masks can hold {MAX_CLASSES}; give another network."
        )

    names: Any
    if flags.classes:
        names, remedy = (
            _read_lines(Path(flags.classes)),
            "give one name per line, in the order of the classes",
        )
    else:
        names, remedy = (
            opened.extra.get("class_names"),
            "give a file with one name per line as --classes",
        )
    if names is None:
        return tuple(map(str, range(number)))

    if len(names) != number:
        raise ValueError(
            f"{flags.classes or flags.model_path} has {len(names)} class names, where the network has {number}; "
            f"{remedy}."
        )
    return tuple(names)


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give a text file with one class name per line."
        )
    try:
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text, the only encoding read; save it as UTF-8."
        ) from error


def _place_network(model: SegFormer, device: torch.device, flags: PredictFlags) -> Network:
    """Puts the network on the device, in mixed precision or compiled on demand.

    It raises ValueError for NaN or infinity. Compiled, its weights are cast, which autocast does in every pass.
    """
    model, amp = model.to(device), AMPS[flags.amp]
    upsampling: Upsampling = model
    if flags.compile:
        upsampling, amp = CompiledParts(model, amp or torch.float32), None

    # argmax of NaN is a class as well, so a broken network would seem to work.
    def predict(pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits = upsampling.parts(pixels)[1].float()  # upsampled where they are read
        if not logits.isfinite().all():
            raise ValueError(
                "The network gives logits that are NaN or infinite; leave out --amp, or give another checkpoint."
            )
        return logits

    classes, preprocessing = model.spec.num_classes, preprocessing_of(model)
    return Network(predict, classes, device, flags.batch_size, preprocessing, upsampling)


def _film(flags: PredictFlags, job: PredictJob, *, camera: bool) -> tuple[Predictions, float]:
    """Predicts on a video or camera; returns what was done and the seconds it took."""
    target = f"camera_{flags.input}.mp4" if camera else f"{Path(flags.input).stem}.mp4"
    with open_video(flags.input, camera) as video, progress_bar("predicting") as advance:
        # Refuse to overwrite the source before its first frame is read.
        check_sources_kept([Path(flags.input)], job.folder, job.kinds, [target])
        check_writable(job.folder)

        start = perf_counter()
        done = predict_video(job, video, target, flags.max_frames, advance)
        return done, perf_counter() - start


def _photograph(flags: PredictFlags, job: PredictJob) -> tuple[Predictions, float]:
    """Predicts on an image or a folder of them; returns what was done and the seconds it took."""
    images, num_others = find_images(flags.input, flags.save_dir)
    paths, targets = [image.path for image in images], [image.target for image in images]
    check_sources_kept(paths, job.folder, job.kinds, targets)
    check_writable(job.folder)

    # The time covers reading, the network and writing.
    start = perf_counter()
    with progress_bar("predicting") as advance:
        done = predict_images(job, images, flags.skip_bad, advance)
    seconds = perf_counter() - start

    if num_others:
        done.notes.append(
            f"{number_of(num_others, 'other file')} in {flags.input} left out: no images."
        )
    return done, seconds


def _show_shares(record: dict[str, Any], names: tuple[str, ...]) -> None:
    rows = []
    for k, percent in sorted(record["percent"].items(), key=lambda share: -share[1]):
        name = names[int(k)]
        rows.append([k if name == k else f"{k} {name}", f"{percent:.2f}"])
    show_table(f"{record['name']}: class shares", ["class", "% of pixels"], rows)


def _show_paths(job: PredictJob, done: Predictions) -> None:
    """Prints the files if there was one input, else the folders."""
    only = done.records[0]["file"] if len(done.records) == 1 else ""
    paths = [job.folder / kind / only for kind in job.kinds]
    paths += [job.folder / "legend.png", job.folder / RECORD]
    console.print("Saved: " + "\n       ".join(map(str, paths)), soft_wrap=True)
