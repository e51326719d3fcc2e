"""The widths and numerics of one SegFormer as plain data, and the preprocessing that belongs to its weights.

A spec says everything that the weights alone do not: a network is `SegFormer(spec)` plus a state dict.
Widths are numbers of channels. The standard variants follow the released weights of
"SegFormer" (arXiv 2105.15203), whose table 6 prints other depths and expansions for some variants.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")
Gelu = Literal["none", "tanh"]  # torch's words; the exact one is "none"
HeadDropout = Literal["2d", "plain"]
Head = Literal["mlp", "conv"]  # as it is published; "mlp" can be folded
Channels = Literal["rgb", "bgr"]

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
OTHER = "other"  # the name of a network of other sizes

NUM_STAGES = 4  # of every SegFormer: its decode head joins four maps

# By stage, the same in all variants.
NUM_HEADS = (1, 2, 5, 8)
REDUCTION_RATIOS = (8, 4, 2, 1)
KERNEL_SIZES = (7, 3, 3, 3)
STRIDES = (4, 2, 2, 2)
FFN_RATIO = 4

LEAST_STD, MOST_PIXEL = 1e-3, 1e6  # of pixels in 0..255, with much room
RGB = 3  # input channels of a network that says nothing else
MOST_CHANNELS = 1024  # of an image; hyperspectral ones have hundreds
NO_CLASS = 255  # the label that is always ignored


@dataclass(frozen=True)
class Preprocessing:
    """What a network was trained with: how pixels become its input, and how a mask's values become its classes.

    Pixels 0..255, their channels in the order of `channels`, become (pixels - `mean`) / `std`; "bgr" exchanges the
    first and the third channel, whatever follows them. Every label gets
    `label_offset` added, and is ignored where that makes it negative; `ignore_index` is then ignored, and 255 always.
    `size` (H, W) is that of the images in training, which nothing here depends on. The defaults are ImageNet's, as
    SegFormer was trained with. A network that takes more or fewer channels than there are numbers in `mean` was read
    from a file that does not say them.
    """

    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    channels: Channels = "rgb"
    label_offset: int = 0
    ignore_index: int = NO_CLASS
    size: tuple[int, int] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("mean", -MOST_PIXEL), ("std", LEAST_STD)):
            values = getattr(self, name)
            if not _are_numbers(values, least):
                raise ValueError(
                    f"`{name}` is {reprlib.repr(values)}, where numbers from {least:g} to {MOST_PIXEL:g} are "
                    "allowed, one for each channel of pixels in 0..255; give those that the network was trained with."
                )
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"`mean` has {len(self.mean)} numbers and `std` {len(self.std)}, where one of each is needed for "
                "every channel; give as many of both."
            )
        if self.channels not in get_args(Channels):
            raise ValueError(f"`channels` is {reprlib.repr(self.channels)}; choose rgb or bgr.")
        if self.channels == "bgr" and self.num_channels < RGB:
            raise ValueError(
                f"`channels` is bgr, where an image has {self.num_channels} channels; leave it out, since nothing is "
                "exchanged there."
            )

        # A positive offset would move class 254 onto the ignored 255.
        for name, low, high in (
            ("label_offset", 1 - NO_CLASS, 0),
            ("ignore_index", 0, NO_CLASS),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(
                    f"`{name}` is {reprlib.repr(value)}, where {low}..{high} is allowed."
                )
        if self.size is not None and not (
            len(self.size) == 2 and all(type(side) is int and side > 0 for side in self.size)
        ):
            raise ValueError(
                f"`size` is {reprlib.repr(self.size)}, where a height and a width in pixels are allowed."
            )

    @property
    def num_channels(self) -> int:
        """Channels of the images that the record is for."""
        return len(self.mean)


def _are_numbers(values: tuple[Any, ...], least: float) -> bool:
    """Tells whether these are one or more numbers in the range; NaN is in none."""
    right = [value for value in values if type(value) in (int, float)]
    return 0 < len(right) == len(values) <= MOST_CHANNELS and all(
        least <= number <= MOST_PIXEL for number in right
    )


def preprocessing_of(network: object) -> Preprocessing:
    """Returns what a network, or an exported file, was trained with; the defaults for any other function.

    Raises ValueError where mean and deviation of its channels are not known.
    """
    spec = getattr(getattr(network, "manifest", network), "spec", None)
    return stated_preprocessing(spec) if isinstance(spec, Spec) else Preprocessing()


def stated_preprocessing(spec: Spec) -> Preprocessing:
    """Returns the spec's record. Raises ValueError where its mean and deviation are not those of as many channels."""
    own = spec.preprocessing
    if own.num_channels != spec.in_channels:
        raise ValueError(
            f"The network takes images of {spec.in_channels} channels, but mean and deviation are known for "
            f"{own.num_channels}; give `mean` and `std`, {spec.in_channels} numbers each, of pixels in 0..255 as in "
            "its training."
        )
    return own


def preprocessing_of_drawn(spec: Spec) -> Preprocessing:
    """Returns what makes generated images ready for the network, if need be with ImageNet's mean brightness.

    These show how weights behave and are nobody's data, so they do not have to wait for what a file does not say.
    """
    own = spec.preprocessing
    if own.num_channels == spec.in_channels:
        return own
    mean, std = (sum(values) / RGB for values in (Preprocessing.mean, Preprocessing.std))
    return Preprocessing(mean=(mean,) * spec.in_channels, std=(std,) * spec.in_channels)


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

    Keys and values are read from a map averaged over windows of `kv_reduction` × `kv_reduction`, after the stage's own
    reduction if it has one; 1 leaves the map as it is. No weights belong to it.

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
    kv_reduction: int = 1

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

    Every form begins with one product over channels per stage, its branches. Parameters and MACs follow from this record.
    A further form also needs a name in `Head`, its sum in `DecodeHead.fused`, and, if it can be folded, repaired or timed
    step by step, a branch in fold.py, repair/head.py and latency/steps.py.
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
    each branch has a BatchNorm and a ReLU. `in_channels` are those of the images.
    """

    variant: str
    num_classes: int
    stages: tuple[StageSpec, ...]
    branch_dims: tuple[int, ...] | None
    decoder_dim: int
    numerics: Numerics
    head: Head = "mlp"
    preprocessing: Preprocessing = Preprocessing()
    in_channels: int = RGB

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


# What the fields of a spec in a file may hold: far more than any network has, and so little that a file which was made
# to do harm asks for no more memory or time than its own weights take.
MAX_BLOCKS = 256  # of a stage
MAX_KV_REDUCTION = 64
_MOST = dict.fromkeys(
    ("num_classes", "decoder_dim", "branch_dims", "width", "qk_dim", "v_dim", "ffn_dim"), 2**16
) | {
    "num_heads": 2**10,
    "in_channels": MOST_CHANNELS,
    "reduction_dim": 2**16,
    "kernel_size": 63,
    "stride": 16,
    "reduction_ratio": 64,
    "kv_reduction": MAX_KV_REDUCTION,
}
_MOST_REAL = {"norm_eps": 1, "embed_norm_eps": 1, "bn_eps": 1, "qk_scale": 1000}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "variant": (*VARIANTS, OTHER),
    "head": get_args(Head),
    "gelu": get_args(Gelu),
    "head_dropout_kind": get_args(HeadDropout),
    "align_corners": (True, False),
}


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
        # A dense stage repeats one block: heads share the width, FFNs are four times as wide.
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
    """Returns plain dicts, lists and numbers, as JSON and `torch.load(weights_only=True)` know them.

    `in_channels` is left out where it is 3, so that versions without it read such networks too.
    """
    data = asdict(spec)
    if spec.in_channels == RGB:
        del data["in_channels"]
    return data


def spec_from_dict(data: Mapping[str, Any]) -> Spec:
    """The inverse of `spec_to_dict`. Older files name neither a head, which is "mlp", nor their preprocessing, nor any
    `kv_reduction`, which is 1; without `in_channels` it is 3.

    Raises ValueError for whatever no network has, since the file may be damaged or made to do harm: a missing or
    unknown key, a value of another type or beyond its range, a block without branches, more blocks than `MAX_BLOCKS`.
    """
    try:
        missing = {"head": "mlp", "preprocessing": Preprocessing(), "in_channels": RGB}
        spec = _to_record(Spec, missing | {**data} | _parse_fields(data))
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"This is not a segprune spec ({error}); write the file again with segprune.save."
        ) from error

    # The keys are right. Now the values, each by its name.
    for name in ("variant", "head", "num_classes", "in_channels", "decoder_dim"):
        _check_value(name, getattr(spec, name))
    for width in spec.branch_dims or ():
        _check_value("branch_dims", width)
    for name, value in asdict(spec.numerics).items():
        _check_value(name, value)
    for stage in spec.stages:
        _check_stage(stage)

    # Branches that end in a ReLU are not linear, so they have no folded form.
    if spec.folded and not HEAD_FORMS[spec.head].linear:
        raise ValueError(
            f"This segprune spec has a {spec.head} head without branches; the file is damaged."
        )
    return spec


def _parse_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those fields of a spec that are records or tuples."""
    stages = []

    # JSON has lists and dicts where a spec has tuples and records.
    for stage in _to_tuple("stages", data["stages"], NUM_STAGES, NUM_STAGES):
        if not isinstance(stage, Mapping):
            raise TypeError(f"a stage is a {type(stage).__name__}")
        blocks = []
        for block in _to_tuple("blocks", stage["blocks"], 1, MAX_BLOCKS):
            if isinstance(block, Mapping):
                block = {"kv_reduction": 1, **block}
            blocks.append(_to_record(BlockSpec, block))
        stages.append(_to_record(StageSpec, {**stage, "blocks": tuple(blocks)}))

    branch_dims = data["branch_dims"]
    if branch_dims is not None:
        branch_dims = _to_tuple("branch_dims", branch_dims, NUM_STAGES, NUM_STAGES)
    numerics = _to_record(Numerics, data["numerics"])
    parsed: dict[str, Any] = {
        "stages": tuple(stages),
        "branch_dims": branch_dims,
        "numerics": numerics,
    }

    if "preprocessing" in data:
        values = asdict(Preprocessing()) | {**data["preprocessing"]}
        ranges = (("mean", 1, MOST_CHANNELS), ("std", 1, MOST_CHANNELS), ("size", 2, 2))
        for name, least, most in ranges:
            if values[name] is not None:
                values[name] = _to_tuple(name, values[name], least, most)
        parsed["preprocessing"] = _to_record(Preprocessing, values)
    return parsed


def _to_tuple(name: str, values: Any, least: int, most: int) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name} is a {type(values).__name__}")
    if not least <= len(values) <= most:
        allowed = str(most) if least == most else f"{least} to {most}"
        raise TypeError(f"{name} has {len(values)} entries, allowed are {allowed}")
    return tuple(values)


def _to_record(kind: type[T], data: Any) -> T:
    # Missing and unknown keys are one mistake: the file is damaged, or of another version.
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(data, Mapping):
        raise TypeError(f"{kind.__name__} is a {type(data).__name__}")
    if set(data) != names:
        differ = reprlib.repr(sorted(set(map(str, data)) ^ names))
        raise TypeError(f"{kind.__name__} has {differ} missing or too many")

    # A .pth file may hold tensors here, which compare as nothing else does.
    for name, value in data.items():
        if type(value) not in (
            int,
            float,
            bool,
            str,
            type(None),
            tuple,
            Numerics,
            Preprocessing,
        ):
            raise TypeError(f"{name} is a {type(value).__name__}")
    return kind(**data)


def _check_stage(stage: StageSpec) -> None:
    for name in ("width", "kernel_size", "stride", "reduction_ratio"):
        _check_value(name, getattr(stage, name))

    for block in stage.blocks:
        # The widths of a branch that was removed are 0, all of them.
        attention = block.num_heads != 0
        for name in ("num_heads", "qk_dim", "v_dim"):
            _check_value(name, getattr(block, name), removed=not attention)
        _check_value("qk_scale", block.qk_scale, removed=not attention)
        _check_value("ffn_dim", block.ffn_dim, removed=block.ffn_dim == 0)

        # Only where the ratio is above 1 there is a reduced map, and it has channels.
        if attention and stage.reduction_ratio > 1:
            _check_value("reduction_dim", block.reduction_dim)
        elif block.reduction_dim is not None:
            raise ValueError(
                "This segprune spec has a reduction_dim where nothing is reduced; the file is damaged."
            )
        _check_value("kv_reduction", block.kv_reduction)
        if block.kv_reduction > 1 and not attention:
            raise ValueError(
                f"This segprune spec has kv_reduction {block.kv_reduction} in a block without attention; the file is "
                "damaged."
            )
        if not block.has_attention and not block.has_ffn:
            raise ValueError(
                "This segprune spec has a block without attention and FFN; the file is damaged."
            )


def _check_value(name: str, value: Any, *, removed: bool = False) -> None:
    """Raises ValueError unless a field may hold the value; of a `removed` branch it is 0."""
    # `type`, since True and False are integers to isinstance.
    number = type(value) in (int, float)
    if name in _CHOICES:
        allowed = " or ".join(str(choice).lower() for choice in _CHOICES[name])
        right = type(value) in (str, bool) and value in _CHOICES[name]
    elif removed:
        right, allowed = number and value == 0, "0 as in all of a removed branch"
    elif name in _MOST:
        right = type(value) is int and 1 <= value <= _MOST[name]
        allowed = f"a whole number from 1 to {_MOST[name]}"
    elif name in _MOST_REAL:
        # An eps of 0 would divide by zero where nothing varies.
        right = number and 0 < value <= _MOST_REAL[name]
        allowed = f"a number above 0 and up to {_MOST_REAL[name]}"
    else:  # momentum and the two dropout rates
        right, allowed = number and 0 <= value < 1, "a number from 0 to below 1"

    if not right:
        raise ValueError(
            f"This segprune spec has {name} {reprlib.repr(value)}, which must be {allowed}; the file is damaged."
        )


def list_kv_reductions(spec: Spec) -> dict[str, int]:
    """Returns each attention's `kv_reduction` by the attention's name, in the order in which they run."""
    factors = {}
    for i, stage in enumerate(spec.stages):
        for j, block in enumerate(stage.blocks):
            if block.has_attention:
                factors[f"{block_name(i, j)}.attn"] = block.kv_reduction
    return factors


def with_kv_reductions(spec: Spec, factors: Mapping[str, int]) -> Spec:
    """Returns the spec with these factors, by the attention's name; attention that is not named keeps its own."""
    stages = []
    for i, stage in enumerate(spec.stages):
        blocks = []
        for j, block in enumerate(stage.blocks):
            factor = factors.get(f"{block_name(i, j)}.attn", block.kv_reduction)
            blocks.append(replace(block, kv_reduction=factor))
        stages.append(replace(stage, blocks=tuple(blocks)))
    return replace(spec, stages=tuple(stages))


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
