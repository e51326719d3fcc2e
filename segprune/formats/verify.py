"""What was written read again, and its logits held against those of the network that it came from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segprune.checkpoint import build, load, read
from segprune.convert import to_ours
from segprune.data import draw_shapes, normalise
from segprune.dialects import detect
from segprune.files import read_file
from segprune.model import SegFormer
from segprune.spec import Spec

LIMIT = 1e-4  # of the largest logit: float32's rounding stays a hundred times below
SIZE = (96, 128)

Logits = Callable[[Tensor], Tensor]  # normalised images B 3 H W -> logits B K H/4 W/4, before the last upsampling


@dataclass(frozen=True)
class Written:
    """Notes for whoever will use it; who read it again; and the largest difference of logits over the largest one."""

    notes: tuple[str, ...]
    readers: tuple[str, ...]
    difference: float


def written(model: SegFormer, readers: Mapping[str, Logits], notes: tuple[str, ...]) -> Written:
    """The readers' logits of a generated picture compared; ValueError if one of them is further off than `LIMIT`."""
    x = normalise(draw_shapes(0, "val", 0, SIZE)[0])[None]
    worst = 0.0
    with torch.inference_mode():
        expected = copy.deepcopy(model).cpu().float().eval().parts(x)[1]
        largest = float(expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
        for name, reader in readers.items():
            off = (reader(x) - expected).abs().nan_to_num(torch.inf, posinf=torch.inf)
            worst = max(worst, float(off.max()) / largest)
            if worst > LIMIT:
                raise ValueError(
                    f"Read again by {name}, the logits are off by {worst:.1e} of the largest, where {LIMIT:.0e} is "
                    "allowed, and nothing was kept; choose another format."
                )
    return Written(notes, tuple(readers), worst)


def folder_readers(folder: Path, *, stock: bool) -> dict[str, Logits]:
    """segprune, and where the folder is for `stock` transformers and that is installed, its own classes."""
    readers: dict[str, Logits] = {"segprune": lambda x: load(folder).parts(x)[1]}
    if stock:
        try:
            import transformers
        except ImportError:
            return readers
        readers[f"transformers {transformers.__version__}"] = lambda x: _stock_logits(folder, x)
    return readers


def _stock_logits(folder: Path, x: Tensor) -> Tensor:
    from transformers import SegformerForSemanticSegmentation
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = SegformerForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    theirs, info = loaded
    assert not any(info.values()), info
    return theirs.eval()(x).logits


def file_reader(path: Path, dialect: str, spec: Spec | None) -> Logits:
    """segprune, which has to be told of `spec` where the file alone does not say it."""
    if spec is None:
        found = build(read(path, dialect=dialect))
    else:
        data = read_file(path)[0]
        found = SegFormer(spec).eval()
        state = data.get("state_dict", data)
        found.load_state_dict(to_ours(state, detect(state.keys(), dialect=dialect)))
    return lambda x: found.parts(x)[1]
