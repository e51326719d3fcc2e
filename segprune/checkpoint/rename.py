"""Foreign state dicts to ours, and back: the names of dialects.py put on tensors, strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from segprune.checkpoint.dialects import (
    HEADS,
    NUM_STAGES,
    NUMERICS,
    Layer,
    Naming,
    count_blocks,
    count_depths,
    decoder_dim,
    join_key,
    list_layers,
    naming_for,
    split_key,
)
from segprune.checkpoint.ours import check_keys, check_state, expected_state, row
from segprune.spec import DEPTHS, NUM_HEADS, VARIANTS, WIDTHS, Spec, standard_spec, with_widths


def translate(
    state_dict: Mapping[str, Tensor],
    naming: Naming,
    *,
    num_classes: int | None = None,
    heads: Sequence[int] | None = None,
) -> tuple[Spec, dict[str, Tensor]]:
    """Returns the spec and the weights in our names; of a bare backbone, the encoder's alone.

    Strict: raises ValueError that names the file's own keys that are missing, unknown or of another shape than its
    variant's. `num_classes` is that of the head which a bare backbone will get, `heads` as for `infer_spec`.
    """
    ours = to_ours(state_dict, naming)
    spec = infer_spec(ours, naming, num_classes=num_classes, heads=heads)

    expected = expected_state(spec, encoder_only=not naming.head)
    wrong = [key for key in expected if key not in ours or ours[key].shape != expected[key].shape]
    wrong += [key for key in ours if key not in expected]
    if wrong:
        _raise_in_their_names(wrong, state_dict, expected, naming, spec)
    return spec, ours


def _raise_in_their_names(
    wrong: Iterable[str], state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], naming: Naming, spec: Spec
) -> None:
    """Raises `check_state`'s ValueError for the layers that hold our `wrong` keys, renamed as in the file."""
    layers = {ours: layer for layer in list_layers(naming, _depths(spec)) for ours in layer.ours}
    present, allowed = {}, {}
    for key in wrong:
        name, _, leaf = key.rpartition(".")
        layer = layers[name]
        theirs = join_key(layer.theirs, leaf)
        if theirs in state_dict:
            present[theirs] = state_dict[theirs]
        if key in expected:
            allowed[theirs] = _put_together(layer, leaf, expected)

    check_state(present, allowed, spec.variant)
    raise AssertionError(f"no layer of the file differs, but ours do: {wrong}")


def to_ours(state_dict: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """Returns the same tensors under our names; a layer that holds several of ours is taken apart.

    Left out are decode_head.conv_seg, which nvlabs saves and does not use, and a bare backbone's image classifier.
    Raises ValueError that names any other unknown key, and a layer without weight.
    """
    layers = {layer.theirs: layer for layer in list_layers(naming, count_depths(naming, state_dict))}

    ours: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state_dict.items():
        name, leaf = split_key(key)
        if name in layers:
            ours |= _take_apart(layers[name], leaf, tensor)
        elif not key.startswith(naming.extras):
            unknown.append(key)

    weights = [join_key(name, "weight") for name in layers]
    check_keys([key for key in weights if key not in state_dict], unknown)
    return ours


def from_ours(state_dict: Mapping[str, Tensor], spec: Spec, dialect: str) -> dict[str, Tensor]:
    """The inverse of `to_ours`, in the names that the dialect's own files have (hf: as on disk).

    Only renames keys: the caller must check that the other tool uses the same numerics and accepts these widths.
    Raises ValueError for a folded decode head and for another kind of head, for a block without attention or FFN, and
    for layers of different shapes that are one there.
    """
    if dialect not in NUMERICS:
        raise ValueError(f"Cannot write the names of {dialect!r}; choose one of {', '.join(NUMERICS)}.")
    if spec.folded:
        raise ValueError(f"The decode head is folded, which {dialect} cannot name; unfold it with segprune.fold first.")
    if spec.head != HEADS[dialect]:
        others = ", ".join(name for name, head in HEADS.items() if head == spec.head)
        raise ValueError(
            f"The decode head has {spec.head_form.branches}, which {dialect} cannot name; write the names of {others}."
        )
    bare = [i for i, s in enumerate(spec.stages, 1) for b in s.blocks if not (b.has_attention and b.has_ffn)]
    if bare:
        raise ValueError(
            f"Stage {bare[0]} has a block without attention or FFN, which {dialect} cannot name; "
            "write a network whose blocks are whole."
        )

    layers = {ours: layer for layer in list_layers(naming_for(dialect), _depths(spec)) for ours in layer.ours}
    renamed = {}
    for key in state_dict:
        name, _, leaf = key.rpartition(".")
        layer = layers[name]
        if name == layer.ours[0]:  # the others of a joined layer are written with the first
            renamed[join_key(layer.theirs, leaf)] = _put_together(layer, leaf, state_dict)
    return renamed


def _take_apart(layer: Layer, leaf: str, tensor: Tensor) -> dict[str, Tensor]:
    """Returns the tensors of ours that one of theirs holds. An odd shape gives names or shapes that no check passes."""
    if layer.pointwise and leaf == "weight":
        # A plain matrix is no 1×1 convolution: with a dimension too many it does not pass for our linear layer.
        tensor = tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor[..., None]
    if tensor.dim() <= layer.dim:
        return {f"{layer.ours[0]}.{leaf}": tensor}
    pieces = tensor.tensor_split(len(layer.ours), layer.dim)
    return {f"{ours}.{leaf}": piece for ours, piece in zip(layer.ours, pieces, strict=True)}


def _put_together(layer: Layer, leaf: str, state_dict: Mapping[str, Tensor]) -> Tensor:
    """Returns their tensor that holds ours: the inverse of `_take_apart`."""
    keys = [f"{ours}.{leaf}" for ours in layer.ours]
    first, *others = keys
    for key in others:
        if state_dict[key].shape != state_dict[first].shape:
            raise ValueError(
                f"{first} has the shape {row(state_dict[first].shape)} and {key} {row(state_dict[key].shape)}, which "
                "one layer for both cannot hold; write the names of a code base that keeps them apart."
            )

    tensor = state_dict[first] if not others else torch.cat([state_dict[key] for key in keys], layer.dim)
    return tensor[:, :, None, None] if layer.pointwise and leaf == "weight" else tensor


def _depths(spec: Spec) -> list[int]:
    return [len(stage.blocks) for stage in spec.stages]


def infer_spec(
    ours: Mapping[str, Tensor], naming: Naming, *, num_classes: int | None = None, heads: Sequence[int] | None = None
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
        known = "; ".join(f"{name}: {row(WIDTHS[name])}, {row(DEPTHS[name])}" for name in VARIANTS)
        raise ValueError(
            f"Its stage widths {row(widths)} and depths {row(depths)} are those of no variant ({known}); give the "
            "network as it was before another tool changed it, since weights alone do not tell its heads."
        )
    dim = decoder_dim(naming.dialect, variants[0])
    if naming.head:
        dim, num_classes = (ours[f"decode_head.{name}.weight"].shape[0] for name in ("norm", "classifier"))
    if num_classes is None:
        raise ValueError(
            "This is a backbone without decode head, so its classes are unknown; give --num_classes to train it, "
            "or a whole network."
        )
    spec = standard_spec(variants[0], num_classes, numerics=NUMERICS[naming.dialect], decoder_dim=dim)
    spec = replace(spec, head=HEADS[naming.dialect])
    if heads is None:
        return spec
    ffn_dims = [ours[f"encoder.stages.{i}.blocks.0.mlp.fc1.weight"].shape[0] for i in range(NUM_STAGES)]
    stages = map(with_widths, spec.stages, widths, heads, ffn_dims)
    return replace(spec, stages=tuple(stages))
