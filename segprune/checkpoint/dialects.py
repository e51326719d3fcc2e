"""Who writes checkpoints: the names and numerics of each code base, and how to tell them apart.

A dialect is nvlabs (the paper's authors), bubbliiiing, hf (transformers), smp (segmentation_models_pytorch), mmseg
(mmsegmentation 1.x) or segprune. Names and numerics are those of the published checkpoints and of the libraries that
write them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from segprune.spec import DECODER_DIMS, NUM_STAGES, Head, Numerics, stage_name

T = TypeVar("T")

# Where each code base differs from the paper's own (nvlabs).
NUMERICS = {
    "nvlabs": Numerics(),
    "bubbliiiing": Numerics(gelu="tanh", bn_eps=1e-3, bn_momentum=0.03, align_corners=True),
    "hf": Numerics(norm_eps=1e-5, head_dropout_kind="plain"),
    "smp": Numerics(
        head_dropout=0.0, align_corners=True
    ),  # no dropout, and its head ends in nn.UpsamplingBilinear2d
    "mmseg": Numerics(embed_norm_eps=1e-6),
}
HEADS: dict[str, Head] = {**dict.fromkeys(NUMERICS, "mlp"), "mmseg": "conv"}
DIALECTS = ("segprune", *NUMERICS)

# Our name of each part of a stage, then theirs in four columns: nvlabs (also bubbliiiing and
# smp), hf on disk, hf in memory from 5.9 on, mmseg. {i} is the stage counted from 0, {s} from
# 1. An empty cell is a layer that the code base joins with others, or does not join.
_PARTS = {
    "patch_embed.proj": (
        "patch_embed{s}.proj",
        "patch_embeddings.{i}.proj",
        "stages.{i}.patch_embeddings.proj",
        "layers.{i}.0.projection",
    ),
    "patch_embed.norm": (
        "patch_embed{s}.norm",
        "patch_embeddings.{i}.layer_norm",
        "stages.{i}.patch_embeddings.layer_norm",
        "layers.{i}.0.norm",
    ),
    "norm": ("norm{s}", "layer_norm.{i}", "stages.{i}.layer_norm", "layers.{i}.2"),
}
_BLOCKS = ("block{s}.", "block.{i}.", "stages.{i}.blocks.", "layers.{i}.1.")
_BLOCK_PARTS = {
    "norm1": ("norm1", "layer_norm_1", "layernorm_before", "norm1"),
    "attn.qkv": ("", "", "", "attn.attn.in_proj"),
    "attn.q": ("attn.q", "attention.self.query", "attention.q_proj", ""),
    "attn.kv": ("attn.kv", "", "", ""),
    "attn.k": ("", "attention.self.key", "attention.k_proj", ""),
    "attn.v": ("", "attention.self.value", "attention.v_proj", ""),
    "attn.proj": (
        "attn.proj",
        "attention.output.dense",
        "attention.o_proj",
        "attn.attn.out_proj",
    ),
    "attn.sr": (
        "attn.sr",
        "attention.self.sr",
        "attention.sequence_reduction.sequence_reduction",
        "attn.sr",
    ),
    "attn.norm": (
        "attn.norm",
        "attention.self.layer_norm",
        "attention.sequence_reduction.layer_norm",
        "attn.norm",
    ),
    "norm2": ("norm2", "layer_norm_2", "layernorm_after", "norm2"),
    "mlp.fc1": ("mlp.fc1", "mlp.dense1", "mlp.fc1", "ffn.layers.0"),
    "mlp.dwconv": (
        "mlp.dwconv.dwconv",
        "mlp.dwconv.dwconv",
        "mlp.dwconv.dwconv",
        "ffn.layers.1",
    ),
    "mlp.fc2": ("mlp.fc2", "mlp.dense2", "mlp.fc2", "ffn.layers.4"),
}
_REDUCTION = (
    "attn.sr",
    "attn.norm",
)  # where the ratio is 1, as in the last stage, there are none
# One layer of theirs that holds several of ours, in this
# order, side by side in this dimension of the weight.
JOINED = {
    "attn.kv": (("attn.k", "attn.v"), 0),
    "attn.qkv": (("attn.q", "attn.k", "attn.v"), 0),
    "decode_head.fuses": (tuple(f"decode_head.fuses.{i}" for i in range(NUM_STAGES)), 1),
}


def _head(branch: str, *rest: str) -> dict[str, str]:
    """Returns their name of each of our layers: the branches, then in `rest` fuse, norm and classifier."""
    # Code bases count stages from 0 (i), from 1 (s), or backwards (r).
    names = {
        f"decode_head.branches.{i}": branch.format(i=i, s=i + 1, r=3 - i)
        for i in range(NUM_STAGES)
    }
    return names | dict(
        zip(
            ("decode_head.fuse", "decode_head.norm", "decode_head.classifier"),
            rest,
            strict=True,
        )
    )


def _mmseg_head() -> dict[str, str]:
    """Returns the names of mmsegmentation's kind of head, whose fuse convolution is one layer per stage here."""
    fusion = "decode_head.fusion_conv"
    names = _head(
        "decode_head.convs.{i}.conv", f"{fusion}.conv", f"{fusion}.bn", "decode_head.conv_seg"
    )
    names["decode_head.fuses"] = names.pop("decode_head.fuse")

    # Each branch has a BatchNorm in this head.
    for i in range(NUM_STAGES):
        names[f"decode_head.branch_norms.{i}"] = f"decode_head.convs.{i}.bn"
    return names


_FUSE = "decode_head.linear_fuse"
_NVLABS_HEAD = _head(
    "decode_head.linear_c{s}.proj", f"{_FUSE}.conv", f"{_FUSE}.bn", "decode_head.linear_pred"
)
_SMP_HEAD = _head(
    "decoder.mlp_stage.{r}.linear",
    "decoder.fuse_stage.0",
    "decoder.fuse_stage.1",
    "segmentation_head.0",
)
_HF_REST = (_FUSE, "decode_head.batch_norm", "decode_head.classifier")

# Our names of what is a linear layer here and a 1×1 convolution in mmsegmentation.
_MMSEG_BRANCHES = tuple(f"decode_head.branches.{i}" for i in range(NUM_STAGES))
_MMSEG_POINTWISE = ("mlp.fc1", "mlp.fc2", "decode_head.fuses", *_MMSEG_BRANCHES)


@dataclass(frozen=True)
class Naming:
    """How one code base names a network: a prefix, a column of the tables above, and the decode head's layers.

    `head` is empty for a bare backbone. Keys that begin with one of `extras` belong to layers that no network uses.
    `pointwise` are the ends of our names of linear layers that this code base keeps as 1×1 convolutions. `note` says
    what had to be assumed where two code bases share their names.
    """

    dialect: str
    prefix: str
    column: int
    head: Mapping[str, str]
    extras: tuple[str, ...] = ()
    pointwise: tuple[str, ...] = ()
    note: str | None = None


def _first_key(naming: Naming) -> str:
    """Returns the key of the network's first weight, which is another one in every column and under every prefix."""
    first = _PARTS["patch_embed.proj"][naming.column].format(i=0, s=1)
    return f"{naming.prefix}{first}.weight"


NAMINGS = (
    Naming("nvlabs", "backbone.", 0, _NVLABS_HEAD, extras=("decode_head.conv_seg.",)),
    Naming("nvlabs", "", 0, {}),
    Naming("smp", "encoder.", 0, _SMP_HEAD),
    Naming("hf", "segformer.encoder.", 1, _head("decode_head.linear_c.{i}.proj", *_HF_REST)),
    Naming("hf", "encoder.", 1, {}),
    Naming("hf", "segformer.", 2, _head("decode_head.linear_projections.{i}.proj", *_HF_REST)),
    Naming("hf", "", 2, {}),
    Naming("mmseg", "backbone.", 3, _mmseg_head(), pointwise=_MMSEG_POINTWISE),
    Naming("mmseg", "", 3, {}, pointwise=_MMSEG_POINTWISE),
)
_OURS = "encoder.stages.0.patch_embed.proj.weight"
COUNTERS = ("total_ops", "total_params")  # of thop, in every module
_TRAINING = ("loss", "criterion")  # how parts of a decode head begin that no network uses
FIRST_KEYS = tuple(sorted((_OURS, *map(_first_key, NAMINGS)), key=len, reverse=True))
_IMAGE_CLASSIFIERS = ("head.", "classifier.")  # on a bare backbone: nvlabs, hf
_TWINS = ("nvlabs", "bubbliiiing")  # they share every name


def detect(
    keys: Collection[str], wrapper: Collection[str] = (), dialect: str | None = None
) -> Naming:
    """Returns the naming of a foreign state dict, from its keys alone.

    `wrapper` are the keys around the state dict in its file. `dialect` overrules what had to be assumed. Raises
    ValueError if the keys are not of that dialect, of no SegFormer, or segprune's own.
    """
    if dialect is not None and dialect not in DIALECTS:
        raise ValueError(f"Unknown dialect {dialect!r}; choose one of {', '.join(DIALECTS)}.")
    if _OURS in keys:
        raise ValueError(
            "These are segprune's weights without their spec, which says how to compute with them; "
            "save the network with segprune.save(model, path)."
        )

    naming = _tell_twins_apart(_match_naming(keys), keys, wrapper)
    if dialect is None:
        return naming

    # The names decide; a given dialect only chooses between code bases that share them.
    allowed = _TWINS if naming.dialect in _TWINS else (naming.dialect,)
    if dialect not in allowed:
        names = " or ".join(allowed)
        raise ValueError(
            f"The names are of {names}, but `dialect` {dialect} was given; leave it out or give {names}."
        )
    return replace(naming, dialect=dialect, note=None)


def _match_naming(keys: Collection[str]) -> Naming:
    """Returns the naming whose first patch embedding is there; without its head if the keys have none."""
    for naming in NAMINGS:
        if _first_key(naming) in keys:
            break
    else:
        raise ValueError(
            "This is not a SegFormer: expected keys such as backbone.patch_embed1.proj.weight or "
            f"segformer.encoder.patch_embeddings.0.proj.weight, found {name_some(keys)}; give a SegFormer's checkpoint."
        )

    # A bare backbone may still have the image classifier that it was trained with.
    if naming.head and any(key.startswith(_head_stems(naming)) for key in keys):
        return naming
    return replace(naming, head={}, extras=_IMAGE_CLASSIFIERS)


def _head_stems(naming: Naming) -> tuple[str, ...]:
    """Returns how the names of its decode head begin."""
    return tuple(sorted({f"{name.split('.')[0]}." for name in naming.head.values()}))


def split_beside(state_dict: Mapping[str, T], naming: Naming) -> tuple[dict[str, T], list[str]]:
    """Returns the network's own tensors, and the keys of what training left beside it.

    Beside it are other heads, losses with weights, what normalises images and counters. An unknown layer inside of the
    backbone or the decode head is no such thing.
    """
    if naming.prefix:
        roots = {naming.prefix.split(".")[0]}
    else:
        # A bare backbone's layers begin in as many ways as it has parts.
        roots = set()
        for column in (*_PARTS.values(), _BLOCKS):
            name = column[naming.column]
            roots |= {name.format(i=i, s=i + 1).split(".")[0] for i in range(NUM_STAGES)}
    stems = (*(f"{root}." for root in roots), *_head_stems(naming), *naming.extras)

    own: dict[str, T] = {}
    beside = []
    for key, value in state_dict.items():
        parts = key.split(".")
        if (
            not key.startswith(stems)
            or parts[-1] in COUNTERS
            or any(part.startswith(_TRAINING) for part in parts)
        ):
            beside.append(key)
        else:
            own[key] = value
    return own, beside


def _tell_twins_apart(
    naming: Naming, keys: Collection[str], wrapper: Collection[str]
) -> Naming:
    """Decides between nvlabs and bubbliiiing by what only NVlabs' training leaves, or assumes one in a note."""
    if naming.dialect != "nvlabs":
        return naming
    if not naming.head:
        note = "The backbone's names fit nvlabs and bubbliiiing; nvlabs was assumed (`dialect` overrules)."
        return replace(naming, note=note)

    # NVlabs' training saves a wrapper with the
    # weights, and a layer conv_seg that it never uses.
    wrapped = "meta" in wrapper or "state_dict" in wrapper
    if wrapped or any(key.startswith(naming.extras) for key in keys):
        return naming
    note = (
        "The names fit nvlabs and bubbliiiing; bubbliiiing was assumed (`dialect` overrules)."
    )
    return replace(naming, dialect="bubbliiiing", note=note)


def decoder_dim(dialect: str, variant: str) -> int:
    """Returns the published width of the decode head; mmsegmentation's, and one of other sizes, is that of a b0."""
    return 256 if dialect == "mmseg" else DECODER_DIMS.get(variant, 256)


def naming_for(dialect: str) -> Naming:
    """Returns the naming in which the dialect's own files are written."""
    home = "nvlabs" if dialect == "bubbliiiing" else dialect
    return next(naming for naming in NAMINGS if naming.dialect == home)


@dataclass(frozen=True)
class Layer:
    """One layer of another code base, and the one or more of ours whose tensors it holds."""

    theirs: str
    ours: tuple[str, ...]
    dim: int  # of the weight, in which ours lie side by side
    pointwise: bool  # it is a 1×1 convolution there and a linear layer here


def list_layers(naming: Naming, depths: Sequence[int], reduced: Collection[int]) -> list[Layer]:
    """Returns all layers of a network with that many blocks in each stage; in the stages `reduced` keys are reduced."""
    # Theirs by ours. The table is filled stage by stage, the decode head is there already.
    names = dict(naming.head)
    for i, depth in enumerate(depths):
        stage = stage_name(i)
        for part, columns in _PARTS.items():
            names[f"{stage}.{part}"] = naming.prefix + columns[naming.column].format(
                i=i, s=i + 1
            )

        # An empty cell: in this code base the part lies in another layer, or is split up.
        parts = {
            part: columns[naming.column]
            for part, columns in _BLOCK_PARTS.items()
            if columns[naming.column]
        }
        if i not in reduced:
            parts = {part: theirs for part, theirs in parts.items() if part not in _REDUCTION}
        for j in range(depth):
            for part, theirs in parts.items():
                names[f"{stage}.blocks.{j}.{part}"] = f"{_blocks_stem(naming, i)}{j}.{theirs}"

    return [_make_layer(ours, theirs, naming) for ours, theirs in names.items()]


def _make_layer(ours: str, theirs: str, naming: Naming) -> Layer:
    pointwise = ours.endswith(naming.pointwise)

    # A layer of theirs that holds several of ours lists them all.
    for whole, (parts, dim) in JOINED.items():
        if ours.endswith(whole):
            stem = ours.removesuffix(whole)
            return Layer(theirs, tuple(stem + part for part in parts), dim, pointwise)
    return Layer(theirs, (ours,), 0, pointwise)


def count_depths(naming: Naming, keys: Collection[str]) -> list[int]:
    """Returns the number of blocks in each stage, from the file's own keys."""
    return [count_blocks(keys, _blocks_stem(naming, i)) for i in range(NUM_STAGES)]


def find_reduced(naming: Naming, keys: Collection[str]) -> list[int]:
    """Returns the stages in which keys and values are reduced, from the file's own keys."""
    parts = tuple(f".{_BLOCK_PARTS[part][naming.column]}." for part in _REDUCTION)
    stages = []
    for i in range(NUM_STAGES):
        stem = _blocks_stem(naming, i)
        if any(key.startswith(stem) and any(part in key for part in parts) for key in keys):
            stages.append(i)
    return stages


def _blocks_stem(naming: Naming, i: int) -> str:
    return naming.prefix + _BLOCKS[naming.column].format(i=i, s=i + 1)


def split_key(key: str) -> tuple[str, str]:
    """Returns layer and tensor; nn.MultiheadAttention's in_proj_weight and in_proj_bias belong to a layer in_proj.

    >>> split_key("attn.in_proj_weight"), join_key("attn.in_proj", "weight")
    (('attn.in_proj', 'weight'), 'attn.in_proj_weight')
    """
    layer, _, tensor = key.replace(".in_proj_", ".in_proj.").rpartition(".")
    return layer, tensor


def join_key(layer: str, tensor: str) -> str:
    """The inverse of `split_key`."""
    return f"{layer}{'_' if layer.endswith('.in_proj') else '.'}{tensor}"


def count_blocks(keys: Iterable[str], stem: str) -> int:
    """Returns how many different numbers follow `stem`."""
    names = {key[len(stem) :].split(".")[0] for key in keys if key.startswith(stem)}
    return sum(name.isdecimal() for name in names)


def name_some(keys: Collection[str]) -> str:
    """Returns the first three keys, and how many more there are.

    >>> name_some(["a", "b", "c", "d", "e"]), name_some([])
    ('a, b, c and 2 more', 'none')
    """
    shown = ", ".join(list(keys)[:3])
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown or "none"
