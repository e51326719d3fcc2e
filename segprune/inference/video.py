"""Videos and cameras read and written with OpenCV, an optional extra.

Frames are uint8 [H, W, 3] RGB. What is written is MPEG-4 in .mp4, without sound; its sides are even, so the last row
or column of an odd one is doubled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from segprune.data.transforms import Bytes
from segprune.files import atomic_path

DEFAULT_FPS = 25.0  # where a camera or file does not tell its own


@dataclass(frozen=True)
class Frame:
    """`seconds` is when a camera's frame came, from the first on; a file's frames have None."""

    image: Bytes
    seconds: float | None


@dataclass(frozen=True)
class Video:
    """An open video or camera. `num_frames` is what a file's header says, None if it says nothing."""

    name: str
    fps: float
    num_frames: int | None
    live: bool
    capture: Any

    def batches(self, size: int, limit: int | None) -> Generator[list[Frame]]:
        """Frames in lists of `size`, at most `limit` of them; a thread reads on meanwhile."""
        frames = islice(self._frames(), limit)
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(lambda: list(islice(frames, size)))
            while batch := pending.result():
                pending = pool.submit(lambda: list(islice(frames, size)))
                yield batch

    def _frames(self) -> Iterator[Frame]:
        start = None
        while True:
            there, frame = self.capture.read()
            if not there:
                return
            start = start or perf_counter()
            yield Frame(np.ascontiguousarray(frame[..., ::-1]), perf_counter() - start if self.live else None)


@contextmanager
def open_video(source: str, camera: bool) -> Iterator[Video]:
    """ImportError without OpenCV; ValueError for a file that is no video and a camera that is not there."""
    cv2 = _opencv()
    with closing(_Released(cv2.VideoCapture(int(source) if camera else source))) as opened:
        capture = opened.device
        if not capture.isOpened():
            raise ValueError(
                f"Camera {source} cannot be opened; see to it that it is connected and that no other program uses it, "
                "or give another number."
                if camera
                else f"{source} cannot be read as a video; replace the file, or convert it to .mp4."
            )
        fps, frames = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        yield Video(
            name=f"camera {source}" if camera else source,
            fps=fps if 0 < fps < 1000 else DEFAULT_FPS,
            num_frames=int(frames) if frames > 0 and not camera else None,
            live=camera,
            capture=capture,
        )


@contextmanager
def write_video(path: Path, fps: float, size: tuple[int, int]) -> Iterator[Callable[[Bytes], None]]:
    """Yields `write(frame)` for frames of `size` (H, W); on success the file is whole, on failure there is none.

    OSError if it cannot be written.
    """
    cv2 = _opencv()
    even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
    written = 0
    with atomic_path(path) as temporary:
        unfinished = temporary.with_name(f"{temporary.name}.mp4")  # OpenCV goes by the ending
        try:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            with closing(_Released(cv2.VideoWriter(str(unfinished), code, fps, even[::-1]))) as opened:

                def write(frame: Bytes) -> None:
                    nonlocal written
                    padding = [(0, even[i] - size[i]) for i in (0, 1)]
                    opened.device.write(np.pad(frame, [*padding, (0, 0)], mode="edge")[..., ::-1])
                    written += 1

                yield write
            if _frames_in(unfinished) != written:  # of a full disk OpenCV tells nobody
                raise OSError("the video did not get onto the disk whole")
            unfinished.replace(temporary)
        finally:
            unfinished.unlink(missing_ok=True)


class _Released:
    """Gives `closing` what it closes: OpenCV's own name for it is release."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def close(self) -> None:
        self.device.release()


def _frames_in(path: Path) -> int:
    cv2 = _opencv()
    with closing(_Released(cv2.VideoCapture(str(path)))) as opened:
        return int(opened.device.get(cv2.CAP_PROP_FRAME_COUNT))


def _opencv() -> Any:
    """The module, its own messages switched off: they say in many lines what we say in one sentence."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "Videos and cameras need OpenCV, which is not installed; run: pip install opencv-python-headless==5.0.0.93"
        ) from error
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
