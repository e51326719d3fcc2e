"""Foreign state dicts to ours, and back: the names of segprune/dialects.py put on tensors, strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from segprune.dialects import (
    LAYOUTS,
    NUM_STAGES,
    NUMERICS,
    Layout,
    count_blocks,
    find_layout,
    layer_names,
    listed,
)
from segprune.model import SegFormer
from segprune.spec import DEPTHS, NUM_HEADS, VARIANTS, WIDTHS, Spec, standard_spec, with_widths


def convert(
    state_dict: Mapping[str, Tensor],
    dialect: str,
    *,
    num_classes: int | None = None,
    heads: Sequence[int] | None = None,
) -> tuple[Spec, dict[str, Tensor]]:
    """Spec and weights in our names; of a bare backbone, the encoder's alone.

    Strict: ValueError names the file's own keys that are missing, unknown or of another shape than its variant's.
    `num_classes` is that of the head which a bare backbone will get, `heads` as for `infer_spec`.
    """
    ours = to_ours(state_dict)
    spec = infer_spec(ours, dialect, num_classes=num_classes, heads=heads)
    layout = find_layout(state_dict)
    known = {key: tensor for key, tensor in state_dict.items() if not key.startswith(layout.extras)}
    check_state(known, _rename_back(expected_state(spec, encoder_only=not layout.head), layout), spec.variant)
    return spec, ours


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names, keys and values apart.

    Left out are decode_head.conv_seg, which nvlabs saves and does not use, and a bare backbone's image classifier.
    Any other unknown key, and a layer without weight, is a ValueError that names it.
    """
    layout = find_layout(state_dict)
    names = {theirs: ours for ours, theirs in layer_names(layout, state_dict).items()}
    ours, unknown = {}, []
    for key, tensor in state_dict.items():
        module, _, leaf = key.rpartition(".")
        if module in names:
            ours[f"{names[module]}.{leaf}"] = tensor
        elif not key.startswith(layout.extras):
            unknown.append(key)
    _check_keys([f"{name}.weight" for name in names if f"{name}.weight" not in state_dict], unknown)
    return dict(_split_kv(ours))


def from_ours(state_dict: Mapping[str, Tensor], spec: Spec, dialect: str) -> dict[str, Tensor]:
    """The inverse of `to_ours`, in the names that the dialect's own files have (hf: as on disk).

    Names only: whether the other tool shares the numerics and expects the widths is the caller's to see. ValueError
    for a folded decode head, for a block without attention or FFN, and for keys and values of different widths where
    they share one layer.
    """
    if dialect not in NUMERICS:
        raise ValueError(f"Cannot write the names of {dialect!r}; choose one of {', '.join(NUMERICS)}.")
    if spec.folded:
        raise ValueError(f"The decode head is folded, which {dialect} cannot name; unfold it with segprune.fold first.")
    bare = [i for i, s in enumerate(spec.stages, 1) for b in s.blocks if not (b.has_attention and b.has_ffn)]
    if bare:
        raise ValueError(
            f"Stage {bare[0]} has a block without attention or FFN, which {dialect} cannot name; "
            "write a network whose blocks are whole."
        )
    home = "nvlabs" if dialect == "bubbliiiing" else dialect
    return _rename_back(state_dict, next(layout for layout in LAYOUTS if layout.dialect == home))


def _rename_back(state_dict: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    names = layer_names(layout, state_dict, ours_in=True)
    fused = any(name.endswith("attn.kv") for name in names)
    renamed = {}
    for key, tensor in _join_kv(state_dict) if fused else state_dict.items():
        module, _, leaf = key.rpartition(".")
        renamed[f"{names[module]}.{leaf}"] = tensor
    return renamed


def _split_kv(state_dict: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    for key, tensor in state_dict.items():
        if ".attn.kv." in key:
            half = tensor.shape[0] // 2
            yield key.replace(".kv.", ".k."), tensor[:half]  # K's rows, then V's
            yield key.replace(".kv.", ".v."), tensor[half:]
        else:
            yield key, tensor


def _join_kv(state_dict: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    for key, k in state_dict.items():
        if ".attn.k." in key:
            v = state_dict[key.replace(".k.", ".v.")]
            if k.shape != v.shape:
                raise ValueError(
                    f"{key} has {k.shape[0]} rows and the values have {v.shape[0]}, which one layer for both cannot "
                    "hold; write the names of hf."
                )
            yield key.replace(".k.", ".kv."), torch.cat([k, v])
        elif ".attn.v." not in key:
            yield key, k


def infer_spec(
    ours: Mapping[str, Tensor], dialect: str, *, num_classes: int | None = None, heads: Sequence[int] | None = None
) -> Spec:
    """The standard network that the shapes are of; heads are 1 2 5 8, which no shape shows.

    The decode head may have any width. Where `heads` says how many each stage has, so may FFNs and the stages behind
    the first: the variant is then the one with that first stage and those depths. ValueError if stage widths and depths
    are those of no variant, or if there is no decode head to read the number of classes off and `num_classes` is not
    given.
    """
    widths = tuple(ours[f"encoder.stages.{i}.patch_embed.proj.weight"].shape[0] for i in range(NUM_STAGES))
    depths = tuple(count_blocks(ours, f"encoder.stages.{i}.blocks.") for i in range(NUM_STAGES))
    variants = [name for name in VARIANTS if (WIDTHS[name], DEPTHS[name]) == (widths, depths)]
    if variants:
        heads = None if heads is None else NUM_HEADS
    elif heads is not None:
        variants = [name for name in VARIANTS if (WIDTHS[name][0], DEPTHS[name]) == (widths[0], depths)]
    if not variants:
        known = "; ".join(f"{name}: {_row(WIDTHS[name])}, {_row(DEPTHS[name])}" for name in VARIANTS)
        raise ValueError(
            f"Its stage widths {_row(widths)} and depths {_row(depths)} are those of no variant ({known}); give the "
            "network as it was before another tool changed it, since weights alone do not tell its heads."
        )
    decoder_dim = None
    if "decode_head.fuse.weight" in ours:
        decoder_dim, num_classes = (ours[f"decode_head.{name}.weight"].shape[0] for name in ("fuse", "classifier"))
    if num_classes is None:
        raise ValueError(
            "This is a backbone without decode head, so its classes are unknown; give --num_classes to train it, "
            "or a whole network."
        )
    spec = standard_spec(variants[0], num_classes, numerics=NUMERICS[dialect], decoder_dim=decoder_dim)
    if heads is None:
        return spec
    ffn_dims = [ours[f"encoder.stages.{i}.blocks.0.mlp.fc1.weight"].shape[0] for i in range(NUM_STAGES)]
    stages = map(with_widths, spec.stages, widths, heads, ffn_dims)
    return replace(spec, stages=tuple(stages))


def expected_state(spec: Spec, *, encoder_only: bool = False) -> dict[str, Tensor]:
    """The state dict of `SegFormer(spec)` on the meta device: names and shapes without weights."""
    with torch.device("meta"):
        model = SegFormer(spec)
    return {k: v for k, v in model.state_dict().items() if not encoder_only or k.startswith("encoder.")}


def check_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    """ValueError that names the first keys that are missing, too many or of another shape than the network `name`'s."""
    _check_keys([key for key in expected if key not in found], [key for key in found if key not in expected])
    wrong = [key for key in expected if found[key].shape != expected[key].shape]
    if wrong:
        shapes = f"{_row(found[wrong[0]].shape)} where {name} has {_row(expected[wrong[0]].shape)}"
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]} has the shape {shapes}{more}; give a checkpoint of an unchanged network.")


def _check_keys(missing: Sequence[str], unknown: Sequence[str]) -> None:
    problems = [f"lacks {listed(missing)}"] if missing else []
    problems += [f"has the unknown {listed(unknown)}"] if unknown else []
    if problems:
        raise ValueError(f"The file {' and '.join(problems)}; give a whole state dict of an unchanged SegFormer.")


def _row(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
