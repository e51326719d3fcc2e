"""Images in, masks out over HTTP: `python app.py model.onnx --port 8000`, the model being of `segprune export`.

    POST /predict   an image as the form field `image` -> its mask as PNG, the pixels being the classes;
                    ?kind=overlay the image with the mask over it, ?kind=shares JSON, the share of each class
    GET  /          a page that does so in a browser
    GET  /classes   numbers, names and colours
    GET  /health    for whoever watches over the server

The model is opened once, before the server listens. A few images are worked on at a time, in threads, and a few more
wait; further requests are refused until there is room. Every refusal is JSON, {"error": one sentence}. `Settings` below
are read from the environment: `SEGPRUNE_MODEL=model.onnx uvicorn app:app` does the same.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import anyio.to_thread
import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from images import BadImage, encode_mask, encode_overlay, read_image
from segmenter import Bytes, Segmenter, open_segmenter

Kind = Literal["mask", "overlay", "shares"]
HOW = "send it as the form field image, as in: curl -F image=@photo.jpg URL"
WRAPPING = 64 << 10  # bytes that a form may add to the image in it
SAFE = "default-src 'none'; img-src blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


@dataclass(frozen=True)
class Settings:
    """`parallel` images are worked on at a time and `waiting` more wait. 0 threads: as ONNX Runtime thinks best."""

    max_megabytes: int = 16
    max_megapixels: int = 25
    parallel: int = 2
    waiting: int = 16
    threads: int = 0


class Refused(HTTPException):
    """A status, and the one sentence that is sent with it."""


def create_app(segmenter: Segmenter, settings: Settings) -> FastAPI:
    app = FastAPI(
        title="segprune", docs_url=None, redoc_url=None
    )  # those pages load scripts from elsewhere
    app.add_middleware(LimitedBody, max_bytes=(settings.max_megabytes << 20) + WRAPPING)
    slots = anyio.CapacityLimiter(settings.parallel)
    inside = 0  # images that are worked on or wait

    @app.post("/predict")
    async def predict(request: Request, image: UploadFile, kind: Kind = "mask") -> Response:
        if len((await request.form()).getlist("image")) > 1:
            raise Refused(422, "There is more than one image; send one at a time.")
        data = await image.read()

        # Take a place, or refuse: requests beyond those that may wait would only pile up.
        nonlocal inside
        if inside == settings.parallel + settings.waiting:
            raise Refused(
                503,
                "Too many images are being worked on; send it again later.",
                {"Retry-After": "1"},
            )

        work = partial(_answer, segmenter, data, kind, settings.max_megapixels * 1_000_000)
        inside += 1
        try:
            return await anyio.to_thread.run_sync(work, limiter=slots)
        finally:
            inside -= 1

    @app.get("/")
    async def page() -> Response:
        return FileResponse(
            Path(__file__).with_name("page.html"), headers={"Content-Security-Policy": SAFE}
        )

    @app.get("/classes")
    async def classes() -> list[dict[str, Any]]:
        colours = np.asarray(segmenter.palette, dtype=np.uint8).reshape(256, 3)
        named = enumerate(segmenter.class_names)
        return [
            {"class": k, "name": name, "colour": f"#{colours[k].tobytes().hex()}"}
            for k, name in named
        ]

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": segmenter.name, "input_shape": segmenter.shape}

    app.add_exception_handler(BadImage, _bad_image)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(Exception, _failed)
    return app


def _answer(segmenter: Segmenter, data: bytes, kind: Kind, max_pixels: int) -> Response:
    image = read_image(data, max_pixels)
    labels = segmenter(image)
    if kind == "shares":
        return JSONResponse(_measure_shares(labels, segmenter.class_names))

    png = encode_mask(labels, segmenter.palette)
    if kind == "overlay":
        png = encode_overlay(image, labels, segmenter.palette)
    return Response(png, media_type="image/png")


def _measure_shares(labels: Bytes, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the image's size (H, W) and the classes that are in it, largest first."""
    percent = 100 * np.bincount(labels.ravel(), minlength=len(names)) / labels.size

    order = [k for k in np.argsort(-percent, kind="stable").tolist() if percent[k] > 0]
    rows = [
        {"class": k, "name": names[k], "percent": round(float(percent[k]), 4)} for k in order
    ]
    return {"size": labels.shape, "classes": rows}


class LimitedBody:
    """Refuses a request over `max_bytes`: by the length it announces, else as soon as more has come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        announced = int(
            headers.get(b"content-length", b"0")
        )  # the server has checked that it is a number
        seen = 0

        async def receive_some() -> Message:
            nonlocal seen
            message = await receive() if announced <= self.max_bytes else {}
            seen += len(message.get("body", b""))
            if max(seen, announced) > self.max_bytes:
                raise Refused(
                    413,
                    f"The upload has more than {self.max_bytes >> 20} MB; send a smaller file.",
                )
            return message

        await self.app(scope, receive_some, send)


def _error(
    status: int, sentence: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse({"error": sentence}, status, headers)


async def _bad_image(_: Request, error: Exception) -> Response:
    assert isinstance(error, BadImage)
    return _error(error.status, str(error))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, Refused):
        return _error(error.status_code, error.detail, error.headers)
    sentence = {
        400: f"The form cannot be read; {HOW}.",
        404: f"There is nothing at {request.url.path}; there are /, /predict, /classes and /health.",
        405: f"{request.method} is not allowed at {request.url.path}; images are sent to /predict with POST.",
    }
    return _error(
        error.status_code, sentence.get(error.status_code, error.detail), error.headers
    )


async def _bad_request(request: Request, error: Exception) -> Response:
    """What FastAPI finds wrong before an image is looked at."""
    assert isinstance(error, RequestValidationError)
    if any(wrong["loc"][0] == "query" for wrong in error.errors()):
        return _error(
            422,
            f"kind is {request.query_params['kind']!r}; choose one of mask, overlay, shares.",
        )
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return _error(415, f"The image does not come in a form; {HOW}.")
    return _error(422, f"The form has no file in the field image; {HOW}.")


async def _failed(_: Request, error: Exception) -> Response:
    """Our own mistakes; the server prints their trace."""
    return _error(500, "The server failed at this image; its log says why.")


def create_app_from(environment: Mapping[str, str]) -> FastAPI:
    """Returns the app for SEGPRUNE_MODEL, SEGPRUNE_INPUT_SHAPE and SEGPRUNE_ with a name of `Settings`.

    Raises ValueError or FileNotFoundError that says in one sentence what is wrong.
    """
    values = {
        name: value
        for name, value in environment.items()
        if name.startswith("SEGPRUNE_") and value
    }
    model, shape = values.pop("SEGPRUNE_MODEL", None), values.pop("SEGPRUNE_INPUT_SHAPE", None)
    if model is None:
        raise ValueError(
            "There is no model; give an .onnx file that segprune export wrote to app.py, or as SEGPRUNE_MODEL."
        )

    numbers = {}
    for name, value in values.items():
        field = name.removeprefix("SEGPRUNE_").lower()
        if field not in Settings.__dataclass_fields__:
            known = ", ".join(
                f"SEGPRUNE_{field.upper()}"
                for field in ("model", "input_shape", *Settings().__dict__)
            )
            raise ValueError(f"{name} is no setting; there are {known}.")
        least = 0 if field in ("waiting", "threads") else 1
        if not value.isdecimal() or int(value) < least:
            raise ValueError(f"{name} is {value!r}; give a whole number of {least} or more.")
        numbers[field] = int(value)

    settings = Settings(**numbers)
    return create_app(open_segmenter(model, _parse_shape(shape), settings.threads), settings)


def _parse_shape(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    words = text.split()
    if len(words) != 2 or not all(map(str.isdecimal, words)):
        raise ValueError(
            f"The input shape is {text!r}; give height and width in pixels, as in: 512 512."
        )
    return int(words[0]), int(words[1])


def __getattr__(name: str) -> FastAPI:
    """`app` is made when a server asks for it, so that importing does nothing."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _create_or_exit(os.environ)


def _create_or_exit(environment: Mapping[str, str]) -> FastAPI:
    try:
        return create_app_from(environment)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")


def _parse_port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no port; give a whole number from 0 to 65535."
        )
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve an .onnx file that segprune export wrote."
    )
    parser.add_argument("model", nargs="?", help="the file; SEGPRUNE_MODEL if not given")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for all who can reach this machine"
    )
    parser.add_argument("--port", type=_parse_port, default=8000, help="0: any that is free")
    parser.add_argument(
        "--input_shape", nargs=2, metavar=("H", "W"), help="for a file of any size; 512 512"
    )
    given = parser.parse_args()

    # Flags overrule the environment.
    flags = {"SEGPRUNE_MODEL": given.model} if given.model else {}
    if given.input_shape:
        flags["SEGPRUNE_INPUT_SHAPE"] = " ".join(given.input_shape)
    uvicorn.run(_create_or_exit({**os.environ, **flags}), host=given.host, port=given.port)


if __name__ == "__main__":
    main()
