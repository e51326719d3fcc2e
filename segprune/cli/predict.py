"""`segprune predict FILE --input X`: pictures, folders, videos and cameras segmented, and drawn to look at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
from torch import Tensor
from typer import Argument, Option

from segprune import checkpoint
from segprune.checkpoint import Checkpoint
from segprune.cli.console import choose_device, console, progress_bar, show_notes, show_settings, show_table
from segprune.cli.flags import switch
from segprune.data import voc_palette
from segprune.files import atomic_path, check_writable, write_json
from segprune.inference.draw import legend
from segprune.inference.inputs import check_not_overwritten, find_pictures, kind_of
from segprune.inference.label_maps import MODES, EvalMode, Network
from segprune.inference.predict import KINDS, Done, Job, predict_pictures, predict_video
from segprune.inference.video import open_video
from segprune.model import SegFormer, check_input

RECORD = "predictions.json"
AMPS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_CLASSES = 256  # that a palette PNG can tell apart


@dataclass(frozen=True)
class PredictConfig:
    model_path: Annotated[
        str, Argument(metavar="FILE", help=".pth, .pt, .safetensors, a Hugging Face folder or hub name.")
    ]
    input: Annotated[
        str, Option("--input", metavar="X", help="Picture, folder of pictures, video file, or number of a camera.")
    ]
    save_dir: Annotated[str, Option("--save_dir", help="Folder for what is written.")] = "predictions"
    kind: Annotated[str, Option("--kind", help="What is written: overlay, mask, side_by_side or all.")] = "overlay"
    alpha: Annotated[float, Option("--alpha", min=0.0, max=1.0, help="Share of the colours in an overlay.")] = 0.5
    mode: Annotated[
        str,
        Option(
            "--mode",
            help="letterbox: fitted into --input_shape; whole: at its own size; slide: in windows of --input_shape.",
        ),
    ] = "letterbox"
    input_shape: Annotated[
        tuple[int, int], Option("--input_shape", metavar="H W", help="Size of the letterbox or of the window.")
    ] = (512, 512)
    batch_size: Annotated[int, Option("--batch_size", min=1, help="Pictures or frames at a time.")] = 8
    num_workers: Annotated[int, Option("--num_workers", min=1, help="Threads that load and write pictures.")] = 4
    amp: Annotated[str, Option("--amp", help="Mixed precision: no, fp16 or bf16.")] = "no"
    cuda: Annotated[bool, switch("--cuda", "Use the GPU.")] = False
    max_frames: Annotated[int | None, Option("--max_frames", min=1, help="Of a video or camera.")] = None
    skip_bad: Annotated[bool, switch("--skip_bad", "Go on without pictures that cannot be read.")] = False
    classes: Annotated[
        str, Option("--classes", metavar="PATH", help="Text file with a class name per line; else the checkpoint's.")
    ] = ""
    dialect: Annotated[str | None, Option("--dialect", help="Overrules the dialect that is recognised.")] = None


def run(config: PredictConfig, given: frozenset[str]) -> None:
    """Segment pictures, a video or what a camera sees, and write overlays, masks or both side by side.

    The labels are those of the original pixels. Masks are palette PNGs whose values are the classes. Ctrl-C ends a
    camera's film.
    """
    source = kind_of(config.input)
    _check_choices(config)
    _check_effects(config, given, source)
    check_input((1, 3, *config.input_shape))
    device = choose_device(config.cuda)
    found = checkpoint.read(config.model_path, dialect=config.dialect)
    names, palette = class_names(config, found), palette_in(found, config.model_path) or list(voc_palette())
    read = {"dialect": found.dialect, "variant": found.spec.variant, "num_classes": found.spec.num_classes}
    show_settings("Prediction", asdict(config) | read)
    show_notes(found.notes)
    job = Job(
        network=_network(checkpoint.build(found), device, config),
        how=EvalMode(mode=config.mode, input_shape=config.input_shape),  # type: ignore[arg-type]
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        kinds=KINDS if config.kind == "all" else (config.kind,),
        alpha=config.alpha,
        palette=palette,
        folder=Path(config.save_dir),
    )
    done, seconds = _predicted(config, source, job)
    _finish(config, source, job, done, names, seconds)


def _network(model: SegFormer, device: torch.device, config: PredictConfig) -> Network:
    """The checkpoint's network, in mixed precision if asked for; ValueError for logits that are no numbers."""
    model, amp = model.to(device), AMPS[config.amp]

    def predict(pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits = model(pixels).float()
        if not logits.isfinite().all():
            raise ValueError(
                "The network gives logits that are NaN or infinite; leave out --amp, or give another checkpoint."
            )
        return logits

    return Network(predict, model.spec.num_classes, device, config.batch_size)


def _check_choices(config: PredictConfig) -> None:
    for flag, value, allowed in (
        ("kind", config.kind, (*KINDS, "all")),
        ("mode", config.mode, MODES),
        ("amp", config.amp, tuple(AMPS)),
    ):
        if value not in allowed:
            raise ValueError(f"--{flag} {value} is unknown; choose one of {', '.join(allowed)}.")


def _check_effects(config: PredictConfig, given: frozenset[str], source: str) -> None:
    """ValueError for a flag that was given and would change nothing."""
    moving = source in ("video", "camera")
    for flag, without_effect, where in (
        ("alpha", config.kind not in ("overlay", "all"), f"with --kind {config.kind}"),
        ("input_shape", config.mode == "whole", "with --mode whole"),
        ("max_frames", not moving, "on pictures"),
        ("num_workers", moving, "on a video"),
        ("skip_bad", source != "folder", "without a folder of pictures"),
    ):
        if flag in given and without_effect:
            raise ValueError(f"--{flag} has no effect {where}; leave it out.")


def class_names(config: PredictConfig, found: Checkpoint) -> tuple[str, ...]:
    """From --classes, else the checkpoint's extra, else numbers; ValueError where they are not one per class."""
    number = found.spec.num_classes
    if number > MAX_CLASSES:
        raise ValueError(f"The network has {number} classes, where masks can hold {MAX_CLASSES}; give another network.")
    names: Any
    if config.classes:
        names, remedy = _lines(Path(config.classes)), "give one name per line, in the order of the classes"
    else:
        names, remedy = found.extra.get("class_names"), "give a file with one name per line as --classes"
    if names is None:
        return tuple(map(str, range(number)))
    if not isinstance(names, list) or len(names) != number or not all(isinstance(name, str) for name in names):
        here = f"has {len(names)} class names" if isinstance(names, list) else "has class names that are no list"
        raise ValueError(f"{config.classes or config.model_path} {here}, where the network has {number}; {remedy}.")
    return tuple(names)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a text file with one class name per line.")
    try:
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, the only encoding read; save it as UTF-8.") from error


def palette_in(found: Checkpoint, path: str) -> list[int]:
    """The colours that a checkpoint brings along, empty where it has none; ValueError where they are not 768."""
    palette = found.extra.get("palette")
    if palette is None:
        return []
    numbers = palette if isinstance(palette, list) else []
    if len(numbers) != 768 or not all(isinstance(number, int) and 0 <= number <= 255 for number in numbers):
        raise ValueError(
            f"{path} has a palette that is not 768 numbers in 0..255; save it again with a whole one, or without."
        )
    return numbers


def _predicted(config: PredictConfig, source: str, job: Job) -> tuple[Done, float]:
    """What was done, and the seconds it took."""
    if source in ("video", "camera"):
        camera = source == "camera"
        target = f"camera_{config.input}.mp4" if camera else f"{Path(config.input).stem}.mp4"
        with open_video(config.input, camera) as video:
            check_not_overwritten([Path(config.input)], job.folder, job.kinds, [target])
            check_writable(job.folder)
            start = perf_counter()
            with progress_bar("predicting") as advance:
                done = predict_video(job, video, target, config.max_frames, advance)
            return done, perf_counter() - start
    pictures, others = find_pictures(config.input, config.save_dir)
    check_not_overwritten(
        [picture.path for picture in pictures], job.folder, job.kinds, [picture.target for picture in pictures]
    )
    check_writable(job.folder)
    start = perf_counter()
    with progress_bar("predicting") as advance:
        done = predict_pictures(job, pictures, config.skip_bad, advance)
    if others:
        done.notes.append(f"{others} other files in {config.input} are no pictures and were left out.")
    return done, perf_counter() - start


def _finish(config: PredictConfig, source: str, job: Job, done: Done, names: tuple[str, ...], seconds: float) -> None:
    """Legend and record written, and what came of it printed; KeyboardInterrupt with a message if Ctrl-C came."""
    what = "frames" if source in ("video", "camera") else "pictures"
    number = sum(record.get("frames", 1) for record in done.records)
    if not number:
        if done.interrupted:
            raise KeyboardInterrupt(f"Interrupted before any of the {what} was written.")
        raise ValueError(f"None of the pictures could be read, the first because: {done.skipped[0]['reason']}")
    with atomic_path(job.folder / "legend.png") as temporary:
        legend(names, job.palette, done.counts.nonzero()[0].tolist()).save(temporary, format="PNG")
    record = {"settings": asdict(config), "num_classes": job.network.num_classes, "class_names": list(names)}
    speed = {"seconds": seconds, f"{what}_per_second": number / seconds}
    write_json(record | speed | {"results": done.records, "skipped": done.skipped}, job.folder / RECORD)
    if len(done.records) == 1:
        _show_shares(done.records[0], names)
    if done.skipped:
        first = ", ".join(bad["name"] for bad in done.skipped[:3]) + (", …" if len(done.skipped) > 3 else "")
        done.notes.append(f"{len(done.skipped)} pictures could not be read and were skipped: {first}")
    show_notes(tuple(done.notes))
    console.print(f"{number} {what} in {seconds:.1f} s, {number / seconds:.1f} {what} per second.")
    _show_files(job, done)
    if done.interrupted:
        raise KeyboardInterrupt(f"Interrupted after {number} {what}; what was written until then is whole.")


def _show_shares(record: dict[str, Any], names: tuple[str, ...]) -> None:
    shares = sorted(record["percent"].items(), key=lambda share: -share[1])
    rows = [[k if names[int(k)] == k else f"{k} {names[int(k)]}", f"{percent:.2f}"] for k, percent in shares]
    show_table(f"{record['name']}: class shares", ["class", "% of pixels"], rows)


def _show_files(job: Job, done: Done) -> None:
    """Each picture by name if it is the only one, else the folders."""
    only = done.records[0]["file"] if len(done.records) == 1 else ""
    paths = [job.folder / kind / only for kind in job.kinds]
    paths += [job.folder / "legend.png", job.folder / RECORD]
    console.print("Saved: " + "\n       ".join(map(str, paths)), soft_wrap=True, markup=False)
