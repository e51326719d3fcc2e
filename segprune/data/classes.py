"""What a file beside a data set says of its classes: their names, and the colours that masks are painted in.

classes.txt, class_names.txt, labels.txt   a name per line, line k for class k (labelme's __ignore__ is no class)
_classes.csv                               Roboflow's: number and name per line
labelmap.txt                               CVAT's: name:r,g,b:parts:actions per line, in order of the classes
class_dict.csv                             name,r,g,b per line, in order of the classes
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from segprune.data.pixels import Colour, voc_palette
from segprune.data.text import read_lines

_NAME_FILES = ("classes.txt", "class_names.txt", "labels.txt")


@dataclass(frozen=True)
class ClassTable:
    """Names and colours by class; () where nothing says them."""

    names: tuple[str, ...] = ()
    colours: tuple[Colour, ...] = ()

    @property
    def palette(self) -> tuple[int, ...]:
        """The colours as 768 numbers, filled up with VOC's."""
        # A palette needs all 256 colours, even for values that stand for no class.
        flat: list[int] = []
        for colour in self.colours:
            flat.extend(colour)

        return (*flat, *voc_palette()[len(flat) :])


def read_classes(*folders: str | os.PathLike[str]) -> ClassTable:
    """Returns what the first file that is there says; folders are searched in order.

    Names in a file of names alone are preferred to those in a table of colours, and colours are added to them.
    """
    # Look for colours first: whichever file gives the names, these are added to it.
    colours = ClassTable()
    for folder in folders:
        for name, read in (
            ("labelmap.txt", _read_labelmap),
            ("class_dict.csv", _read_class_dict),
        ):
            path = os.path.join(folder, name)
            if not colours.colours and os.path.isfile(path):
                colours = read(path)

    # Then the names; the first file wins, even where another one disagrees.
    for folder in folders:
        for name in _NAME_FILES:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                return ClassTable(_read_names(path), colours.colours)

        path = os.path.join(folder, "_classes.csv")
        if os.path.isfile(path):
            return ClassTable(_read_numbered_names(path), colours.colours)

    return colours


def _read_names(path: str) -> tuple[str, ...]:
    # Keep empty lines between names, since the line number is the class.
    names = [line.strip() for line in read_lines(path)]
    # labelme writes __ignore__ for what becomes 255, so classes start one line later.
    if names[:1] == ["__ignore__"]:
        names.pop(0)
    while names and not names[-1]:
        names.pop()

    return tuple(names)


def _read_numbered_names(path: str) -> tuple[str, ...]:
    """Reads `Pixel Value, Class` below a heading; a number that is left out has no name."""
    names: dict[int, str] = {}
    # Lines without a number, such as empty ones, are skipped.
    for line in read_lines(path)[1:]:
        number, _, name = line.partition(",")
        if number.strip().isdecimal():
            names[int(number)] = name.strip()

    return tuple(names.get(number, "") for number in range(max(names, default=-1) + 1))


def _read_labelmap(path: str) -> ClassTable:
    rows = []
    # Comments and empty lines hold no class and must not move the numbering.
    for line in read_lines(path):
        if line.strip() and not line.startswith("#"):
            # Parts and actions, which CVAT adds behind the colour, are not used.
            name, _, rest = line.partition(":")
            rows.append((name, rest.partition(":")[0].split(",")))

    return _make_table(path, rows, "NAME:R,G,B::")


def _read_class_dict(path: str) -> ClassTable:
    rows = []
    for line in read_lines(path)[1:]:
        if line.strip():
            columns = line.split(",")
            rows.append((columns[0], columns[1:4]))

    return _make_table(path, rows, "NAME,R,G,B below a heading")


def _make_table(path: str, rows: Iterable[tuple[str, list[str]]], pattern: str) -> ClassTable:
    """Raises ValueError for a row whose colour is none, and for a colour that stands for two classes."""
    names: list[str] = []
    colours: list[Colour] = []
    for name, words in rows:
        try:
            # Three numbers exactly: fewer or more fail in the same way as a word.
            red, green, blue = (int(word) for word in words)
        except ValueError as error:
            raise ValueError(
                f"{path} gives the class {name!r} the colour {','.join(words)!r}, where lines {pattern} are allowed; "
                "correct the line or remove the file."
            ) from error

        # Two classes of one colour could not be told apart.
        colour = (red, green, blue)
        if max(colour) > 255 or min(colour) < 0 or colour in colours:
            raise ValueError(
                f"{path} gives the class {name!r} the colour {','.join(words)}, where each class needs a colour of its "
                "own with values in 0..255; correct the line or remove the file."
            )
        names.append(name.strip())
        colours.append(colour)

    return ClassTable(tuple(names), tuple(colours))
