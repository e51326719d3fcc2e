"""State dicts as NVlabs', bubbliiiing's and mmsegmentation's code saves them.

Weights are rewritten so that the other tool's numerics give the same logits (numerics.py); what its classes cannot
hold is refused by name. What was written is read again and compared before it is kept.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from segprune.checkpoint import build, read
from segprune.checkpoint.dialects import HEADS, NUMERICS, decoder_dim, detect
from segprune.checkpoint.hf_in import NUM_HEADS_KEY
from segprune.checkpoint.numerics import with_numerics
from segprune.checkpoint.published import mmseg_problem, uniform_problem
from segprune.checkpoint.rename import from_ours, to_ours
from segprune.compare import TOLERANCE, compare
from segprune.data import draw_shapes, normalise
from segprune.files import PICKLES, atomic_files, read_file, save_record
from segprune.fold import unfold_decoder
from segprune.model import SegFormer
from segprune.spec import VARIANTS, Spec, standard_spec

SIZE = (96, 128)

Logits = Callable[[Tensor], Tensor]  # normalised images B 3 H W -> logits B K H/4 W/4, before the last upsampling


def write_file(model: SegFormer, path: str | os.PathLike[str], dialect: str) -> Written:
    """Write a .pth, .pt or .bin file that `dialect`'s own code loads, read it again and keep it if the logits agree.

    nvlabs, mmseg: {"meta", "state_dict"}, as their training leaves it, nvlabs' meta saying the heads of a pruned
    network; bubbliiiing: the bare state dict. A folded head is unfolded. ValueError for another ending, for a network
    that their classes cannot hold, for another GELU, and for logits that differ.
    """
    path = Path(path)
    if path.suffix not in PICKLES:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; {dialect}'s code reads {', '.join(PICKLES)}: give such a name."
        )
    problem = mmseg_problem(model.spec) if dialect == "mmseg" else uniform_problem(model.spec)
    if problem is not None:
        remedy = _remedy(model.spec, dialect)
        raise ValueError(f"{dialect}'s classes cannot hold this network, since {problem}; {remedy}.")
    whole = unfold_decoder(model)
    state, spec = with_numerics(whole.state_dict(), whole.spec, NUMERICS[dialect])
    named = {name: tensor.detach().cpu().clone() for name, tensor in from_ours(state, spec, dialect).items()}
    meta: dict[str, list[int]] = {}
    if dialect == "nvlabs" and not _is_standard(spec, dialect):
        meta = {
            "hidden_sizes": [s.width for s in spec.stages],
            NUM_HEADS_KEY: [s.blocks[0].num_heads for s in spec.stages],
        }
    with atomic_files(path) as temporary:
        save_record(named if dialect == "bubbliiiing" else {"meta": meta, "state_dict": named}, temporary)
        readable = dialect == "nvlabs" or _has_standard_stages(spec)
        reader = _file_reader(temporary, dialect, None if readable else spec)
        return check_written(model, {"segprune": reader}, tuple(_notes(whole.spec, dialect, readable)))


def _remedy(spec: Spec, dialect: str) -> str:
    if spec.head != HEADS[dialect]:
        others = [name for name in ("nvlabs", "bubbliiiing", "mmseg") if HEADS[name] == spec.head]
        return f"write --to {', '.join(others)} or hf"
    elsewhere = "write --to hf, which needs no uniform widths"
    return elsewhere if spec.head == "conv" else f"prune with --uniform for them, or {elsewhere}"


def _notes(spec: Spec, dialect: str, readable: bool) -> list[str]:
    notes = []
    if spec.numerics.align_corners != NUMERICS[dialect].align_corners:
        notes.append(
            f"The network's last upsampling has align_corners={spec.numerics.align_corners} and theirs "
            f"{not spec.numerics.align_corners}; set it there, or the rims of masks differ."
        )
    if not _is_standard(spec, dialect):
        arguments = _mmseg_arguments(spec) if dialect == "mmseg" else _arguments(spec)
        notes.append(f"Build it with their base classes, not with a variant's: {arguments}.")
    if not readable:
        notes.append("segprune itself cannot load the file, which does not say its heads; keep the checkpoint as well.")
    return notes


def _is_standard(spec: Spec, dialect: str) -> bool:
    return _has_standard_stages(spec) and spec.decoder_dim == decoder_dim(dialect, spec.variant)


def _has_standard_stages(spec: Spec) -> bool:
    if spec.variant not in VARIANTS:
        return False
    dense = standard_spec(spec.variant, spec.num_classes)
    return [(s.width, len(s.blocks), s.blocks[0].ffn_dim) for s in dense.stages] == [
        (s.width, len(s.blocks), s.blocks[0].ffn_dim) for s in spec.stages
    ]


def _arguments(spec: Spec) -> str:
    """Of MixVisionTransformer and SegFormerHead."""
    stages = spec.stages
    encoder = {
        "embed_dims": [stage.width for stage in stages],
        "num_heads": [stage.blocks[0].num_heads for stage in stages],
        "mlp_ratios": [stage.blocks[0].ffn_dim // stage.width for stage in stages],
        "depths": [len(stage.blocks) for stage in stages],
        "sr_ratios": [stage.reduction_ratio for stage in stages],
    }
    listed = ", ".join(f"{name}={value}" for name, value in encoder.items())
    return f"MixVisionTransformer({listed}), decode head width {spec.decoder_dim}"


def _mmseg_arguments(spec: Spec) -> str:
    """Of MixVisionTransformer and SegformerHead there."""
    first = spec.stages[0]
    encoder = {
        "embed_dims": first.width // first.blocks[0].num_heads,
        "num_heads": [stage.blocks[0].num_heads for stage in spec.stages],
        "num_layers": [len(stage.blocks) for stage in spec.stages],
        "mlp_ratio": first.blocks[0].ffn_dim // first.width,
    }
    head = {"in_channels": [stage.width for stage in spec.stages], "channels": spec.decoder_dim}
    listed = [", ".join(f"{name}={value}" for name, value in part.items()) for part in (encoder, head)]
    return f"MixVisionTransformer({listed[0]}), SegformerHead({listed[1]})"


@dataclass(frozen=True)
class Written:
    """Notes for whoever will use it; who read it again; and the largest difference of logits over the largest one."""

    notes: tuple[str, ...]
    readers: tuple[str, ...]
    difference: float


def check_written(model: SegFormer, readers: Mapping[str, Logits], notes: tuple[str, ...]) -> Written:
    """Compares the readers' logits of a generated image; ValueError if one of them is further off than `TOLERANCE`."""
    x = normalise(draw_shapes(0, "val", 0, SIZE)[0])[None]
    worst = 0.0
    with torch.inference_mode():
        expected = copy.deepcopy(model).cpu().float().eval().parts(x)[1]
        for name, reader in readers.items():
            off = compare([(expected, reader(x))]).relative
            assert off is not None
            worst = max(worst, off)
            if worst > TOLERANCE:
                raise ValueError(
                    f"Read again by {name}, the logits are off by {worst:.1e} of the largest, where {TOLERANCE:.0e} is "
                    "allowed, and nothing was kept; choose another format."
                )
    return Written(notes, tuple(readers), worst)


def _file_reader(path: Path, dialect: str, spec: Spec | None) -> Logits:
    """segprune, which has to be told of `spec` where the file alone does not say it."""
    if spec is None:
        found = build(read(path, dialect=dialect))
    else:
        data = read_file(path)[0]
        found = SegFormer(spec).eval()
        state = data.get("state_dict", data)
        found.load_state_dict(to_ours(state, detect(state.keys(), dialect=dialect)))
    return lambda x: found.parts(x)[1]
