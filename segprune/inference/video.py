"""Videos and cameras read and written with OpenCV, an optional extra.

Frames are uint8 [H, W, 3] RGB. Files are written as MPEG-4 in .mp4, without sound. Their sides must be even, so the
last row or column of an odd frame is doubled.
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

DEFAULT_FPS = 25.0  # for cameras and files that do not tell their own


@dataclass(frozen=True)
class Frame:
    """`seconds` is when a camera's frame came, counted from its first one; None for frames of a file."""

    image: Bytes
    seconds: float | None


@dataclass(frozen=True)
class Video:
    """An open video or camera. `num_frames` is what a file's header says; None if it says nothing."""

    name: str
    fps: float
    num_frames: int | None
    live: bool
    capture: Any

    def batches(self, size: int, limit: int | None) -> Generator[list[Frame]]:
        """Yields frames in lists of `size`, at most `limit` frames; a thread reads the next list meanwhile."""
        frames = islice(self._read_frames(), limit)

        # One thread alone reads, since frames must come in order.
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(lambda: list(islice(frames, size)))
            while batch := pending.result():
                # Ask for the next list before handing this one over, so both work at once.
                pending = pool.submit(lambda: list(islice(frames, size)))
                yield batch

    def _read_frames(self) -> Iterator[Frame]:
        start = None
        while True:
            there, frame = self.capture.read()
            if not there:
                return

            # A camera's time counts from its first frame, not from when it was opened.
            start = start or perf_counter()
            seconds = perf_counter() - start if self.live else None
            yield Frame(np.ascontiguousarray(frame[..., ::-1]), seconds)  # BGR -> RGB


@contextmanager
def open_video(source: str, camera: bool) -> Iterator[Video]:
    """Opens a video file or a camera. ImportError without OpenCV; ValueError if it cannot be opened."""
    cv2 = _import_opencv()
    with closing(_Released(cv2.VideoCapture(int(source) if camera else source))) as opened:
        capture = opened.device
        if not capture.isOpened() and camera:
            raise ValueError(
                f"Camera {source} cannot be opened; check that it is connected and that no other program uses it, "
                "or give another number."
            )
        if not capture.isOpened():
            raise ValueError(
                f"{source} cannot be read as a video; replace the file, or convert it to .mp4."
            )

        # Both are 0 or nonsense where the file or the camera does not say.
        fps = capture.get(cv2.CAP_PROP_FPS)
        frames = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        yield Video(
            name=f"camera {source}" if camera else source,
            fps=fps if 0 < fps < 1000 else DEFAULT_FPS,
            num_frames=int(frames) if frames > 0 and not camera else None,
            live=camera,
            capture=capture,
        )


@contextmanager
def write_video(
    path: Path, fps: float, size: tuple[int, int]
) -> Iterator[Callable[[Bytes], None]]:
    """Yields `write(frame)` for frames of `size` (H, W); the file is whole on success, and absent on failure.

    OSError if it cannot be written.
    """
    cv2 = _import_opencv()
    # The codec takes even sides only; odd ones get their last row or column twice.
    odd = (size[0] % 2, size[1] % 2)
    even = (size[0] + odd[0], size[1] + odd[1])
    num_written = 0

    with atomic_path(path) as temporary:
        unfinished = temporary.with_name(
            f"{temporary.name}.mp4"
        )  # OpenCV takes the format from the ending
        try:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            with closing(
                _Released(cv2.VideoWriter(str(unfinished), code, fps, even[::-1]))
            ) as opened:

                def write(frame: Bytes) -> None:
                    nonlocal num_written
                    padded = np.pad(frame, [(0, odd[0]), (0, odd[1]), (0, 0)], mode="edge")
                    opened.device.write(padded[..., ::-1])  # RGB -> BGR
                    num_written += 1

                yield write

            # OpenCV does not report a full disk, so count what can be read again.
            if _count_frames(unfinished) != num_written:
                raise OSError("the video did not get onto the disk whole")
            unfinished.replace(temporary)
        finally:
            unfinished.unlink(missing_ok=True)


class _Released:
    """Lets `contextlib.closing` close an OpenCV device, which calls it release."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def close(self) -> None:
        self.device.release()


def _count_frames(path: Path) -> int:
    cv2 = _import_opencv()
    with closing(_Released(cv2.VideoCapture(str(path)))) as opened:
        return int(opened.device.get(cv2.CAP_PROP_FRAME_COUNT))


def _import_opencv() -> Any:
    """Returns the module with its own messages switched off; ours say the same in one sentence."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "Videos and cameras need OpenCV, which is not installed; run: pip install opencv-python-headless==5.0.0.93"
        ) from error
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
