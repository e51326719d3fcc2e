"""Lists and tables as people's tools write them: Windows, pandas, GBK."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from segprune.data.pixels import IMAGE_EXTENSIONS

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # PowerShell's > and Notepad's "Unicode"
_HEADINGS = {
    "",
    "image",
    "img",
    "images",
    "image_path",
    "img_path",
    "image_id",
    "file_name",
    "filename",
    "file",
    "name",
    "id",
}


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Returns the lines of a text in UTF-8, UTF-16 with its mark, or GBK, without their ends.

    Raises ValueError for another encoding.
    """
    content = Path(path).read_bytes()
    # UTF-8 first, since GBK text is hardly ever valid UTF-8; -sig drops Excel's mark.
    encodings = ["utf-16"] if content.startswith(_UTF_16) else ["utf-8-sig", "gb18030"]
    for encoding in encodings:
        try:
            return content.decode(encoding).splitlines()
        except UnicodeDecodeError:
            continue

    raise ValueError(
        f"{path} is neither UTF-8 nor GBK text, the encodings that are read; save it as UTF-8."
    )


def describe_encoding(path: str | os.PathLike[str]) -> str:
    """Returns a remark for messages about names that do not exist, if the text may be in another encoding; else ""."""
    content = Path(path).read_bytes()
    try:
        content.decode("utf-16" if content.startswith(_UTF_16) else "utf-8")
    except UnicodeDecodeError:
        return f"; {path} is not UTF-8 text and was read as GBK"
    return ""


def split_columns(line: str) -> list[str]:
    """Splits at tabs, else commas, else blanks; quotes around a column are taken off, backslashes become slashes."""
    # Names may contain blanks, but hardly ever tabs, so the rarer mark decides.
    separator = next((mark for mark in "\t," if mark in line), None)
    columns = [column.strip().strip('"') for column in line.strip().split(separator)]
    return [column.replace("\\", "/") for column in columns]


def read_rows(
    path: str | os.PathLike[str], is_name: Callable[[str], bool] = lambda text: False
) -> list[tuple[int, list[str]]]:
    """Returns number and columns of every line that is not empty, without a heading and without pandas' index.

    `is_name` says of a whole line whether it is one name, blanks and commas included.
    """
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        # Keep the line's number for messages, since empty lines are left out.
        text = line.strip().replace("\\", "/")
        if text:
            rows.append((number, [text] if is_name(text) else split_columns(line)))

    # pandas leaves the heading of its index empty. Headings are those of columns: a single name may be any word.
    heading: list[str] = []
    if rows and len(rows[0][1]) > 1 and rows[0][1][0].lower() in _HEADINGS:
        heading = rows.pop(0)[1]
    if heading[:1] == [""] or _counts_up([columns for _, columns in rows]):
        rows = [(number, columns[1:]) for number, columns in rows]

    return rows


def read_names(path: str | os.PathLike[str], known: Mapping[str, str]) -> list[list[str]]:
    """Returns the columns of a list of images in which each image is named by the key that it has in `known`.

    Lists say names with and without extension, and paths from anywhere: of a path the longest ending that is known is
    taken. What is not known is left as it stands. Raises ValueError where the list is empty.
    """

    def drop_extension(text: str) -> str:
        stem, extension = os.path.splitext(text)
        return stem if extension.lower() in IMAGE_EXTENSIONS else text

    def find_key(text: str) -> str | None:
        # Drop folders from the front, since they may be those of another machine.
        name = drop_extension(text)
        while name not in known:
            _, slash, name = name.partition("/")
            if not slash:
                return None
        return name

    rows = [
        columns for _, columns in read_rows(path, lambda text: drop_extension(text) in known)
    ]
    if not rows:
        raise ValueError(
            f"{path} lists no image; write one image name per line, without extension."
        )

    # A heading above a single column.
    if len(rows) > 1 and rows[0][0].lower() in _HEADINGS and find_key(rows[0][0]) is None:
        rows.pop(0)

    named = []
    for columns in rows:
        name = find_key(columns[0]) or drop_extension(columns[0])
        named.append([name, *columns[1:]])

    return named


def _counts_up(rows: Sequence[list[str]]) -> bool:
    """Returns whether the first of several columns is 0, 1, 2 …"""
    for number, columns in enumerate(rows):
        if len(columns) < 2 or columns[0] != str(number):
            return False

    return len(rows) > 1
