"""Pictures and videos through a network and into files: masks, overlays, side by side.

Pictures are loaded and written by threads while the network runs. Every file is written whole or not at all; Ctrl-C
leaves what was finished and says so.
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

from segprune.data.transforms import Bytes
from segprune.files import atomic_path
from segprune.inference.draw import mask_image, overlay, paint, side_by_side
from segprune.inference.inputs import Loaded, Picture, load_picture, made_ready
from segprune.inference.label_maps import EvalMode, Network, label_maps
from segprune.inference.video import Frame, Video, write_video

Counts = npt.NDArray[np.int64]  # pixels per class
Progress = Callable[[int, int], None]  # pictures done, pictures in all
VideoProgress = Callable[[int, int | None], None]  # frames done, frames in all if known
KINDS = ("overlay", "mask", "side_by_side")


@dataclass(frozen=True)
class Job:
    """What is done with every picture: `how` it goes through the network, and what is written of it."""

    network: Network
    how: EvalMode
    batch_size: int
    num_workers: int
    kinds: tuple[str, ...]
    alpha: float
    palette: list[int]
    folder: Path


@dataclass
class Done:
    """Grows while a run goes on: a record per picture or video, pixels per class, pictures skipped, what to note."""

    counts: Counts
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def add(self, record: dict[str, Any], counts: Counts) -> None:
        shares = 100 * counts / counts.sum()
        percent = {str(k): round(float(share), 4) for k, share in enumerate(shares) if share > 0}
        self.records.append(record | {"percent": percent})
        self.counts += counts


def predict(job: Job, batch: Sequence[Loaded]) -> list[Bytes]:
    """The labels [H, W] of every picture in its own size."""
    with torch.inference_mode():
        maps = label_maps(job.network, [one.ready for one in batch], job.how)
    return [found.cpu().numpy() for found in maps]


def draw(job: Job, kind: str, image: Bytes, labels: Bytes) -> Bytes:
    """One of KINDS as RGB [H, W, 3]."""
    if kind == "overlay":
        return overlay(image, labels, job.palette, job.alpha)
    painted = paint(labels, job.palette)
    return painted if kind == "mask" else side_by_side(image, painted)


def predict_pictures(
    job: Job, pictures: Sequence[Picture], skip_bad: bool = False, progress: Progress | None = None
) -> Done:
    """Files KIND/TARGET below the job's folder, and a record per picture in their order.

    ValueError names a picture that cannot be read, unless those are skipped.
    """
    done = Done(_no_pixels(job))
    writing: deque[Future[tuple[dict[str, Any], Counts]]] = deque()
    with ThreadPoolExecutor(job.num_workers) as pool:
        try:
            for seen, batch in _loaded(job, pictures, pool):
                bad = [(picture, reason) for picture, reason in batch if isinstance(reason, str)]
                if bad and not skip_bad:
                    advice = ", or leave it out with --skip_bad." if len(pictures) > 1 else "."
                    raise ValueError(bad[0][1].removesuffix(".") + advice)
                done.skipped += [{"name": picture.name, "reason": reason} for picture, reason in bad]
                whole = [(picture, one) for picture, one in batch if isinstance(one, Loaded)]
                labels = predict(job, [one for _, one in whole])
                _collect(writing, done, leave=job.batch_size)  # only so many pictures lie in memory
                for (picture, one), found in zip(whole, labels, strict=True):
                    writing.append(pool.submit(_write, job, picture, one.image, found))
                if progress is not None:
                    progress(seen, len(pictures))
            _collect(writing, done)
        except KeyboardInterrupt:
            done.interrupted = True
            pool.shutdown(cancel_futures=True)
            _collect(writing, done)
    return done


def _no_pixels(job: Job) -> Counts:
    return np.zeros(job.network.num_classes, dtype=np.int64)


def _collect(writing: deque[Future[tuple[dict[str, Any], Counts]]], done: Done, leave: int = 0) -> None:
    """Wait for all that is written but the last `leave`; what was cancelled leaves nothing."""
    while len(writing) > leave:
        if not writing[0].cancelled():
            done.add(*writing[0].result())
        writing.popleft()


def _loaded(
    job: Job, pictures: Sequence[Picture], pool: ThreadPoolExecutor
) -> Iterator[tuple[int, list[tuple[Picture, Loaded | str]]]]:
    """Pictures seen so far, and a batch of them: each loaded, or why it cannot be; the next batch is loaded ahead."""

    def load(picture: Picture) -> Loaded | str:
        try:
            return load_picture(picture.path, job.how)
        except (ValueError, OSError) as error:
            return str(error)

    ahead: deque[tuple[int, list[tuple[Picture, Future[Loaded | str]]]]] = deque()
    for start in range(0, len(pictures), job.batch_size):
        batch = pictures[start : start + job.batch_size]
        ahead.append((start + len(batch), [(picture, pool.submit(load, picture)) for picture in batch]))
        if len(ahead) > 1:
            seen, futures = ahead.popleft()
            yield seen, [(picture, future.result()) for picture, future in futures]
    for seen, futures in ahead:
        yield seen, [(picture, future.result()) for picture, future in futures]


def _write(job: Job, picture: Picture, image: Bytes, labels: Bytes) -> tuple[dict[str, Any], Counts]:
    """The picture's files; its record and pixels per class."""
    for kind in job.kinds:
        # the mask's values are the classes, so it is no RGB
        drawn = mask_image(labels, job.palette) if kind == "mask" else Image.fromarray(draw(job, kind, image, labels))
        with atomic_path(job.folder / kind / picture.target) as temporary:
            drawn.save(temporary, format="PNG", compress_level=3)  # twice as fast as 6, a tenth larger
    record = {"name": picture.name, "file": picture.target, "size": list(labels.shape)}
    return record, np.bincount(labels.ravel(), minlength=job.network.num_classes)


def predict_video(
    job: Job, video: Video, target: str, limit: int | None, progress: VideoProgress | None = None
) -> Done:
    """Files KIND/TARGET below the job's folder, and one record. Ctrl-C closes them after the last whole frame.

    A camera's frames are repeated where the network is slower than it, so that the file plays at its own speed.
    ValueError for a video without a frame.
    """
    done = Done(_no_pixels(job))
    total = video.num_frames if limit is None or video.num_frames is None else min(limit, video.num_frames)
    counts = _no_pixels(job)
    with ExitStack() as files:
        batches = files.enter_context(closing(video.batches(job.batch_size, limit)))
        out = _VideoFiles(job, video.fps, target, files)
        try:
            for batch in batches:
                labels = predict(job, [made_ready(frame.image, job.how) for frame in batch])
                for frame, found in zip(batch, labels, strict=True):
                    out.add(frame, found)
                    counts += np.bincount(found.ravel(), minlength=job.network.num_classes)
                if progress is not None:
                    progress(out.frames, total or limit)
        except KeyboardInterrupt:
            done.interrupted = True
    if out.frames:
        size = list(out.size)
        done.add({"name": video.name, "file": target, "size": size, "frames": out.frames, "fps": video.fps}, counts)
    elif not done.interrupted:
        raise ValueError(f"No frame of {video.name} could be read; {_remedy(video)}.")
    if total is not None and not done.interrupted and out.frames < 0.99 * total:
        done.notes.append(f"Only {out.frames} of {total} frames of {video.name} could be read; it seems to be cut off.")
    return done


def _remedy(video: Video) -> str:
    return "see to it that no other program uses it" if video.live else "replace the file, or convert it to .mp4"


class _VideoFiles:
    """One file per kind, opened with the first frame, whose size all of them have."""

    def __init__(self, job: Job, fps: float, target: str, files: ExitStack) -> None:
        self.job, self.fps, self.target, self.files = job, fps, target, files
        self.writers: dict[str, Callable[[Bytes], None]] = {}
        self.size: tuple[int, ...] = ()
        self.frames = self.written = 0

    def add(self, frame: Frame, labels: Bytes) -> None:
        copies = _copies(frame, self.fps, self.written)
        self.size = labels.shape
        for kind in self.job.kinds:
            drawn = draw(self.job, kind, frame.image, labels)
            if kind not in self.writers:
                path = self.job.folder / kind / self.target
                self.writers[kind] = self.files.enter_context(write_video(path, self.fps, drawn.shape[:2]))
            for _ in range(copies):
                self.writers[kind](drawn)
        self.frames += 1
        self.written += copies


def _copies(frame: Frame, fps: float, written: int) -> int:
    """How often a frame is written: once, a camera's until the file is as long as it has been running."""
    return 1 if frame.seconds is None else max(1, round(frame.seconds * fps) + 1 - written)
