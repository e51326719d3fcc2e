"""`segprune predict` on videos and cameras, with real files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from segprune.data import draw_shapes
from segprune.data.transforms import Bytes
from segprune.inference.predict import count_copies
from segprune.inference.video import Frame, open_video, write_video
from tests.cli.test_predict import interrupted_at, predicting_on, record_in
from tests.commands import done, invoke, refused

FPS = 12.5
NUM = 10


def film(path: Path, size: tuple[int, int] = (32, 48), num: int = NUM) -> Path:
    with write_video(path, FPS, size) as write:
        for i in range(num):
            write(draw_shapes(5, "val", i, size)[0])
    return path


def frames_of(path: Path) -> list[Bytes]:
    with open_video(str(path), camera=False) as video:
        return [frame.image for batch in video.batches(3, None) for frame in batch]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return film(tmp_path / "clip.mp4")


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (2, 2), (1, 1)])
def test_a_video_comes_back_with_its_frames_speed_and_an_even_size(
    size: tuple[int, int], tmp_path: Path
) -> None:
    image = np.zeros((*size, 3), dtype=np.uint8)
    image[...] = (250, 120, 20)
    with write_video(tmp_path / "a.mp4", 29.97, size) as write:
        for _ in range(7):
            write(image)
    with open_video(str(tmp_path / "a.mp4"), camera=False) as video:
        assert (video.fps, video.num_frames, video.live) == (29.97, 7, False)
    frames = frames_of(tmp_path / "a.mp4")
    assert len(frames) == 7
    assert frames[0].shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert np.abs(frames[3].astype(int) - (250, 120, 20)).max() < 12  # red is still red
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("size", "limit", "sizes"),
    [(4, None, [4, 4, 2]), (4, 6, [4, 2]), (99, None, [10]), (1, 2, [1, 1])],
)
def test_frames_come_in_batches_up_to_the_limit(
    size: int, limit: int | None, sizes: list[int], clip: Path
) -> None:
    with open_video(str(clip), camera=False) as video:
        batches = list(video.batches(size, limit))
    assert [len(batch) for batch in batches] == sizes
    flat = [frame.image for batch in batches for frame in batch]
    assert all(
        np.array_equal(one, other) for one, other in zip(flat, frames_of(clip), strict=False)
    )


def test_a_video_is_written_with_as_many_frames_at_the_same_speed(
    clip: Path, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = done(*predicting_on(clip, small, out, "--kind", "all", "--batch_size", 4))
    for kind, width in (("overlay", 48), ("mask", 48), ("side_by_side", 48 + 8 + 48)):
        with open_video(str(out / kind / "clip.mp4"), camera=False) as video:
            assert (video.fps, video.num_frames) == (FPS, NUM)
        assert frames_of(out / kind / "clip.mp4")[-1].shape == (32, width, 3)
    (record,) = record_in(out)["results"]
    assert (record["name"], record["frames"], record["fps"], record["size"]) == (
        str(clip),
        NUM,
        FPS,
        [32, 48],
    )
    assert sum(record["percent"].values()) == pytest.approx(100, abs=0.01)
    assert f"{clip}: class shares" in said
    assert f"{NUM} frames in " in said
    assert (
        f"Saved: {out}/overlay/clip.mp4 {out}/mask/clip.mp4 {out}/side_by_side/clip.mp4 {out}/legend.png"
        in said
    )


def test_a_side_by_side_shows_the_film_and_its_mask(
    clip: Path, small: Path, tmp_path: Path
) -> None:
    done(*predicting_on(clip, small, tmp_path, "--kind", "side_by_side"))
    done(*predicting_on(clip, small, tmp_path, "--kind", "mask"))
    masks, film_frames = frames_of(tmp_path / "mask/clip.mp4"), frames_of(clip)
    for frame, source, mask in zip(
        frames_of(tmp_path / "side_by_side/clip.mp4"), film_frames, masks, strict=True
    ):
        assert (
            np.abs(frame[:, :40].astype(int) - source[:, :40]).mean() < 12
        )  # what compression leaves
        assert np.abs(frame[:, -40:].astype(int) - mask[:, -40:]).mean() < 25


def test_only_so_many_frames_are_read(clip: Path, small: Path, tmp_path: Path) -> None:
    said = done(*predicting_on(clip, small, tmp_path, "--max_frames", 3))
    assert "3 frames in " in said
    assert "cut off" not in said
    assert len(frames_of(tmp_path / "overlay/clip.mp4")) == 3


def test_ctrl_c_closes_the_film_after_the_last_whole_frame(
    clip: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_at(3, monkeypatch)
    status, said, errors = invoke(
        *predicting_on(clip, small, tmp_path / "out", "--batch_size", 2)
    )
    assert (status, errors) == (
        130,
        "Interrupted after 4 frames; what was written until then is whole.\n",
    )
    assert len(frames_of(tmp_path / "out/overlay/clip.mp4")) == 4
    assert f"{tmp_path}/out/overlay/clip.mp4" in said


def test_ctrl_c_before_the_first_frame_leaves_no_film(
    clip: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_at(1, monkeypatch)
    status, _, errors = invoke(*predicting_on(clip, small, tmp_path / "out"))
    assert (status, errors) == (130, "Interrupted before any of the frames was written.\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no video" * 100])
def test_a_file_that_is_no_video_is_refused(
    content: bytes, small: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.mp4").write_bytes(content)
    said = refused(*predicting_on(tmp_path / "bad.mp4", small, tmp_path / "out"))
    assert (
        said
        == f"{tmp_path}/bad.mp4 cannot be read as a video; replace the file, or convert it to .mp4."
    )
    assert not (tmp_path / "out").exists()


def test_a_video_that_breaks_off_is_noted(small: Path, tmp_path: Path) -> None:
    path = film(tmp_path / "clip.avi.mp4", num=40)
    whole = path.read_bytes()
    start = whole.index(b"mdat") + 4
    cut = start + (whole.index(b"moov") - start) // 2
    path.write_bytes(
        whole[:cut] + bytes(whole.index(b"moov") - 4 - cut) + whole[whole.index(b"moov") - 4 :]
    )
    said = done(*predicting_on(path, small, tmp_path / "out"))
    (record,) = record_in(tmp_path / "out")["results"]
    assert 0 < record["frames"] < 40
    assert (
        f"Only {record['frames']} of 40 frames of {path} could be read; it seems to be cut off."
        in said
    )


def test_a_camera_that_is_not_there_is_refused(small: Path, tmp_path: Path) -> None:
    said = refused(*predicting_on("97", small, tmp_path / "out"))
    assert said == (
        "Camera 97 cannot be opened; check that it is connected and that no other program uses it, "
        "or give another number."
    )
    assert not (tmp_path / "out").exists()


def test_a_flag_for_images_is_refused_on_a_video(
    clip: Path, small: Path, tmp_path: Path
) -> None:
    call = predicting_on(clip, small, tmp_path / "out")
    assert (
        refused(*call, "--num_workers", 2)
        == "--num_workers has no effect on a video; leave it out."
    )
    said = refused(*call, "--skip_bad")
    assert said == "--skip_bad has no effect without a folder of images; leave it out."


def test_a_video_is_not_written_over(clip: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "overlay").mkdir()
    source = clip.rename(tmp_path / "overlay/clip.mp4")
    said = refused(*predicting_on(source, small, tmp_path))
    assert said == f"{source} would be overwritten; give another --save_dir."


class Camera:
    """Frames of a film, as a camera that tells no speed gives them."""

    def __init__(self, path: Path, frames: int) -> None:
        self.film, self.left = cv2.VideoCapture(str(path)), frames

    def isOpened(self) -> bool:  # noqa: N802
        return True

    def get(self, what: int) -> float:
        return 0.0 if what == cv2.CAP_PROP_FPS else -1.0

    def read(self) -> tuple[bool, Any]:
        self.left -= 1
        return self.film.read() if self.left >= 0 else (False, None)

    def release(self) -> None:
        self.film.release()


def with_camera(path: Path, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cv2.VideoCapture
    camera = Camera(path, frames)
    monkeypatch.setattr(
        cv2, "VideoCapture", lambda source: camera if source == 0 else real(source)
    )


def test_a_camera_is_filmed_until_enough_frames_came(
    clip: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_camera(clip, NUM, monkeypatch)
    said = done(
        *predicting_on("0", small, tmp_path / "out", "--max_frames", 5, "--batch_size", 1)
    )
    (record,) = record_in(tmp_path / "out")["results"]
    assert (record["name"], record["file"], record["frames"], record["fps"]) == (
        "camera 0",
        "camera_0.mp4",
        5,
        25.0,
    )
    assert len(frames_of(tmp_path / "out/overlay/camera_0.mp4")) >= 5
    assert "5 frames in " in said


def test_a_camera_that_gives_no_frame_is_refused(
    clip: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_camera(clip, 0, monkeypatch)
    said = refused(*predicting_on("0", small, tmp_path / "out"))
    assert said == "No frame of camera 0 could be read; close other programs that use it."


def test_a_slow_networks_film_of_a_camera_plays_in_real_time() -> None:
    written = 0
    for i in range(20):  # a frame every 0.2 s, at 25 frames per second
        written += count_copies(
            Frame(np.zeros((1, 1, 3), dtype=np.uint8), i * 0.2), 25.0, written
        )
    assert written == 19 * 5 + 1
    assert count_copies(Frame(np.zeros((1, 1, 3), dtype=np.uint8), None), 25.0, 3) == 1


def test_a_full_disk_is_told_and_leaves_the_old_film(
    clip: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    out = tmp_path / "out"
    done(*predicting_on(clip, small, out))
    before = (out / "overlay/clip.mp4").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # no file may grow beyond it
    try:
        said = refused(*predicting_on(clip, small, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said.startswith(
        f"{out}/overlay/clip.mp4 could not be written (the video did not get onto the disk whole); give another place"
    )
    assert (out / "overlay/clip.mp4").read_bytes() == before
    assert [path.name for path in (out / "overlay").iterdir()] == ["clip.mp4"]


def test_without_opencv_the_pip_command_is_named(
    clip: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    status, _, errors = invoke(*predicting_on(clip, small, tmp_path / "out"))
    assert status == 1
    assert errors == (
        "Error: Videos and cameras need OpenCV, which is not installed; "
        "run: pip install opencv-python-headless==5.0.0.93\n"
    )
