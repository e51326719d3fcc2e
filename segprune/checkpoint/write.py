"""State dicts as NVlabs', bubbliiiing's and mmsegmentation's code saves them.

Weights are rewritten so that the other tool's numerics give the same logits (numerics.py); what its classes cannot
hold is refused by name. What was written is read again and compared before it is kept.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segprune.checkpoint import build, read
from segprune.checkpoint.dialects import HEADS, NUMERICS, decoder_dim, detect
from segprune.checkpoint.find import find_weights
from segprune.checkpoint.numerics import with_numerics
from segprune.checkpoint.preprocessing import to_meta
from segprune.checkpoint.published import fitting_options, mmseg_problem, uniform_problem
from segprune.checkpoint.rename import from_ours, to_ours
from segprune.checkpoint.stated import META_KEY, NUM_HEADS_KEY, describe_classes
from segprune.compare import TOLERANCE, compare
from segprune.data import IMAGENET, normalise, voc_palette
from segprune.data.leaves import draw_example
from segprune.files import atomic_files
from segprune.fold import unfold_decoder
from segprune.model import SegFormer
from segprune.spec import RGB, VARIANTS, Spec, preprocessing_of_drawn, standard_spec
from segprune.tensor_files import PICKLES, read_file, save_record

SIZE = (96, 128)  # of the image that is compared
CONV_SEG = "decode_head.conv_seg"  # a layer of NVlabs' head that is never run
CONV_SEG_DIM = 128  # `channels` of the head in all of NVlabs' configs

Logits = Callable[
    [Tensor], Tensor
]  # normalised images B 3 H W -> logits B K H/4 W/4, before the last upsampling


@dataclass(frozen=True)
class Written:
    """Notes for whoever will use it; who read it again; and the largest difference of logits over the largest one."""

    notes: tuple[str, ...]
    readers: tuple[str, ...]
    difference: float


def check_written(
    model: SegFormer, readers: Mapping[str, Logits], notes: tuple[str, ...]
) -> Written:
    """Compares the readers' logits of a generated image with the network's.

    Raises ValueError if one of them is further off than `TOLERANCE`.
    """
    # Before the last upsampling, which transformers leaves to its image processor.
    spec = model.spec
    image = draw_example(0, SIZE, spec.in_channels)
    x = normalise(image, preprocessing_of_drawn(spec))[None]
    worst = 0.0
    with torch.inference_mode():
        # In float32 on the CPU, as the readers compute.
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


def write_file(
    model: SegFormer,
    path: str | os.PathLike[str],
    dialect: str,
    *,
    class_names: Sequence[str] | None = None,
    palette: Sequence[int] | None = None,
) -> Written:
    """Writes a .pth, .pt or .bin file that `dialect`'s own code loads, reads it again and keeps it if logits agree.

    nvlabs, mmseg: {"meta", "state_dict"}, as their training leaves it, meta saying classes, colours, pixels and the
    heads of a pruned network; bubbliiiing: the bare state dict, whose `_metadata` say the same. A folded head is
    unfolded. Raises ValueError for another ending, for a network that their classes cannot hold, for another GELU, and
    for logits that differ.
    """
    path = Path(path)
    if path.suffix not in PICKLES:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; {dialect}'s code reads {', '.join(PICKLES)}: give such a name."
        )
    problem = _problem_of(dialect)(model.spec)
    if problem is not None:
        remedy = _name_remedy(model.spec, dialect)
        raise ValueError(
            f"{dialect}'s classes cannot hold this network, since {problem}; {remedy}."
        )

    # Our names and numerics to theirs.
    whole = unfold_decoder(model)
    state, spec = with_numerics(whole.state_dict(), whole.spec, NUMERICS[dialect])
    named = {
        name: tensor.detach().cpu().clone()
        for name, tensor in from_ours(state, spec, dialect).items()
    }

    # NVlabs' head has a layer that it never runs, and misses when it loads strictly.
    if dialect == "nvlabs":
        named[f"{CONV_SEG}.weight"] = torch.zeros(spec.num_classes, CONV_SEG_DIM, 1, 1)
        named[f"{CONV_SEG}.bias"] = torch.zeros(spec.num_classes)

    # What their training writes around the weights.
    colours = palette or voc_palette()
    meta: dict[str, Any] = describe_classes(dialect, spec.num_classes, class_names, colours)
    meta |= to_meta(whole.spec, dialect)
    if not _is_standard(spec, dialect):
        meta["hidden_sizes"] = [stage.width for stage in spec.stages]
        meta[NUM_HEADS_KEY] = [stage.blocks[0].num_heads for stage in spec.stages]
    record: dict[str, Any] = {"meta": meta, "state_dict": named}
    if dialect == "bubbliiiing":
        # A bare state dict has room for it where torch keeps the versions of layers.
        record = OrderedDict(named)
        record._metadata = {META_KEY: meta}  # type: ignore[attr-defined]

    with atomic_files(path) as temporary:
        save_record(record, temporary)

        # Meta states the heads. Without it only standard widths tell how many there are.
        readable = _can_read(temporary, dialect)
        reader = _open_again(temporary, dialect, None if readable else spec)
        return check_written(
            model, {"segprune": reader}, tuple(_write_notes(whole.spec, dialect, readable))
        )


def _can_read(path: Path, dialect: str) -> bool:
    try:
        read(path, dialect=dialect)
    except ValueError:
        return False
    return True


def _open_again(path: Path, dialect: str, spec: Spec | None) -> Logits:
    """Reads the file with segprune, which must be told of `spec` where the file alone does not say it."""
    if spec is None:
        model = build(read(path, dialect=dialect))
    else:
        model = SegFormer(spec).eval()

        # Our reader would have to guess the heads, so the known spec is used instead.
        state = find_weights(read_file(path)[0], None)[0].tensors
        model.load_state_dict(to_ours(state, detect(state.keys(), dialect=dialect)))
    return lambda x: model.parts(x)[1]


def _problem_of(dialect: str) -> Callable[[Spec], str | None]:
    """Returns what says why the dialect's classes cannot hold a network."""
    return mmseg_problem if dialect == "mmseg" else uniform_problem


def _name_remedy(spec: Spec, dialect: str) -> str:
    if spec.head != HEADS[dialect]:
        others = [
            name for name in ("nvlabs", "bubbliiiing", "mmseg") if HEADS[name] == spec.head
        ]
        return f"write {', '.join(others)} or hf instead"
    elsewhere = "write hf instead, which needs no uniform widths"
    options = fitting_options(spec, _problem_of(dialect))
    return elsewhere if options is None else f"prune with {options} for them, or {elsewhere}"


def _write_notes(spec: Spec, dialect: str, readable: bool) -> list[str]:
    notes = []

    # No weights make up for another rule of upsampling, so the user is told.
    if spec.numerics.align_corners != NUMERICS[dialect].align_corners:
        notes.append(
            f"The network's last upsampling has align_corners={spec.numerics.align_corners} and theirs "
            f"{not spec.numerics.align_corners}; set it there, or the rims of masks differ."
        )

    # Their code reads it from a config of its own, and bubbliiiing's has it fixed.
    own = spec.preprocessing
    if own != IMAGENET:
        notes.append(
            f"The network was trained with mean {own.mean}, std {own.std} of pixels 0..255, labels shifted by "
            f"{own.label_offset} and the label {own.ignore_index} ignored; set the same in their code."
        )

    # A variant's class has that variant's widths; the base class takes any uniform ones.
    if not _is_standard(spec, dialect):
        arguments = _call_of_mmseg(spec) if dialect == "mmseg" else _call_of_nvlabs(spec)
        notes.append(f"Build it with their base classes, not with a variant's: {arguments}.")
    if not readable:
        notes.append(
            "segprune itself cannot load the file, which does not say its heads; keep the checkpoint as well."
        )
    return notes


def _is_standard(spec: Spec, dialect: str) -> bool:
    # A variant's class takes RGB.
    if spec.in_channels != RGB or not _has_standard_stages(spec):
        return False
    return spec.decoder_dim == decoder_dim(dialect, spec.variant)


def _has_standard_stages(spec: Spec) -> bool:
    if spec.variant not in VARIANTS:
        return False

    # Blocks of a stage are alike here, so the first one stands for all.
    dense = standard_spec(spec.variant, spec.num_classes)
    return all(
        (stage.width, len(stage.blocks), stage.blocks[0].ffn_dim)
        == (standard.width, len(standard.blocks), standard.blocks[0].ffn_dim)
        for stage, standard in zip(spec.stages, dense.stages, strict=True)
    )


def _call_of_nvlabs(spec: Spec) -> str:
    """Returns how NVlabs' and bubbliiiing's classes are called to build the network."""
    stages = spec.stages
    encoder = _spell_arguments(
        embed_dims=[stage.width for stage in stages],
        num_heads=[stage.blocks[0].num_heads for stage in stages],
        mlp_ratios=[stage.blocks[0].ffn_dim // stage.width for stage in stages],
        depths=[len(stage.blocks) for stage in stages],
        sr_ratios=[stage.reduction_ratio for stage in stages],
    )
    if spec.in_channels != RGB:
        encoder += f", in_chans={spec.in_channels}"
    # Their defaults have no biases and another eps; a variant's class passes these.
    encoder += ", qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)"
    return f"MixVisionTransformer({encoder}), decode head width {spec.decoder_dim}"


def _call_of_mmseg(spec: Spec) -> str:
    """Returns how mmsegmentation's classes are called to build the network; some arguments are all stages'."""
    first = spec.stages[0]
    encoder = _spell_arguments(
        embed_dims=first.width // first.blocks[0].num_heads,
        num_heads=[stage.blocks[0].num_heads for stage in spec.stages],
        num_layers=[len(stage.blocks) for stage in spec.stages],
        mlp_ratio=first.blocks[0].ffn_dim // first.width,
    )
    if spec.in_channels != RGB:
        encoder += f", in_channels={spec.in_channels}"
    head = _spell_arguments(
        in_channels=[stage.width for stage in spec.stages], channels=spec.decoder_dim
    )
    return f"MixVisionTransformer({encoder}), SegformerHead({head})"


def _spell_arguments(**values: int | list[int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
