"""Foreign state dicts to ours, and back: the names of segprune/dialects.py put on tensors, strictly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from segprune.dialects import (
    CONV_DECODER_DIM,
    HEAD_KINDS,
    JOINED,
    LAYOUTS,
    NUM_STAGES,
    NUMERICS,
    Layout,
    count_blocks,
    find_layout,
    join_key,
    layer_names,
    listed,
    split_key,
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
    """The same tensors under our names, layers that are one there taken apart.

    Left out are decode_head.conv_seg, which nvlabs saves and does not use, and a bare backbone's image classifier.
    Any other unknown key, and a layer without weight, is a ValueError that names it.
    """
    layout = find_layout(state_dict)
    names = {theirs: ours for ours, theirs in layer_names(layout, state_dict).items()}
    ours, unknown = {}, []
    for key, tensor in state_dict.items():
        layer, leaf = split_key(key)
        if layer in names:
            ours[f"{names[layer]}.{leaf}"] = tensor
        elif not key.startswith(layout.extras):
            unknown.append(key)
    weights = [join_key(layer, "weight") for layer in names]
    _check_keys([key for key in weights if key not in state_dict], unknown)
    return dict(_taken_apart(ours, layout))


def from_ours(state_dict: Mapping[str, Tensor], spec: Spec, dialect: str) -> dict[str, Tensor]:
    """The inverse of `to_ours`, in the names that the dialect's own files have (hf: as on disk).

    Names only: whether the other tool shares the numerics and expects the widths is the caller's to see. ValueError
    for a folded decode head and for another kind of head, for a block without attention or FFN, and for layers of
    different shapes that are one there.
    """
    if dialect not in NUMERICS:
        raise ValueError(f"Cannot write the names of {dialect!r}; choose one of {', '.join(NUMERICS)}.")
    if spec.folded:
        raise ValueError(f"The decode head is folded, which {dialect} cannot name; unfold it with segprune.fold first.")
    if spec.head != HEAD_KINDS[dialect]:
        kinds = {"mlp": "linear branches", "conv": "a BatchNorm and a ReLU in each branch"}
        others = ", ".join(name for name, head in HEAD_KINDS.items() if head == spec.head)
        raise ValueError(
            f"The decode head has {kinds[spec.head]}, which {dialect} cannot name; write the names of {others}."
        )
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
    renamed = {}
    for key, tensor in _put_together(state_dict, names):
        layer, _, leaf = key.rpartition(".")
        if tensor.dim() == 2 and layer.endswith(layout.pointwise):
            tensor = tensor[:, :, None, None]
        renamed[join_key(names[layer], leaf)] = tensor
    return renamed


def _taken_apart(state_dict: Mapping[str, Tensor], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Our names for layers that are one there; 1×1 convolutions as linear layers. Odd shapes are left for the check."""
    for key, tensor in state_dict.items():
        layer, _, leaf = key.rpartition(".")
        if tensor.shape[2:] == (1, 1) and layer.endswith(layout.pointwise):
            tensor = tensor.flatten(1)
        whole = next((whole for whole in JOINED if layer.endswith(whole)), None)
        if whole is None or tensor.dim() <= JOINED[whole][1]:
            yield key, tensor
            continue
        parts, dim = JOINED[whole]
        for part, piece in zip(parts, tensor.tensor_split(len(parts), dim), strict=True):
            yield f"{layer.removesuffix(whole)}{part}.{leaf}", piece


def _put_together(state_dict: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The inverse, for the layers in `names`."""
    joined: dict[str, tuple[str, list[str], int]] = {}
    for name in names:
        for whole, (parts, dim) in JOINED.items():
            if name.endswith(whole):
                ours = [name.removesuffix(whole) + part for part in parts]
                joined |= dict.fromkeys(ours, (name, ours, dim))
    for key, tensor in state_dict.items():
        layer, _, leaf = key.rpartition(".")
        if layer not in joined:
            yield key, tensor
            continue
        name, ours, dim = joined[layer]
        if layer == ours[0]:
            yield f"{name}.{leaf}", _side_by_side({f"{o}.{leaf}": state_dict[f"{o}.{leaf}"] for o in ours}, dim)


def _side_by_side(tensors: Mapping[str, Tensor], dim: int) -> Tensor:
    (first, tensor), *others = tensors.items()
    for key, other in others:
        if other.shape != tensor.shape:
            raise ValueError(
                f"{first} has the shape {_row(tensor.shape)} and {key} {_row(other.shape)}, which one layer for both "
                "cannot hold; write the names of a code base that keeps them apart."
            )
    return torch.cat(list(tensors.values()), dim)


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
    decoder_dim = CONV_DECODER_DIM if HEAD_KINDS[dialect] == "conv" else None
    if "decode_head.norm.weight" in ours:
        decoder_dim, num_classes = (ours[f"decode_head.{name}.weight"].shape[0] for name in ("norm", "classifier"))
    if num_classes is None:
        raise ValueError(
            "This is a backbone without decode head, so its classes are unknown; give --num_classes to train it, "
            "or a whole network."
        )
    spec = standard_spec(variants[0], num_classes, numerics=NUMERICS[dialect], decoder_dim=decoder_dim)
    spec = replace(spec, head=HEAD_KINDS[dialect])
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
