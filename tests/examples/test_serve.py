"""examples/serve over a real socket: masks as `segprune predict` draws them, and what strangers may send."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import onnx
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

import app as serving
import segmenter as segmenter_module
from images import BadImage, read_image
from segmenter import Segmenter, open_segmenter
from segprune.checkpoint import save
from segprune.data import draw_shapes, load_image, voc_palette
from segprune.export import export, open_exported
from segprune.inference.label_maps import EvalMode, Network, label_maps, prepare
from tests.commands import done
from tests.examples.drawn import SIZE, WEIGHT, drawn
from tests.exporting import tiny_network

FOLDER = Path(serving.__file__).parent
CLASSES = ("sky", "road", "tree", "car", "person")
PALETTE = tuple(number * 7 % 256 for number in range(768))
SMALL = serving.Settings(max_megabytes=1, max_megapixels=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain.onnx, and tiny.pth, the checkpoint that it is of."""
    folder, network = tmp_path_factory.mktemp("serve"), tiny_network()
    save(
        network,
        folder / "tiny.pth",
        extra={"class_names": list(CLASSES), "palette": list(PALETTE)},
    )
    export(network, folder / "plain.onnx", size=SIZE, class_names=CLASSES, palette=PALETTE)
    return folder


@contextmanager
def listening_to(app: FastAPI) -> Iterator[httpx2.Client]:
    """A client of a server on a free port."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        # A server closes the connection after an error of its own, so none is kept for the next request.
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        single_use = httpx2.Limits(max_keepalive_connections=0)
        with httpx2.Client(base_url=address, timeout=30, limits=single_use) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def server(
    segmenter: Segmenter, settings: serving.Settings = SMALL
) -> AbstractContextManager[httpx2.Client]:
    return listening_to(serving.create_app(segmenter, settings))


@pytest.fixture(scope="module")
def client(work: Path) -> Iterator[httpx2.Client]:
    with server(open_segmenter(str(work / "plain.onnx"), threads=1)) as client:
        yield client


def photo(size: tuple[int, int] = (90, 130), index: int = 0) -> Image.Image:
    return Image.fromarray(draw_shapes(3, "val", index, size)[0])


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def sent(client: httpx2.Client, data: bytes, kind: str = "mask") -> httpx2.Response:
    return client.post("/predict", params={"kind": kind}, files={"image": ("photo", data)})


def opened(response: httpx2.Response) -> Image.Image:
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png"), (
        response.text
    )
    return Image.open(io.BytesIO(response.content))


def refusal(response: httpx2.Response) -> tuple[int, str]:
    """Status and sentence; there is nothing else."""
    (sentence,) = response.json().values()
    assert list(response.json()) == ["error"]
    assert sentence.endswith(".")
    assert ". " not in sentence
    return response.status_code, sentence


def agreement(a: Image.Image, b: Image.Image) -> float:
    assert (a.mode, a.size) == (b.mode, b.size)
    return float((np.asarray(a) == np.asarray(b)).mean())


def test_masks_and_overlays_are_those_of_segprune_predict(
    client: httpx2.Client, work: Path, tmp_path: Path
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    deep = np.asarray(photo().convert("L")).astype(np.uint16) * 257
    uploads = {
        "wide.png": encoded(photo((300, 420))),
        "tall.jpg": encoded(photo((300, 70), 2), "JPEG"),
        "small.bmp": encoded(photo((20, 31), 3), "BMP"),
        "exact.webp": encoded(photo(SIZE, 4), "WEBP"),
        "turned.jpg": encoded(photo(index=5), "JPEG", exif=turned),
        "grey.png": encoded(photo(index=6).convert("L")),
        "deep.png": encoded(Image.fromarray(deep)),
        "alpha.png": encoded(photo(index=7).convert("RGBA")),
        "palette.gif": encoded(photo(index=8).convert("P"), "GIF"),
        "cmyk.jpg": encoded(photo(index=9).convert("CMYK"), "JPEG"),
    }
    (tmp_path / "in").mkdir()
    for name, data in uploads.items():
        (tmp_path / "in" / name).write_bytes(data)
    flags = ("--kind", "all", "--input_shape", *SIZE, "--save_dir", tmp_path / "out")
    done("predict", work / "tiny.pth", "--input", tmp_path / "in", *flags)
    seen = set()
    for name, data in uploads.items():
        for kind in ("mask", "overlay"):
            expected = Image.open((tmp_path / "out" / kind / name).with_suffix(".png"))
            found = opened(sent(client, data, kind))
            assert agreement(found, expected) >= 0.999, name
            if kind == "mask":
                assert found.getpalette() == expected.getpalette() == list(PALETTE)
                seen |= set(np.unique(np.asarray(found)).tolist())
    assert len(seen) > 2  # not one class everywhere


def test_shares_are_those_of_the_masks_pixels_largest_first(client: httpx2.Client) -> None:
    data = encoded(photo((300, 420)))
    counts = np.bincount(np.asarray(opened(sent(client, data))).ravel(), minlength=5)
    said = sent(client, data, "shares").json()
    assert said["size"] == [300, 420]
    assert {row["class"]: row["percent"] for row in said["classes"]} == {
        k: pytest.approx(100 * count / 126000, abs=1e-4)
        for k, count in enumerate(counts)
        if count
    }
    assert [row["name"] for row in said["classes"]] == [
        CLASSES[row["class"]] for row in said["classes"]
    ]
    percents = [row["percent"] for row in said["classes"]]
    assert percents == sorted(percents, reverse=True)
    assert len(percents) > 1


def evaluated(network: Network, image: Image.Image, shape: tuple[int, int]) -> np.ndarray:
    """As `segprune eval` chooses the classes."""
    how = EvalMode(input_shape=shape)
    return label_maps(network, [prepare(np.asarray(image), how)], how)[0].numpy()


def test_classes_and_preprocessing_in_the_file_give_what_eval_scores(tmp_path: Path) -> None:
    path, image = drawn(tmp_path / "baked.onnx", baked=True), photo((150, 200), 1)
    with server(open_segmenter(path, threads=1)) as client:
        mask = opened(sent(client, encoded(image)))
        assert [row["name"] for row in client.get("/classes").json()] == [
            "0",
            "1",
            "2",
            "3",
            "4",
        ]
    expected = evaluated(Network(open_exported(path), 5, "cpu", 2), image, SIZE)
    assert (np.asarray(mask) == expected).mean() >= 0.999
    assert len(np.unique(expected)) > 2
    assert mask.getpalette() == list(voc_palette())


@pytest.mark.parametrize("asked", [None, (80, 144)])
def test_a_file_of_any_size_is_used_at_the_size_asked_for_or_the_usual(
    asked: tuple[int, int] | None, tmp_path: Path
) -> None:
    segmenter = open_segmenter(drawn(tmp_path / "any.onnx"), asked, threads=1)
    assert segmenter.shape == (asked or (512, 512))
    image = photo((150, 200), 1)

    def predict(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, torch.from_numpy(WEIGHT))

    expected = evaluated(Network(predict, 5, "cpu", 1), image, segmenter.shape)
    assert (segmenter(np.asarray(image)) == expected).mean() >= 0.999
    assert len(np.unique(expected)) > 2


def test_the_page_has_a_form_and_nothing_from_elsewhere(client: httpx2.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert '<input type="file" name="image"' in page.text
    assert not [
        word for word in ("http:", "https:", "//", "href=", "src=") if word in page.text
    ]


def test_classes_and_health_say_what_is_served(client: httpx2.Client) -> None:
    listed = client.get("/classes").json()
    assert [(row["class"], row["name"]) for row in listed] == list(enumerate(CLASSES))
    assert listed[1]["colour"] == "#{:02x}{:02x}{:02x}".format(*PALETTE[3:6])
    assert client.get("/health").json() == {
        "status": "ok",
        "model": "plain.onnx",
        "input_shape": [64, 96],
    }


def claimed(width: int, height: int) -> bytes:
    """A PNG that says it is so large and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data))
            + name
            + data
            + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(9)))
        + chunk(b"IEND", b"")
    )


NO_IMAGE = (
    415,
    "The upload is no image that is read here; send one of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP.",
)
DAMAGED = (400, "The image is damaged or cut off; send the whole file.")
TOO_MANY = (413, "The image has more than the 1,000,000 pixels allowed; send a smaller one.")
TOO_DEEP = (415, "The image has more than 16 bits per channel; send it as 8-bit RGB.")
TOO_LARGE = (413, "The upload has more than 1 MB; send a smaller file.")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", (400, "The upload is empty; send an image.")),
        (b"hello", NO_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NO_IMAGE),
        (encoded(photo())[:-500], DAMAGED),
        (encoded(photo(), "JPEG")[:-500], DAMAGED),
        (encoded(photo(), "TIFF")[:-500], DAMAGED),
        (claimed(90, 130), DAMAGED),
        (claimed(1001, 1000), TOO_MANY),
        (claimed(12_000, 12_000), TOO_MANY),  # Pillow warns
        (claimed(100_000, 100_000), TOO_MANY),  # Pillow refuses
        (encoded(photo().convert("F"), "TIFF"), TOO_DEEP),
        (encoded(Image.fromarray(np.full((9, 9), 70_000, dtype=np.int32)), "TIFF"), TOO_DEEP),
        (bytes(2 << 20), TOO_LARGE),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value[0]),
)
def test_a_bad_upload_is_refused_in_one_sentence(
    data: bytes, expected: tuple[int, str], client: httpx2.Client
) -> None:
    assert refusal(sent(client, data)) == expected
    assert client.get("/health").status_code == 200


def test_an_upload_that_does_not_announce_its_length_is_cut_off_too(
    client: httpx2.Client,
) -> None:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    head = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
    body = iter([head, *[bytes(1 << 16)] * 32])
    assert refusal(client.post("/predict", content=body, headers=kind)) == TOO_LARGE


HOW = "send it as the form field image, as in: curl -F image=@photo.jpg URL."


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"files": {"photo": b"x"}}, (422, f"The form has no file in the field image; {HOW}")),
        (
            {"files": {"other": b"x"}, "data": {"image": "x"}},
            (422, f"The form has no file in the field image; {HOW}"),
        ),
        (
            {"files": [("image", b"x"), ("image", b"y")]},
            (422, "There is more than one image; send one at a time."),
        ),
        ({}, (415, f"The image does not come in a form; {HOW}")),
        ({"json": {"image": "x"}}, (415, f"The image does not come in a form; {HOW}")),
        (
            {"content": b"x", "headers": {"content-type": "image/png"}},
            (415, f"The image does not come in a form; {HOW}"),
        ),
        (
            {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
            (400, f"The form cannot be read; {HOW}"),
        ),
        (
            {
                "content": b"--x\r\nbad",
                "headers": {"content-type": "multipart/form-data; boundary=y"},
            },
            (400, f"The form cannot be read; {HOW}"),
        ),
    ],
)
def test_a_request_without_an_image_is_told_how(
    form: dict[str, Any], expected: tuple[int, str], client: httpx2.Client
) -> None:
    assert refusal(client.post("/predict", **form)) == expected


def test_other_paths_methods_and_kinds_are_told_what_there_is(client: httpx2.Client) -> None:
    assert refusal(client.get("/predict")) == (
        405,
        "GET is not allowed at /predict; images are sent to /predict with POST.",
    )
    assert client.get("/predict").headers["allow"] == "POST"
    assert refusal(client.post("/")) == (
        405,
        "POST is not allowed at /; images are sent to /predict with POST.",
    )
    assert refusal(client.get("/docs")) == (
        404,
        "There is nothing at /docs; there are /, /predict, /classes and /health.",
    )
    assert refusal(sent(client, encoded(photo()), "odd")) == (
        422,
        "kind is 'odd'; choose one of mask, overlay, shares.",
    )


def test_many_at_once_get_each_their_own_mask(client: httpx2.Client) -> None:
    uploads = [encoded(photo((60 + 7 * i, 80), i)) for i in range(12)]
    alone = [sent(client, data).content for data in uploads]
    assert len(set(alone)) == 12
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda data: sent(client, data).content, uploads)) == alone


def test_work_is_bounded_and_the_server_answers_meanwhile(work: Path) -> None:
    plain, gate = open_segmenter(str(work / "plain.onnx"), threads=1), threading.Event()
    running, most = [], []

    def slow(x: Any) -> Any:
        running.append(1)
        most.append(len(running))
        assert gate.wait(20)
        running.pop()
        return plain.run(x)

    with (
        server(replace(plain, run=slow), replace(SMALL, parallel=2, waiting=1)) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        pending = {pool.submit(sent, client, encoded(photo())) for _ in range(4)}
        answered, pending = wait(pending, return_when=FIRST_COMPLETED)
        (last,) = (one.result() for one in answered)
        assert refusal(last) == (
            503,
            "Too many images are being worked on; send it again later.",
        )
        assert last.headers["retry-after"] == "1"
        assert client.get("/health").json()["status"] == "ok"
        gate.set()
        assert [one.result().status_code for one in pending] == [200] * 3
    assert max(most) == 2


def test_logits_that_are_no_numbers_are_the_servers_failure_and_it_goes_on(
    tmp_path: Path,
) -> None:
    segmenter = open_segmenter(drawn(tmp_path / "it.onnx"), (64, 64), threads=1)
    broken = replace(segmenter, run=lambda x: segmenter.run(x) * np.float32("nan"))
    with server(broken) as client:
        for _ in range(2):
            assert refusal(sent(client, encoded(photo()))) == (
                500,
                "The server failed at this image; its log says why.",
            )
    with pytest.raises(
        ArithmeticError,
        match=r"^it\.onnx gives logits that are NaN or infinite; export another",
    ):
        broken(np.asarray(photo()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            "There is no model; give an .onnx file that segprune export wrote to app.py, or as SEGPRUNE_MODEL.",
        ),
        (
            {"MODEL": "no.onnx"},
            "no.onnx does not exist; give an .onnx file that segprune export wrote.",
        ),
        (
            {"MODEL": "text.onnx"},
            "text.onnx is no ONNX file, or only a part of one; copy it again, or give another.",
        ),
        (
            {"MODEL": "cut.onnx"},
            "cut.onnx is no ONNX file, or only a part of one; copy it again, or give another.",
        ),
        (
            {"MODEL": "other.onnx"},
            "other.onnx does not say what it takes and returns; give a file that segprune export wrote.",
        ),
        (
            {"MODEL": "plain.onnx", "INPUT_SHAPE": "64 64"},
            "plain.onnx takes images of 64×96 alone; leave the input shape out.",
        ),
        (
            {"MODEL": "any.onnx", "INPUT_SHAPE": "32 64"},
            "any.onnx takes sides of 64 pixels and more; give a larger input shape.",
        ),
        (
            {"MODEL": "any.onnx", "INPUT_SHAPE": "512"},
            "The input shape is '512'; give height and width in pixels, as in: 512 512.",
        ),
        (
            {"MODEL": "many.onnx"},
            "many.onnx has 257 classes, where masks can hold 256; give another file.",
        ),
        (
            {"MODEL": "named.onnx"},
            "named.onnx has 5 classes and names for 2; export a checkpoint that names all.",
        ),
        (
            {"MODEL": "any.onnx", "PARALLEL": "0"},
            "SEGPRUNE_PARALLEL is '0'; give a whole number of 1 or more.",
        ),
        (
            {"MODEL": "any.onnx", "THREADS": "-1"},
            "SEGPRUNE_THREADS is '-1'; give a whole number of 0 or more.",
        ),
        (
            {"MODEL": "any.onnx", "SPEED": "9"},
            "SEGPRUNE_SPEED is no setting; there are SEGPRUNE_MODEL, SEGPRUNE_INPUT_SHAPE, SEGPRUNE_MAX_MEGABYTES, "
            "SEGPRUNE_MAX_MEGAPIXELS, SEGPRUNE_PARALLEL, SEGPRUNE_WAITING, SEGPRUNE_THREADS.",
        ),
    ],
)
def test_what_cannot_be_served_stops_at_the_start(
    settings: dict[str, str],
    message: str,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(work / "plain.onnx", "plain.onnx")
    drawn(tmp_path / "any.onnx")
    drawn(tmp_path / "named.onnx", class_names=["a", "b"])
    drawn(tmp_path / "many.onnx", np.zeros((257, 3, 1, 1), dtype=np.float32))
    other = onnx.load("any.onnx")
    del other.metadata_props[:]
    onnx.save(other, "other.onnx")
    Path("text.onnx").write_text("hello")
    Path("cut.onnx").write_bytes(Path("plain.onnx").read_bytes()[:-1000])
    for name, value in settings.items():
        monkeypatch.setenv(f"SEGPRUNE_{name}", value)
    with pytest.raises(SystemExit) as stopped:
        _ = serving.app
    assert str(stopped.value) == f"Error: {message}"


def test_settings_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **where: started.update(where, app=app))
    model = drawn(tmp_path / "any.onnx")
    monkeypatch.setattr(
        sys, "argv", ["app.py", model, "--input_shape", "64", "96", "--port", "9"]
    )
    monkeypatch.setenv("SEGPRUNE_MAX_MEGAPIXELS", "2")
    runpy.run_path(str(FOLDER / "app.py"), run_name="__main__")
    assert (started["host"], started["port"]) == ("127.0.0.1", 9)
    with listening_to(started["app"]) as client:
        assert client.get("/health").json()["input_shape"] == [64, 96]
        assert refusal(sent(client, claimed(2000, 1001))) == (
            413,
            "The image has more than the 2,000,000 pixels allowed; send a smaller one.",
        )
        assert opened(sent(client, encoded(photo()))).size == (130, 90)


def test_without_an_argument_the_model_is_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **_: started.append(app))
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(
        SystemExit,
        match=r"Error: There is no model; give an \.onnx file that .* to app\.py, or as SEGPRUNE_MODEL\.",
    ):
        runpy.run_path(str(FOLDER / "app.py"), run_name="__main__")
    monkeypatch.setenv("SEGPRUNE_MODEL", drawn(tmp_path / "any.onnx"))
    runpy.run_path(str(FOLDER / "app.py"), run_name="__main__")
    with listening_to(started[0]) as client:
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("port", ["80000", "-1", "http"])
def test_a_number_that_is_no_port_is_refused(
    port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "a.onnx", f"--port={port}"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(FOLDER / "app.py"), run_name="__main__")
    assert (
        f"argument --port: '{port}' is no port; give a whole number from 0 to 65535."
        in capsys.readouterr().err
    )


STARTED = "import runpy, sys; sys.modules.update(torch=None, segprune=None); runpy.run_path('app.py', run_name='__main__')"


def test_a_copied_folder_serves_where_neither_torch_nor_segprune_is(
    work: Path, tmp_path: Path
) -> None:
    shutil.copytree(FOLDER, tmp_path / "serve", ignore=shutil.ignore_patterns("__pycache__"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", STARTED, str(work / "plain.onnx"), "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=tmp_path / "serve", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        assert process.stderr is not None
        assert any(b"Uvicorn running on" in line for line in process.stderr)
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
            assert opened(sent(client, encoded(photo()))).size == (130, 90)
    finally:
        process.terminate()
        process.communicate()


def test_uvicorn_ends_with_the_sentence(tmp_path: Path) -> None:
    env = {"SEGPRUNE_MODEL": "no.onnx", "PATH": "", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", "0"]
    result = subprocess.run(command, cwd=FOLDER, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert (
        result.stderr
        == "Error: no.onnx does not exist; give an .onnx file that segprune export wrote.\n"
    )


@pytest.mark.parametrize("size", [(1, 300_000), (300_000, 1), (700, 900)])
def test_the_highest_plane_is_found_in_pieces_as_in_one(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    planes = np.random.default_rng(0).random((5, 7, 9), dtype=np.float32)
    logits = torch.nn.functional.interpolate(
        torch.from_numpy(planes)[None], size=size, mode="bilinear", align_corners=False
    )
    monkeypatch.setattr(segmenter_module, "STRIP_NUMBERS", 1 << 14)
    found = segmenter_module.find_highest(planes, size)
    assert (found == logits[0].argmax(0).numpy()).mean() > 0.9999


def test_memory_does_not_depend_on_the_shape_of_the_image() -> None:
    planes = np.random.default_rng(0).random((8, 16, 16), dtype=np.float32)
    tracemalloc.start()
    try:
        segmenter_module.find_highest(planes, (1, 2_000_000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60e6  # of planes 8 × 2,000,000 in float32, which alone are 64 MB


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    assert read_image(data, 4096).shape == (64, 64, 3)

    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(BadImage, match="more than 64 scans"):
        read_image(data[:-2] + scan * 200 + b"\xff\xd9", 4096)


def test_a_tiff_with_jpegs_inside_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "TIFF", compression="jpeg")
    with pytest.raises(BadImage, match="TIFF with JPEGs inside"):
        read_image(buffer.getvalue(), 4096)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": "x"},
        {"shape": [1, 64]},
        {"shape": [0, 0, 0]},
        {"num_classes": "8"},
        {"num_classes": None},
        {"class_names": 5},
        {"palette": 5},
        {"palette": [300] * 768},
        {"argmax": "no"},
        5,
        [],
    ],
    ids=str,
)
def test_a_file_that_says_odd_things_of_itself_is_refused(
    change: Any, work: Path, tmp_path: Path
) -> None:
    model = onnx.load(work / "plain.onnx")
    entry = next(entry for entry in model.metadata_props if entry.key == "segprune")
    says = json.loads(entry.value)
    entry.value = json.dumps(says | change if isinstance(change, dict) else change)
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(ValueError, match=r"odd\.onnx does not say what it takes and returns"):
        open_segmenter(str(tmp_path / "odd.onnx"))


def test_a_file_of_other_channels_is_refused_with_their_number(
    work: Path, tmp_path: Path
) -> None:
    model = onnx.load(work / "plain.onnx")
    entry = next(entry for entry in model.metadata_props if entry.key == "segprune")
    says = json.loads(entry.value)
    entry.value = json.dumps(says | {"spec": says["spec"] | {"in_channels": 4}})
    onnx.save(model, tmp_path / "four.onnx")
    with pytest.raises(ValueError, match=r"four\.onnx takes images of 4 channels"):
        open_segmenter(str(tmp_path / "four.onnx"))


def test_images_are_read_as_segprune_reads_them(tmp_path: Path) -> None:
    for kind, image in (("PNG", photo().convert("LA")), ("TIFF", photo().convert("CMYK"))):
        (tmp_path / "it").write_bytes(encoded(image, kind))
        expected = load_image(tmp_path / "it", upright=True)
        assert np.array_equal(read_image((tmp_path / "it").read_bytes(), 10**6), expected)
