"""State dicts as NVlabs' and bubbliiiing's code saves them."""

from __future__ import annotations

import os
from pathlib import Path

from segprune.convert import NUMERICS, from_ours
from segprune.files import PICKLES, atomic_files, save_record
from segprune.fold import unfold_decoder
from segprune.formats.verify import Written, file_reader, written
from segprune.huggingface import HEADS
from segprune.model import SegFormer
from segprune.spec import VARIANTS, Spec, standard_spec
from segprune.uniform import uniform_problem, with_numerics


def write_file(model: SegFormer, path: str | os.PathLike[str], dialect: str) -> Written:
    """Write a .pth, .pt or .bin file that `dialect`'s own code loads, read it again and keep it if the logits agree.

    nvlabs: {"meta", "state_dict"}, as its training leaves it, the meta saying the heads of a pruned network;
    bubbliiiing: the bare state dict. A folded head is unfolded. ValueError for another ending, for a network that their
    classes cannot hold, for another GELU, and for logits that differ.
    """
    path = Path(path)
    if path.suffix not in PICKLES:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; {dialect}'s code reads {', '.join(PICKLES)}: give such a name."
        )
    problem = uniform_problem(model.spec)
    if problem is not None:
        raise ValueError(
            f"{dialect}'s classes cannot hold this network, since {problem}; prune with --uniform for them, or write "
            "--to hf, which needs no uniform widths."
        )
    whole = unfold_decoder(model)
    state, spec = with_numerics(whole.state_dict(), whole.spec, NUMERICS[dialect])
    named = {name: tensor.detach().cpu().clone() for name, tensor in from_ours(state, spec, dialect).items()}
    heads = [stage.blocks[0].num_heads for stage in spec.stages]
    meta = {} if _is_standard(spec) else {"hidden_sizes": [stage.width for stage in spec.stages], HEADS: heads}
    with atomic_files(path) as temporary:
        save_record({"meta": meta, "state_dict": named} if dialect == "nvlabs" else named, temporary)
        reader, alone = file_reader(temporary, dialect, heads)
        return written(model, {"segprune": reader}, tuple(_notes(whole.spec, dialect, alone)))


def _notes(spec: Spec, dialect: str, readable: bool) -> list[str]:
    notes = []
    if spec.numerics.align_corners != NUMERICS[dialect].align_corners:
        notes.append(
            f"The network's last upsampling has align_corners={spec.numerics.align_corners} and theirs "
            f"{not spec.numerics.align_corners}; set it there, or the rims of masks differ."
        )
    if not _is_standard(spec):
        notes.append(f"Build it with their base classes, not with a variant's: {_arguments(spec)}.")
    if not readable:
        notes.append("segprune itself cannot load the file, which does not say its heads; keep the checkpoint as well.")
    return notes


def _is_standard(spec: Spec) -> bool:
    if spec.variant not in VARIANTS:
        return False
    dense = standard_spec(spec.variant, spec.num_classes)
    return [(s.width, len(s.blocks), s.blocks[0].ffn_dim) for s in dense.stages] == [
        (s.width, len(s.blocks), s.blocks[0].ffn_dim) for s in spec.stages
    ] and dense.decoder_dim == spec.decoder_dim


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
