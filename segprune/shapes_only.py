"""Networks of names and shapes alone, where weights would only be overwritten or never read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def without_weights() -> Iterator[None]:
    """Puts modules that are built within on the meta device, and draws no random numbers for them.

    >>> from segprune.model import SegFormer
    >>> from segprune.spec import standard_spec
    >>> with without_weights():
    ...     model = SegFormer(standard_spec("b5", 19))
    >>> model.decode_head.classifier.weight.device
    device(type='meta')
    """
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device it computes bounds and draws nothing, half of the time of a b5."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return named.get("tensor", args[0] if args else None)
        return func(*args, **named)
