"""What a pickled checkpoint asks for beside tensors, and what it gets instead: nothing of it is built, nothing runs.

Training scripts leave options, paths, logs and losses beside the weights. torch.load with `weights_only=True` refuses
their classes; with these stand-ins it passes over them. Only NumPy's plain numbers keep their value.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from typing import Any

import numpy as np


class NumpyDtype:
    """Stands in for numpy.dtype: keeps its code and byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def numpy_scalar(dtype: NumpyDtype, data: object) -> Any:
    """Stands in for NumPy's constructor of scalars: bool, int or float, and None for a date or a text."""
    # Byte order, kind (bool, signed, unsigned, float) and size in bytes, and nothing else.
    code = f"{dtype.order}{dtype.code}"
    if not isinstance(data, bytes) or not re.fullmatch(r"[<>|=][biuf][1248]", code):
        return None
    return np.frombuffer(data, dtype=code)[0].item()


class Sealed:
    """Stands in for an object of any class: takes what it is given and keeps nothing."""

    def __new__(cls, *_: object) -> Sealed:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


class NumpyArray(Sealed):
    """Stands in for NumPy's arrays; the name stands in messages."""


class Fields(OrderedDict[str, Any]):
    """Stands in for an object of any class, a kind of dict too: becomes a plain dict, which torch.load may fill."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


def new_list(*_: object) -> list[Any]:
    """Stands in for containers that are filled like lists."""
    return []


# NumPy 2 renamed `core` to `_core`.
STAND_INS: tuple[tuple[Any, str], ...] = (
    (Sealed, "mmengine.logging.history_buffer.HistoryBuffer"),
    (NumpyArray, "numpy.ndarray"),
    (NumpyArray, "numpy.core.multiarray._reconstruct"),
    (NumpyArray, "numpy._core.multiarray._reconstruct"),
    (NumpyDtype, "numpy.dtype"),
    (numpy_scalar, "numpy.core.multiarray.scalar"),
    (numpy_scalar, "numpy._core.multiarray.scalar"),
    (new_list, "collections.deque"),
)

# Of Python's own library only what holds values, or says where such a value is found.
# fmt: off
_VALUES = frozenset((
    "argparse", "array", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum", "fractions",
    "functools", "logging", "numbers", "pathlib", "random", "types", "typing", "uuid", "zoneinfo",
))
_BUILTINS = frozenset((
    "bool", "bytes", "complex", "dict", "float", "frozenset", "getattr", "int", "list", "object", "range", "set",
    "slice", "str", "tuple", "type",
))
# fmt: on


def is_harmless(name: str) -> bool:
    """Tells whether a stand-in may take the place of what is called so; else a file that asks for it is refused.

    A stand-in runs nothing in either case. But a file that asks for a shell was not made by a training script.

    >>> is_harmless("argparse.Namespace"), is_harmless("os.system"), is_harmless("builtins.eval")
    (True, False, False)
    """
    module, _, attribute = name.rpartition(".")
    package = module.partition(".")[0]
    if package in ("builtins", "__builtin__"):
        return attribute in _BUILTINS
    if package == "torch":
        return attribute[:1].isupper()  # a class, not a function that loads
    return package in _VALUES or package not in sys.stdlib_module_names
