"""Foreign key names and numerics to ours, and back.

A dialect says who wrote a checkpoint: nvlabs (the paper's authors), bubbliiiing, hf (transformers), smp
(segmentation_models_pytorch) or segprune. Names and numerics are those of the published checkpoints and of the
libraries that write them. mmsegmentation is recognised and refused: each branch of its decode head has a BatchNorm
and a ReLU, which makes it another network.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from segprune.model import SegFormer
from segprune.spec import DEPTHS, NUM_HEADS, VARIANTS, WIDTHS, Numerics, Spec, standard_spec, with_widths

NUMERICS = {
    "nvlabs": Numerics(),
    "bubbliiiing": Numerics(gelu="tanh", bn_eps=1e-3, bn_momentum=0.03, align_corners=True),
    "hf": Numerics(norm_eps=1e-5, head_dropout_kind="plain"),
    "smp": Numerics(head_dropout=0.0, align_corners=True),  # no dropout, and its head ends in nn.UpsamplingBilinear2d
}
DIALECTS = ("segprune", *NUMERICS)
NUM_STAGES = 4

# ours: nvlabs (also bubbliiiing and smp), hf on disk, hf in memory from 5.9 on; stage {i} counts from 0, {s} from 1
_PARTS = {
    "patch_embed.proj": ("patch_embed{s}.proj", "patch_embeddings.{i}.proj", "stages.{i}.patch_embeddings.proj"),
    "patch_embed.norm": (
        "patch_embed{s}.norm",
        "patch_embeddings.{i}.layer_norm",
        "stages.{i}.patch_embeddings.layer_norm",
    ),
    "norm": ("norm{s}", "layer_norm.{i}", "stages.{i}.layer_norm"),
}
_BLOCKS = ("block{s}.", "block.{i}.", "stages.{i}.blocks.")
_BLOCK_PARTS = {
    "norm1": ("norm1", "layer_norm_1", "layernorm_before"),
    "attn.q": ("attn.q", "attention.self.query", "attention.q_proj"),
    "attn.kv": ("attn.kv", "", ""),  # one layer: K's rows, then V's
    "attn.k": ("", "attention.self.key", "attention.k_proj"),
    "attn.v": ("", "attention.self.value", "attention.v_proj"),
    "attn.proj": ("attn.proj", "attention.output.dense", "attention.o_proj"),
    "attn.sr": ("attn.sr", "attention.self.sr", "attention.sequence_reduction.sequence_reduction"),
    "attn.norm": ("attn.norm", "attention.self.layer_norm", "attention.sequence_reduction.layer_norm"),
    "norm2": ("norm2", "layer_norm_2", "layernorm_after"),
    "mlp.fc1": ("mlp.fc1", "mlp.dense1", "mlp.fc1"),
    "mlp.dwconv": ("mlp.dwconv.dwconv", "mlp.dwconv.dwconv", "mlp.dwconv.dwconv"),
    "mlp.fc2": ("mlp.fc2", "mlp.dense2", "mlp.fc2"),
}
_REDUCTION = ("attn.sr", "attn.norm")  # the last stage has none


def _head(branch: str, *rest: str) -> dict[str, str]:
    """Our names -> theirs: the branches of the stages, then fuse, norm and classifier."""
    names = {f"decode_head.branches.{i}": branch.format(i=i, s=i + 1, r=3 - i) for i in range(NUM_STAGES)}
    return names | dict(zip(("decode_head.fuse", "decode_head.norm", "decode_head.classifier"), rest, strict=True))


_FUSE = "decode_head.linear_fuse"
_NVLABS_HEAD = _head("decode_head.linear_c{s}.proj", f"{_FUSE}.conv", f"{_FUSE}.bn", "decode_head.linear_pred")
_SMP_HEAD = _head("decoder.mlp_stage.{r}.linear", "decoder.fuse_stage.0", "decoder.fuse_stage.1", "segmentation_head.0")
_HF_REST = (_FUSE, "decode_head.batch_norm", "decode_head.classifier")


@dataclass(frozen=True)
class Layout:
    """One way to name a network: a prefix, a column of the tables above, the decode head (empty: a bare backbone).

    `extras` begin the names of what no network uses.
    """

    dialect: str
    prefix: str
    column: int
    head: Mapping[str, str]
    extras: tuple[str, ...] = ()


LAYOUTS = (
    Layout("nvlabs", "backbone.", 0, _NVLABS_HEAD, extras=("decode_head.conv_seg.",)),
    Layout("nvlabs", "", 0, {}),
    Layout("smp", "encoder.", 0, _SMP_HEAD),
    Layout("hf", "segformer.encoder.", 1, _head("decode_head.linear_c.{i}.proj", *_HF_REST)),
    Layout("hf", "encoder.", 1, {}),
    Layout("hf", "segformer.", 2, _head("decode_head.linear_projections.{i}.proj", *_HF_REST)),
    Layout("hf", "", 2, {}),
)
_HEADS = ("decode_head.", "decoder.", "segmentation_head.")
_IMAGE_CLASSIFIERS = ("head.", "classifier.")  # on a bare backbone: nvlabs, hf


def detect(keys: Collection[str], wrapper: Collection[str] = (), dialect: str | None = None) -> tuple[str, str | None]:
    """The dialect of a state dict's keys, and a note if it had to be assumed.

    `wrapper` are the keys around the state dict in its file. `dialect` overrules what was assumed; ValueError if
    the names are not of that dialect, of mmsegmentation, or of no SegFormer.
    """
    if dialect is not None and dialect not in DIALECTS:
        raise ValueError(f"Unknown dialect {dialect!r}; choose one of {', '.join(DIALECTS)}.")
    found, note = _recognise(keys, wrapper)
    if dialect is None:
        return found, note
    allowed = ("nvlabs", "bubbliiiing") if found in ("nvlabs", "bubbliiiing") else (found,)
    if dialect not in allowed:
        names = " or ".join(allowed)
        raise ValueError(f"The names are of {names}, but --dialect {dialect} was given; leave it out or give {names}.")
    return dialect, None


def _recognise(keys: Collection[str], wrapper: Collection[str]) -> tuple[str, str | None]:
    if "encoder.stages.0.patch_embed.proj.weight" in keys:
        return "segprune", None
    layout = _find_layout(keys)
    if layout.dialect != "nvlabs":
        return layout.dialect, None
    if not layout.head:
        return "nvlabs", "The backbone's names fit nvlabs and bubbliiiing; nvlabs was assumed (--dialect overrules)."
    if not {"meta", "state_dict"}.isdisjoint(wrapper) or any(key.startswith(layout.extras) for key in keys):
        return "nvlabs", None
    return "bubbliiiing", "The names fit nvlabs and bubbliiiing; bubbliiiing was assumed (--dialect overrules)."


def _find_layout(keys: Collection[str]) -> Layout:
    """The layout whose first patch embedding is there; without its head if the keys have none."""
    if any(f"{prefix}layers.0.0.projection.weight" in keys for prefix in ("backbone.", "")):
        raise ValueError(
            "This is a SegFormer of mmsegmentation, which is not supported because its decode head has a ReLU in each "
            "branch; use one trained with NVlabs', Hugging Face's or smp's code instead."
        )
    for layout in LAYOUTS:
        if f"{layout.prefix}{_PARTS['patch_embed.proj'][layout.column].format(i=0, s=1)}.weight" in keys:
            if any(key.startswith(_HEADS) for key in keys):
                return layout
            return replace(layout, head={}, extras=_IMAGE_CLASSIFIERS)
    raise ValueError(
        "This is not a SegFormer: expected keys such as backbone.patch_embed1.proj.weight or "
        f"segformer.encoder.patch_embeddings.0.proj.weight, found {_listed(keys)}; give a SegFormer's checkpoint."
    )


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
    layout = _find_layout(state_dict)
    known = {key: tensor for key, tensor in state_dict.items() if not key.startswith(layout.extras)}
    check_state(known, _rename_back(expected_state(spec, encoder_only=not layout.head), layout), spec.variant)
    return spec, ours


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names, keys and values apart.

    Left out are decode_head.conv_seg, which nvlabs saves and does not use, and a bare backbone's image classifier.
    Any other unknown key, and a layer without weight, is a ValueError that names it.
    """
    layout = _find_layout(state_dict)
    names = {theirs: ours for ours, theirs in _names(layout, state_dict).items()}
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
    names = _names(layout, state_dict, ours_in=True)
    fused = any(name.endswith("attn.kv") for name in names)
    renamed = {}
    for key, tensor in _join_kv(state_dict) if fused else state_dict.items():
        module, _, leaf = key.rpartition(".")
        renamed[f"{names[module]}.{leaf}"] = tensor
    return renamed


def _names(layout: Layout, keys: Iterable[str], ours_in: bool = False) -> dict[str, str]:
    """Our name of each layer -> theirs, with as many blocks as `keys` have, which are theirs or ours."""
    names = dict(layout.head)
    for i in range(NUM_STAGES):
        ours, column = f"encoder.stages.{i}.", layout.column
        blocks = layout.prefix + _BLOCKS[column].format(i=i, s=i + 1)
        for part, theirs in _PARTS.items():
            names[ours + part] = layout.prefix + theirs[column].format(i=i, s=i + 1)
        for j in range(_count_blocks(keys, f"{ours}blocks." if ours_in else blocks)):
            for part, theirs in _BLOCK_PARTS.items():
                if theirs[column] and not (i == NUM_STAGES - 1 and part in _REDUCTION):
                    names[f"{ours}blocks.{j}.{part}"] = f"{blocks}{j}.{theirs[column]}"
    return names


def _count_blocks(keys: Iterable[str], stem: str) -> int:
    return len({key[len(stem) :].split(".")[0] for key in keys if key.startswith(stem)})


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
    depths = tuple(_count_blocks(ours, f"encoder.stages.{i}.blocks.") for i in range(NUM_STAGES))
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
    problems = [f"lacks {_listed(missing)}"] if missing else []
    problems += [f"has the unknown {_listed(unknown)}"] if unknown else []
    if problems:
        raise ValueError(f"The file {' and '.join(problems)}; give a whole state dict of an unchanged SegFormer.")


def _listed(keys: Collection[str]) -> str:
    shown = ", ".join(list(keys)[:3])
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown or "none"


def _row(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
