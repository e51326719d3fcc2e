"""Foreign state dicts to ours, and back: the names of dialects.py put on tensors, strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from segprune.checkpoint.dialects import (
    HEADS,
    NUMERICS,
    Layer,
    Naming,
    count_blocks,
    count_depths,
    decoder_dim,
    find_reduced,
    join_key,
    list_layers,
    naming_for,
    split_key,
)
from segprune.checkpoint.ours import check_keys, check_state, expected_state, spell_row
from segprune.spec import (
    DEPTHS,
    MOST_CHANNELS,
    NUM_HEADS,
    NUM_STAGES,
    OTHER,
    RGB,
    VARIANTS,
    WIDTHS,
    Spec,
    stage_name,
    standard_spec,
    with_widths,
)

CLASSIFIER = "decode_head.classifier"


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
    ours = _with_two_classes(to_ours(state_dict, naming))
    spec = infer_spec(ours, naming, num_classes=num_classes, heads=heads)

    # Tensors are compared under our names. The message then gives those in the file.
    expected = expected_state(spec, encoder_only=not naming.head)
    wrong = [
        key for key in expected if key not in ours or ours[key].shape != expected[key].shape
    ]
    wrong += [key for key in ours if key not in expected]
    if wrong:
        _raise_in_their_names(wrong, state_dict, expected, naming, spec)
    return spec, ours


def _with_two_classes(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a network of one logit z, whose sigmoid tells two classes apart, as one of the logits 0 and z.

    It is exact: the larger logit is that of sigmoid(z) > 1/2, and cross-entropy is binary cross-entropy.
    """
    names = [f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"]
    if any(name not in ours or ours[name].shape[:1] != (1,) for name in names):
        return ours
    return ours | {
        name: torch.cat([torch.zeros_like(ours[name]), ours[name]]) for name in names
    }


def _raise_in_their_names(
    wrong: Iterable[str],
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    naming: Naming,
    spec: Spec,
) -> None:
    """Raises `check_state`'s ValueError for the layers that hold our `wrong` keys, renamed as in the file."""
    layers = _layers_by_our_name(naming, spec)
    present, allowed = {}, {}

    # For each wrong tensor: the file's one that holds it, and what that should look like.
    for key in wrong:
        name, _, leaf = key.rpartition(".")
        layer = layers[name]
        theirs = join_key(layer.theirs, leaf)  # several of ours may lie in one of theirs
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
    # Depths are counted in the file, before it is known which variant it is.
    layers = {
        layer.theirs: layer
        for layer in list_layers(
            naming, count_depths(naming, state_dict), find_reduced(naming, state_dict)
        )
    }

    ours: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state_dict.items():
        name, leaf = split_key(key)
        if name in layers:
            ours |= _take_apart(layers[name], leaf, tensor)
        elif not key.startswith(naming.extras):
            unknown.append(key)

    # Every layer has a weight at least. Other tensors are checked against the spec later.
    weights = [join_key(name, "weight") for name in layers]
    check_keys([key for key in weights if key not in state_dict], unknown)
    return ours


def from_ours(state_dict: Mapping[str, Tensor], spec: Spec, dialect: str) -> dict[str, Tensor]:
    """The inverse of `to_ours`, in the names that the dialect's own files have (hf: as on disk).

    Only renames keys: the caller must check that the other tool uses the same numerics and accepts these widths.
    Raises ValueError for a folded decode head and for another kind of head, for a block without attention or FFN, and
    for layers of different shapes that are one there.
    """
    _check_nameable(spec, dialect)
    layers = _layers_by_our_name(naming_for(dialect), spec)
    renamed = {}
    for key in state_dict:
        name, _, leaf = key.rpartition(".")
        layer = layers[name]
        if name == layer.ours[0]:  # the others of a joined layer are written with the first
            renamed[join_key(layer.theirs, leaf)] = _put_together(layer, leaf, state_dict)
    return renamed


def _check_nameable(spec: Spec, dialect: str) -> None:
    """Raises ValueError for what the dialect has no names for."""
    if dialect not in NUMERICS:
        raise ValueError(
            f"Cannot write the names of {dialect!r}; choose one of {', '.join(NUMERICS)}."
        )

    # Each code base has one kind of decode head, and none has a folded one.
    if spec.folded:
        raise ValueError(
            f"The decode head is folded, which {dialect} cannot name; unfold it with segprune.fold first."
        )
    if spec.head != HEADS[dialect]:
        others = ", ".join(name for name, head in HEADS.items() if head == spec.head)
        raise ValueError(
            f"The decode head has {spec.head_form.branches}, which {dialect} cannot name; write the names of {others}."
        )

    for i, stage in enumerate(spec.stages, 1):
        if not all(block.has_attention and block.has_ffn for block in stage.blocks):
            raise ValueError(
                f"Stage {i} has a block without attention or FFN, which {dialect} cannot name; "
                "write a network whose blocks are whole."
            )


def _take_apart(layer: Layer, leaf: str, tensor: Tensor) -> dict[str, Tensor]:
    """Returns the tensors of ours that one of theirs holds. An odd shape gives names or shapes that no check passes."""
    if layer.pointwise and leaf == "weight":
        # A plain matrix is no 1×1 convolution: with a dimension
        # too many it does not pass for our linear layer.
        tensor = tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor[..., None]

    # It cannot be split: left whole, its shape is refused by the check.
    if tensor.dim() <= layer.dim:
        return {f"{layer.ours[0]}.{leaf}": tensor}
    pieces = tensor.tensor_split(len(layer.ours), layer.dim)
    return {f"{ours}.{leaf}": piece for ours, piece in zip(layer.ours, pieces, strict=True)}


def _put_together(layer: Layer, leaf: str, state_dict: Mapping[str, Tensor]) -> Tensor:
    """Returns their tensor that holds ours: the inverse of `_take_apart`."""
    keys = [f"{ours}.{leaf}" for ours in layer.ours]

    # Tensors that are joined must be alike, since theirs is split into equal parts again.
    first, *others = keys
    tensor = state_dict[first]
    for key in others:
        shape, other = spell_row(tensor.shape), spell_row(state_dict[key].shape)
        if other != shape:
            raise ValueError(
                f"{first} has the shape {shape} and {key} {other}, which one layer for both cannot hold; "
                "write the names of a code base that keeps them apart."
            )

    if others:
        tensor = torch.cat([state_dict[key] for key in keys], layer.dim)
    return tensor[:, :, None, None] if layer.pointwise and leaf == "weight" else tensor


def _layers_by_our_name(naming: Naming, spec: Spec) -> dict[str, Layer]:
    """Returns for each of our layers the one of theirs that holds it."""
    layers: dict[str, Layer] = {}
    depths = [len(stage.blocks) for stage in spec.stages]
    reduced = [i for i, stage in enumerate(spec.stages) if stage.reduction_ratio > 1]
    for layer in list_layers(naming, depths, reduced):
        layers |= dict.fromkeys(layer.ours, layer)
    return layers


def infer_spec(
    ours: Mapping[str, Tensor],
    naming: Naming,
    *,
    num_classes: int | None = None,
    heads: Sequence[int] | None = None,
) -> Spec:
    """Returns the network that the shapes are of; heads, which no shape shows, are 1 2 5 8 unless `heads` tells them.

    The images may have any channels, and the decode head any width. Where `heads` says how many each stage has, so may
    all stages and FFNs. Raises ValueError if stage widths and depths are those of no variant and `heads` is not given,
    or if there is no decode head to read the number of classes off and `num_classes` is not given.
    """
    stages = [stage_name(i) for i in range(NUM_STAGES)]
    widths = tuple(ours[f"{stage}.patch_embed.proj.weight"].shape[0] for stage in stages)
    depths = tuple(count_blocks(ours, f"{stage}.blocks.") for stage in stages)
    variant = _find_variant(widths, depths, narrowed=heads is not None)

    # A bare backbone will get the head that its dialect usually has.
    dim = decoder_dim(naming.dialect, variant)
    if naming.head:
        dim = ours["decode_head.norm.weight"].shape[0]
        num_classes = ours[f"{CLASSIFIER}.weight"].shape[0]
    if num_classes is None:
        raise ValueError(
            "This is a backbone without decode head, so its classes are unknown; give `num_classes` to train it, "
            "or a whole network."
        )

    # A network of other sizes is laid out like the smallest variant. What shapes show is then read off them.
    home = variant if variant in VARIANTS else VARIANTS[0]
    spec = standard_spec(home, num_classes, numerics=NUMERICS[naming.dialect], decoder_dim=dim)
    layout = []
    for i, stage in enumerate(spec.stages):
        ratio = _read_ratio(ours, stages[i])
        num_heads, ffn_dim = stage.blocks[0].num_heads, stage.blocks[0].ffn_dim
        if heads is not None:
            num_heads = heads[i]
            ffn_dim = ours[f"{stages[i]}.blocks.0.mlp.fc1.weight"].shape[0]
        if widths[i] % num_heads:
            raise ValueError(
                f"`heads` {spell_row(heads or NUM_HEADS)} do not divide the stage widths {spell_row(widths)}; "
                "give the number of attention heads that each stage was trained with."
            )
        stage = replace(stage, reduction_ratio=ratio, blocks=(stage.blocks[0],) * depths[i])
        layout.append(with_widths(stage, widths[i], num_heads, ffn_dim))

    first = ours[f"{stages[0]}.patch_embed.proj.weight"]
    # An odd shape is left for the check of all shapes.
    in_channels = first.shape[1] if first.dim() == 4 else RGB
    if not 1 <= in_channels <= MOST_CHANNELS:
        raise ValueError(
            f"It takes images of {in_channels} channels, where 1 to {MOST_CHANNELS} are allowed; give another network."
        )
    return replace(
        spec,
        variant=variant,
        stages=tuple(layout),
        head=HEADS[naming.dialect],
        in_channels=in_channels,
    )


def _read_ratio(ours: Mapping[str, Tensor], stage: str) -> int:
    """Returns the reduction ratio of a stage, which is the size of its filters."""
    shapes = [
        tensor.shape
        for key, tensor in ours.items()
        if key.startswith(f"{stage}.") and key.endswith(".attn.sr.weight")
    ]
    # An odd shape is left for the check of all shapes.
    ratios = [shape[3] for shape in shapes if len(shape) == 4]
    return max(ratios, key=ratios.count) if ratios else 1


def _find_variant(widths: tuple[int, ...], depths: tuple[int, ...], *, narrowed: bool) -> str:
    """Returns the variant with these stage widths and depths; if `narrowed`, only the first stage's width counts.

    A narrowed network that is like no variant is an "other" one.
    """
    for variant in VARIANTS:
        if (widths, depths) == (WIDTHS[variant], DEPTHS[variant]):
            return variant
    for variant in VARIANTS:
        # Depths must be a variant's. The first width tells b0 from b1, which are equally deep.
        if narrowed and (widths[0], depths) == (WIDTHS[variant][0], DEPTHS[variant]):
            return variant
    if narrowed and all(depths):
        return OTHER

    known = [
        f"{name}: {spell_row(WIDTHS[name])}, {spell_row(DEPTHS[name])}" for name in VARIANTS
    ]
    raise ValueError(
        f"Its stage widths {spell_row(widths)} and depths {spell_row(depths)} are those of no variant "
        f"({'; '.join(known)}); give `heads`, how many attention heads each stage has, which weights do not tell."
    )
