"""The widths and numerics of one SegFormer as plain data.

A spec says everything that the weights alone do not: a network is `SegFormer(spec)` plus a state dict.
Widths are numbers of channels. The standard variants follow the released weights of
"SegFormer" (arXiv 2105.15203), whose table 6 prints other depths and expansions for some variants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")
Gelu = Literal["none", "tanh"]  # torch's words; the exact one is "none"
HeadDropout = Literal["2d", "plain"]
Head = Literal["mlp", "conv"]  # as it is published; "mlp" can be folded

# By variant: channels, and then numbers of blocks, of the four stages.
WIDTHS = {"b0": (32, 64, 160, 256)} | dict.fromkeys(
    ("b1", "b2", "b3", "b4", "b5"), (64, 128, 320, 512)
)
DEPTHS = {
    "b0": (2, 2, 2, 2),
    "b1": (2, 2, 2, 2),
    "b2": (3, 4, 6, 3),
    "b3": (3, 4, 18, 3),
    "b4": (3, 8, 27, 3),
    "b5": (3, 6, 40, 3),
}
DECODER_DIMS = {"b0": 256, "b1": 256, "b2": 768, "b3": 768, "b4": 768, "b5": 768}
VARIANTS = tuple(DEPTHS)

# By stage, the same in all variants.
NUM_HEADS = (1, 2, 5, 8)
REDUCTION_RATIOS = (8, 4, 2, 1)
KERNEL_SIZES = (7, 3, 3, 3)
STRIDES = (4, 2, 2, 2)
FFN_RATIO = 4


@dataclass(frozen=True)
class Numerics:
    """What makes the same weights give other logits, or train otherwise, in another code base."""

    norm_eps: float = 1e-6  # LayerNorms inside blocks and at the stages' ends
    embed_norm_eps: float = (
        1e-5  # LayerNorms of patch embeddings and of the attention's reductions
    )
    gelu: Gelu = "none"
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    head_dropout: float = 0.1
    head_dropout_kind: HeadDropout = "2d"
    align_corners: bool = (
        False  # of the last upsampling, from a quarter of the input's size to all of it
    )
    drop_path: float = 0.1  # stochastic depth of the last block while training; the first has 0


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block: `qk_dim` and `v_dim` are per head, `ffn_dim` is the hidden width.

    A branch that was removed has widths 0: a block without attention is 0 0 0 in its heads, with no reduction and
    scale 0, one without FFN has `ffn_dim` 0. One of the two is always there.
    """

    num_heads: int
    qk_dim: int
    v_dim: int
    ffn_dim: int
    reduction_dim: (
        int | None
    )  # channels of the reduced keys' and values' source; None: no reduction
    qk_scale: float  # what q·k is multiplied with; kept when channels are cut, never recomputed

    @property
    def has_attention(self) -> bool:
        return self.num_heads > 0

    @property
    def has_ffn(self) -> bool:
        return self.ffn_dim > 0

    def without_attention(self) -> BlockSpec:
        return BlockSpec(0, 0, 0, self.ffn_dim, None, 0.0)

    def without_ffn(self) -> BlockSpec:
        return replace(self, ffn_dim=0)


@dataclass(frozen=True)
class StageSpec:
    """One stage: an overlapping patch embedding to `width` channels, then its blocks."""

    width: int
    kernel_size: int
    stride: int
    reduction_ratio: int
    blocks: tuple[BlockSpec, ...]


@dataclass(frozen=True)
class HeadForm:
    """How a decode head turns the stages' maps into the one that its BatchNorm and its classifier read.

    Every form begins with one product over channels per stage, its branches. Model, counts, times and file names are
    derived from this record, so a further form is one more row of `HEAD_FORMS`.
    """

    name: str
    branch_bias: bool
    branch_norm: bool  # each branch ends in a BatchNorm and a ReLU
    fuse: Literal[
        "concatenated", "per_stage", "none"
    ]  # the second product: one of all branches, one of each, or none
    branches: str  # in words

    @property
    def linear(self) -> bool:
        """Tells whether branches and second product are one linear map of the stages' maps, so that they fold."""
        return not self.branch_norm


HEAD_FORMS = {
    "mlp": HeadForm("mlp", True, False, "concatenated", "linear branches"),
    "folded": HeadForm(
        "folded", False, False, "none", "linear branches folded into the fuse convolution"
    ),
    "conv": HeadForm("conv", False, True, "per_stage", "a BatchNorm and a ReLU in each branch"),
}


@dataclass(frozen=True)
class Spec:
    """One network. `branch_dims` are the widths of the decode head's branches; None says that the head is folded.

    `head` "mlp" is the published one, whose branches are linear, so that it can be folded; in mmsegmentation's, "conv",
    each branch has a BatchNorm and a ReLU.
    """

    variant: str
    num_classes: int
    stages: tuple[StageSpec, ...]
    branch_dims: tuple[int, ...] | None
    decoder_dim: int
    numerics: Numerics
    head: Head = "mlp"

    @property
    def folded(self) -> bool:
        return self.branch_dims is None

    @property
    def head_form(self) -> HeadForm:
        return HEAD_FORMS["folded" if self.folded else self.head]

    @property
    def branch_widths(self) -> tuple[int, ...]:
        """What each branch writes; a folded head's branches write the sum itself."""
        return (
            (self.decoder_dim,) * len(self.stages)
            if self.branch_dims is None
            else self.branch_dims
        )


def check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"Unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}.")


def standard_spec(
    variant: str,
    num_classes: int,
    *,
    numerics: Numerics | None = None,
    decoder_dim: int | None = None,
) -> Spec:
    """Returns the dense network of that name.

    >>> standard_spec("b0", 8).stages[3].width
    256
    """
    # The name first: every table below is looked up by it.
    check_variant(variant)

    # With a single class every pixel would have the same answer.
    if num_classes < 2:
        raise ValueError(
            f"`num_classes` is {num_classes}; segmentation needs at least 2, background included."
        )

    stages = []
    for i, (width, depth) in enumerate(zip(WIDTHS[variant], DEPTHS[variant], strict=True)):
        # A dense stage repeats one block: heads share
        # the width, FFNs are four times as wide.
        block = _uniform_block(width, NUM_HEADS[i], FFN_RATIO * width, REDUCTION_RATIOS[i])
        stages.append(
            StageSpec(width, KERNEL_SIZES[i], STRIDES[i], REDUCTION_RATIOS[i], (block,) * depth)
        )

    dim = DECODER_DIMS[variant] if decoder_dim is None else decoder_dim
    return Spec(
        variant, num_classes, tuple(stages), (dim,) * len(stages), dim, numerics or Numerics()
    )


def _uniform_block(width: int, num_heads: int, ffn_dim: int, reduction_ratio: int) -> BlockSpec:
    head_dim = width // num_heads
    return BlockSpec(
        num_heads=num_heads,
        qk_dim=head_dim,
        v_dim=head_dim,
        ffn_dim=ffn_dim,
        reduction_dim=width if reduction_ratio > 1 else None,
        qk_scale=head_dim**-0.5,
    )


def with_widths(stage: StageSpec, width: int, num_heads: int, ffn_dim: int) -> StageSpec:
    """Returns the stage with these widths in all its blocks, and the attention scale that follows from them."""
    # One block stands for all, as in a dense stage.
    block = _uniform_block(width, num_heads, ffn_dim, stage.reduction_ratio)
    return replace(stage, width=width, blocks=(block,) * len(stage.blocks))


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """Returns plain dicts, lists and numbers, as JSON and `torch.load(weights_only=True)` know them."""
    return asdict(spec)


def spec_from_dict(data: Mapping[str, Any]) -> Spec:
    """The inverse of `spec_to_dict`. Files from before there were two kinds of head do not name theirs: it is "mlp".

    Raises ValueError for a missing or unknown key, a width below 1 but in a branch that was removed, a block without
    branches, a stage without blocks, an unknown head, unknown numerics.
    """
    try:
        spec = _to_record(Spec, {"head": "mlp"} | dict(data) | _parse_fields(data))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"This is not a segprune spec ({error}); write the file again with segprune.save."
        ) from error

    # The keys are right. Now the values, since a damaged file must not load.
    _check_head(spec)
    _check_widths(spec)
    _check_numerics(spec.numerics)
    return spec


def _parse_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those fields of a spec that are records or tuples."""
    stages = []

    # JSON has lists and dicts where a spec has tuples and records.
    for stage in data["stages"]:
        blocks = tuple(_to_record(BlockSpec, block) for block in stage["blocks"])
        stages.append(_to_record(StageSpec, stage | {"blocks": blocks}))
    branch_dims = None if data["branch_dims"] is None else tuple(data["branch_dims"])
    numerics = _to_record(Numerics, data["numerics"])
    return {"stages": tuple(stages), "branch_dims": branch_dims, "numerics": numerics}


def _to_record(kind: type[T], data: Mapping[str, Any]) -> T:
    # Missing and unknown keys are one mistake: the file is damaged, or of another version.
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if set(data) != names:
        raise TypeError(f"{kind.__name__} has {sorted(set(data) ^ names)} missing or too many")
    return kind(**data)


def _check_head(spec: Spec) -> None:
    if spec.head not in get_args(Head):
        raise ValueError(
            f"This segprune spec has head {spec.head!r}, which must be mlp or conv; the file is damaged."
        )

    # Branches that end in a ReLU are not linear, so they have no folded form.
    if spec.folded and not HEAD_FORMS[spec.head].linear:
        raise ValueError(
            f"This segprune spec has a {spec.head} head without branches; the file is damaged."
        )


def _check_widths(spec: Spec) -> None:
    # All widths in one list, so that one check serves them.
    widths = [spec.num_classes, spec.decoder_dim, *spec.branch_widths]
    for stage in spec.stages:
        widths.append(stage.width)
        for block in stage.blocks:
            # The widths of a branch that was removed are 0, all of them.
            if block != block.without_attention():
                widths += [block.num_heads, block.qk_dim, block.v_dim]
                widths.append(1 if block.reduction_dim is None else block.reduction_dim)
            if block != block.without_ffn():
                widths.append(block.ffn_dim)

    # `type`, since True and False are integers to isinstance.
    if not all(type(width) is int and width >= 1 for width in widths):
        raise ValueError(
            "This segprune spec has a width that is not a whole number from 1 up; the file is damaged."
        )

    for stage in spec.stages:
        if not stage.blocks or not all(
            block.has_attention or block.has_ffn for block in stage.blocks
        ):
            raise ValueError(
                "This segprune spec has a block without attention and FFN, or a stage without blocks; "
                "the file is damaged."
            )


def _check_numerics(numerics: Numerics) -> None:
    for name, value in asdict(numerics).items():
        number = type(value) in (int, float)
        if name == "gelu":
            right, allowed = value in get_args(Gelu), "none or tanh"
        elif name == "head_dropout_kind":
            right, allowed = value in get_args(HeadDropout), "2d or plain"
        elif name == "align_corners":
            right, allowed = type(value) is bool, "true or false"
        elif name.endswith("eps"):
            # An eps of 0 would divide by zero where nothing varies.
            right, allowed = number and 0 < value < float("inf"), "a number above 0"
        else:  # momentum and the two dropout rates
            right, allowed = number and 0 <= value < 1, "a number from 0 to below 1"
        if not right:
            raise ValueError(
                f"This segprune spec has {name} {value!r}, which must be {allowed}; the file is damaged."
            )


def with_folded_head(spec: Spec) -> Spec:
    """Returns the spec with its decode head folded, or as it is where the head cannot be folded."""
    return replace(spec, branch_dims=None) if spec.head_form.linear else spec


def with_unfolded_head(spec: Spec) -> Spec:
    """Returns the spec with branches as wide as the decode head in place of a folded one."""
    return replace(spec, branch_dims=spec.branch_widths)


def block_name(stage: int, block: int) -> str:
    """Returns the name of a block's module, both counted from 0.

    >>> block_name(0, 1)
    'encoder.stages.0.blocks.1'
    """
    return f"{stage_name(stage)}.blocks.{block}"


def stage_name(stage: int) -> str:
    """Returns the name of a stage's module, counted from 0."""
    return f"encoder.stages.{stage}"
