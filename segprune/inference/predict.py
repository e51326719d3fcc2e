"""Images and videos through a network and into files: masks, overlays, side by side.

Threads load and write images while the network runs. Every file is written whole or not at all; Ctrl-C keeps what
was finished and is reported in the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from segprune.data.pixels import fit_channels
from segprune.data.transforms import Bytes
from segprune.files import atomic_path
from segprune.inference.draw import mask_image, overlay, paint, side_by_side
from segprune.inference.inputs import ImageFile, LoadedImage, read_image
from segprune.inference.label_maps import EvalMode, Network, label_maps, prepare
from segprune.inference.video import Frame, Video, write_video

Counts = npt.NDArray[np.int64]  # pixels per class
Progress = Callable[[int, int], None]  # images done, images in all
VideoProgress = Callable[[int, int | None], None]  # frames done, frames in all if that is known
KINDS = ("overlay", "mask", "side_by_side")


@dataclass(frozen=True)
class PredictJob:
    """What is done with every image: `how` it goes through the network, and which kinds of files are written."""

    network: Network
    how: EvalMode
    batch_size: int
    num_workers: int
    kinds: tuple[str, ...]
    alpha: float
    palette: list[int]
    folder: Path

    def count(self, labels: Bytes) -> Counts:
        """Returns the pixels per class."""
        return np.bincount(labels.ravel(), minlength=self.network.num_classes)

    def no_pixels(self) -> Counts:
        return np.zeros(self.network.num_classes, dtype=np.int64)


@dataclass
class Predictions:
    """What a run has done so far: a record per image or video, pixels per class, images skipped, and notes."""

    counts: Counts
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def add(self, record: dict[str, Any], counts: Counts) -> None:
        shares = 100 * counts / counts.sum()
        percent = {
            str(k): round(float(share), 4) for k, share in enumerate(shares) if share > 0
        }
        self.records.append(record | {"percent": percent})
        self.counts += counts


def predict_labels(job: PredictJob, batch: Sequence[LoadedImage]) -> list[Bytes]:
    """Returns the labels [H, W] of every image in its own size."""
    with torch.inference_mode():
        maps = label_maps(job.network, [loaded.prepared for loaded in batch], job.how)
    return [labels.cpu().numpy() for labels in maps]


def draw_kind(job: PredictJob, kind: str, image: Bytes, labels: Bytes) -> Bytes:
    """Draws one of KINDS as RGB [H, W, 3]."""
    if kind == "overlay":
        return overlay(image, labels, job.palette, job.alpha)
    painted = paint(labels, job.palette)
    return painted if kind == "mask" else side_by_side(image, painted)


def predict_images(
    job: PredictJob,
    images: Sequence[ImageFile],
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Predictions:
    """Writes the files KIND/TARGET below the job's folder; returns a record per image in their order.

    An image that cannot be read is listed as skipped with `skip_bad`; otherwise ValueError names it.
    """
    # Reading, predicting and writing overlap: each works on another batch.
    done = Predictions(job.no_pixels())
    writing: deque[Future[tuple[dict[str, Any], Counts]]] = deque()

    with ThreadPoolExecutor(job.num_workers) as pool:
        try:
            for seen, batch in _read_ahead(job, images, pool):
                # Sort out unreadable files; the reason came in place of the image.
                readable = []
                for image, loaded in batch:
                    if isinstance(loaded, LoadedImage):
                        readable.append((image, loaded))
                    elif skip_bad:
                        done.skipped.append({"name": image.name, "reason": loaded})
                    else:
                        advice = (
                            ", or leave it out with `skip_bad`." if len(images) > 1 else "."
                        )
                        raise ValueError(loaded.removesuffix(".") + advice)

                labels = predict_labels(job, [loaded for _, loaded in readable])

                # Wait for earlier files, so that at most one batch of images waits in memory to be written.
                _collect(writing, done, leave=job.batch_size)
                for (image, loaded), own in zip(readable, labels, strict=True):
                    writing.append(pool.submit(_write_files, job, image, loaded.image, own))

                if progress is not None:
                    progress(seen, len(images))
            _collect(writing, done)
        except KeyboardInterrupt:
            # Finish the files that are being written; those not begun leave no record.
            done.interrupted = True
            pool.shutdown(cancel_futures=True)
            _collect(writing, done)
    return done


def _collect(
    writing: deque[Future[tuple[dict[str, Any], Counts]]], done: Predictions, leave: int = 0
) -> None:
    """Waits for all files but the last `leave` and adds their records; what was cancelled leaves no record."""
    while len(writing) > leave:
        if not writing[0].cancelled():
            done.add(*writing[0].result())
        writing.popleft()


def _read_ahead(
    job: PredictJob, images: Sequence[ImageFile], pool: ThreadPoolExecutor
) -> Iterator[tuple[int, list[tuple[ImageFile, LoadedImage | str]]]]:
    """Yields how many images were seen, and a batch of them: each loaded, or why it cannot be read.

    The batch after it is being loaded meanwhile.
    """

    channels = job.network.preprocessing.num_channels

    def load(image: ImageFile) -> LoadedImage | str:
        # Return the reason, since whether a file may be skipped is for the caller to say.
        try:
            return read_image(image.path, job.how, channels)
        except (ValueError, OSError) as error:
            return str(error)

    # Two batches at most are in memory: one that is predicted and one that is being read.
    ahead: deque[tuple[int, list[tuple[ImageFile, Future[LoadedImage | str]]]]] = deque()
    starts = [
        *range(0, len(images), job.batch_size),
        None,
    ]  # None: nothing more to load, only to yield
    for start in starts:
        if start is not None:
            # Start loading this batch before the one before it is yielded.
            batch = images[start : start + job.batch_size]
            ahead.append(
                (start + len(batch), [(image, pool.submit(load, image)) for image in batch])
            )
        if ahead and (start is None or len(ahead) > 1):
            seen, futures = ahead.popleft()
            yield seen, [(image, future.result()) for image, future in futures]


def _write_files(
    job: PredictJob, image: ImageFile, pixels: Bytes, labels: Bytes
) -> tuple[dict[str, Any], Counts]:
    """Writes the image's files; returns its record and its pixels per class."""
    for kind in job.kinds:
        # A mask keeps its classes as pixel values, so it is a palette image and no RGB.
        if kind == "mask":  # noqa: SIM108
            drawn = mask_image(labels, job.palette)
        else:
            drawn = Image.fromarray(draw_kind(job, kind, pixels, labels))
        with atomic_path(job.folder / kind / image.target) as temporary:
            drawn.save(
                temporary, format="PNG", compress_level=3
            )  # twice as fast as level 6, a tenth larger

    return {"name": image.name, "file": image.target, "size": list(labels.shape)}, job.count(
        labels
    )


def predict_video(
    job: PredictJob,
    video: Video,
    target: str,
    limit: int | None,
    progress: VideoProgress | None = None,
) -> Predictions:
    """Writes the files KIND/TARGET below the job's folder; returns one record. Reads `limit` frames at most.

    Ctrl-C closes the files after the last whole frame. Where the network is slower than a camera, its frames are
    repeated, so that the file plays at the camera's speed. ValueError for a video without a frame.
    """
    done = Predictions(job.no_pixels())
    counts = job.no_pixels()
    channels = job.network.preprocessing.num_channels
    # Known from the file's header; a camera has no end.
    total = (
        video.num_frames
        if limit is None or video.num_frames is None
        else min(limit, video.num_frames)
    )

    # However this ends, the stack closes the files, so that they can be played.
    with ExitStack() as files:
        batches = files.enter_context(closing(video.batches(job.batch_size, limit)))
        out = _VideoFiles(job, video.fps, target, files)
        try:
            for batch in batches:
                loaded = []
                for frame in batch:
                    pixels = fit_channels(frame.image, channels, video.name)
                    loaded.append(LoadedImage(frame.image, prepare(pixels, job.how)))
                for frame, labels in zip(batch, predict_labels(job, loaded), strict=True):
                    out.add(frame, labels)
                    counts += job.count(labels)
                if progress is not None:
                    progress(out.num_frames, total or limit)
        except KeyboardInterrupt:
            done.interrupted = True

    # A video of no frame is an error, unless the user stopped it before the first one.
    if out.num_frames:
        record = {"name": video.name, "file": target, "size": list(out.size)}
        done.add(record | {"frames": out.num_frames, "fps": video.fps}, counts)
    elif not done.interrupted:
        remedy = (
            "close other programs that use it"
            if video.live
            else "replace the file, or convert it to .mp4"
        )
        raise ValueError(f"No frame of {video.name} could be read; {remedy}.")

    # Headers may be off by a frame or two.
    if total is not None and not done.interrupted and out.num_frames < 0.99 * total:
        read = f"Only {out.num_frames} of {total} frames of {video.name} could be read"
        done.notes.append(f"{read}; it seems to be cut off.")
    return done


class _VideoFiles:
    """One video file per kind; all are opened with the first frame, which decides their size."""

    def __init__(self, job: PredictJob, fps: float, target: str, files: ExitStack) -> None:
        self.job, self.fps, self.target, self.files = job, fps, target, files
        self.writers: dict[str, Callable[[Bytes], None]] = {}
        self.size: tuple[int, ...] = ()
        self.num_frames = 0
        self.num_written = 0

    def add(self, frame: Frame, labels: Bytes) -> None:
        copies = count_copies(frame, self.fps, self.num_written)
        self.size = labels.shape

        for kind in self.job.kinds:
            drawn = draw_kind(self.job, kind, frame.image, labels)
            # A file is opened at its first frame, which tells the size.
            if kind not in self.writers:
                path = self.job.folder / kind / self.target
                self.writers[kind] = self.files.enter_context(
                    write_video(path, self.fps, drawn.shape[:2])
                )
            for _ in range(copies):
                self.writers[kind](drawn)

        self.num_frames += 1
        self.num_written += copies


def count_copies(frame: Frame, fps: float, num_written: int) -> int:
    """Returns how often a frame is written: once; a camera's until the file is as long as it has been running."""
    if frame.seconds is None:
        return 1
    return max(1, round(frame.seconds * fps) + 1 - num_written)
