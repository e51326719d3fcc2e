"""Files written whole or not at all, and small JSON files read with limits."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A path that is no UTF-8 has letters that cannot be encoded; as escapes JSON gives them back.
LOSSLESS = {"encoding": "utf-8", "errors": "backslashreplace"}
MAX_JSON, MAX_NESTED = 32 << 20, 50  # bytes, and lists or records within one another


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which is made if it is missing; on success it replaces `path`.

    On failure the temporary file is removed and the old one is kept. Raises OSError in one sentence.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary

            # On the disk first, then renamed: after a
            # power cut the old or the new is there, whole.
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _write_error(path, error) from error


@contextmanager
def atomic_files(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Does the same for a file that has others beside it: yields a path of the same name in a temporary folder.

    On success all files in that folder move to where `path` is, `path` itself last.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder / path.name

            # Whoever waits for `path` then finds the others too.
            for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
                file.replace(path.with_name(file.name))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> OSError:
    return OSError(
        f"{path} could not be written ({error.strerror or error}); give another place, "
        f"or see to it that {path.parent} is a folder with free space in which you may write."
    )


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Does the same for a folder that does not exist yet or is empty; raises ValueError if something is in it."""
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(
            f"{path} is there already, and would be written over; give another place, or remove it first."
        )

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Filled beside its place, so that a half-written folder never bears the name.
        temporary.mkdir(parents=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        inside = (
            error.__cause__ if isinstance(error.__cause__, OSError) else error
        )  # of a file in the folder
        raise _write_error(path, inside) from error


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Tries a file in the folder, or where it will be made, so that hours of work do not end in an OSError.

    Leaves nothing behind, no empty folder either: a folder is made with its first file.
    """
    folder = Path(folder)
    try:
        # The folder may not exist yet, so the nearest one above it is tried.
        nearest = next(
            path for path in (folder, *folder.parents) if path.is_symlink() or path.exists()
        )
        with atomic_path(nearest / ".writable") as temporary:
            temporary.touch()
        (nearest / ".writable").unlink(
            missing_ok=True
        )  # of several processes another may have been first
    except OSError as error:
        inside = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise _write_error(folder / ".writable", inside) from error


def write_json(data: Any, path: str | os.PathLike[str]) -> None:
    write_bytes(
        (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(**LOSSLESS), path
    )


def read_json(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Returns the names and values in a small JSON file. `what` says in errors which file was to be given.

    Raises FileNotFoundError, or ValueError for anything else: a device, a pipe, what is too large or nested too deep.
    """
    path = require_file(path, what)
    try:
        # Some editors on Windows put a byte order mark in front.
        with path.open("rb") as file:
            data = parse_json(file.read(MAX_JSON + 1).decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); give {what}, or write it again."
        ) from error

    if not isinstance(data, dict):
        raise ValueError(
            f"{path} holds a {type(data).__name__} instead of names and values; give {what}, or write it again."
        )
    return data


def parse_json(text: str | bytes) -> Any:
    """Returns what a small JSON text says. Raises ValueError for what is none, too long or nested too deep."""
    if len(text) > MAX_JSON:
        raise ValueError(f"longer than {MAX_JSON >> 20} MiB")
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_NESTED}") from error

    # Whatever walks through the data later must not run out of stack.
    level: list[Any] = [data]
    for _ in range(MAX_NESTED):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict | list):
                below += value.values() if isinstance(value, dict) else value
        level = below
    if level:
        raise ValueError(f"nested deeper than {MAX_NESTED}")
    return data


def write_csv(rows: Iterable[Iterable[Any]], path: str | os.PathLike[str]) -> None:
    """Writes UTF-8, one line per row."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_bytes(text.getvalue().encode(**LOSSLESS), path)


def write_bytes(data: bytes | memoryview, path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def is_same_path(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Returns whether two paths lead to the same place, links followed; neither has to exist.

    Unlike `Path.resolve`, `os.path.realpath` does not stumble over a link to itself.
    """
    return os.path.realpath(one) == os.path.realpath(other)


def require_file(path: str | os.PathLike[str], what: str = "a checkpoint") -> Path:
    """Returns the path of a file that can be read; raises FileNotFoundError, ValueError or OSError for any other.

    `what` says in errors which file was to be given.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; give the file in it.")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a device or a pipe and no file; give the path of {what}.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of {what}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; copy or download it again.")
    try:
        # Whether it may be read shows only when it is opened.
        path.open("rb").close()
    except OSError as error:
        raise OSError(
            f"{path} could not be opened ({error.strerror}); see to it that you may read it."
        ) from error
    return path
