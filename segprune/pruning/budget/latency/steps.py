"""The steps of a forward pass whose times add up to its latency, and how each is run by itself.

A step is what `segprune.model` does between two points where tokens or a map are written whole: a product, a norm,
attention's two products, the depth-wise convolution with its GELU, an addition, an upsampling. Its time depends on
one or two widths; everything else in its shape is left alone by pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segprune.model import PatchEmbed, attend, pool_map, to_map, to_tokens
from segprune.shapes_only import without_weights
from segprune.spec import KERNEL_SIZES, BlockSpec, Spec, StageSpec, block_name, stage_name
from segprune.stats import Layer, layers
from segprune.timing import DTYPE_OF, Precision

Kind = Literal[
    "embed",  # sizes B H W kernel stride; dims in, out
    "norm",  # B N; width
    "linear",  # B N; in, out
    "reduction",  # B H W ratio; in, out
    "pool",  # B H W factor; width
    "attention",  # B heads N M; the larger of qk_dim and v_dim, per head
    "depthwise",  # B H W tanh; hidden width. tanh: whether GELU is the approximate one
    "add",  # B N; width
    "upsample",  # B H W, to H W; width
    "sum",  # B N; width
    "concat",  # B H W; width of the four together
    "pointwise",  # B H W; in, out
    "activation",  # B H W; width
]
Side = tuple[
    str, Literal[0, 1]
]  # the name of a row of `stats.layers`, and which of its widths: 0 in, 1 out


@dataclass(frozen=True)
class Shape:
    """All that decides a step's time: `sizes` stay, `dims` are the widths that pruning may change."""

    kind: Kind
    sizes: tuple[int, ...]
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.sizes))} {'-'.join(map(str, self.dims))}"


@dataclass(frozen=True)
class Step:
    """A step at full widths, and where its widths are found. Attention has both of its row's sides for one width."""

    shape: Shape
    sides: tuple[Side, ...]


def steps(spec: Spec, input_shape: tuple[int, int], batch: int = 1) -> list[Step]:
    """Returns every step of `SegFormer(spec)` on a batch of images of (H, W) pixels, in order."""
    rows = {row.name: row for row in layers(spec, input_shape)}
    all_steps: list[Step] = []
    maps: list[tuple[int, int]] = []

    height, width = input_shape
    for i, stage in enumerate(spec.stages):
        prefix = stage_name(i)

        # The patch embedding: from the map before to one that is smaller by the stride.
        sizes = (batch, height, width, stage.kernel_size, stage.stride)
        all_steps.append(_product(rows, "embed", sizes, f"{prefix}.patch_embed.proj"))

        # The padding is half the kernel, so sizes are divided and rounded up.
        height, width = -(-height // stage.stride), -(-width // stage.stride)

        # A branch that was removed has no rows, and takes no time.
        for j, block in enumerate(stage.blocks):
            name = block_name(i, j)
            if f"{name}.attn" in rows:
                all_steps += _attention_steps(rows, name, stage, block, (batch, height, width))
            if f"{name}.mlp.fc1" in rows:
                all_steps += _ffn_steps(
                    rows, name, (batch, height, width), tanh=spec.numerics.gelu == "tanh"
                )

        all_steps.append(_plain(rows, "norm", (batch, height * width), f"{prefix}.norm"))
        maps.append((height, width))

    return all_steps + list(_head_steps(rows, maps, (batch, *input_shape)))


def _attention_steps(
    rows: Mapping[str, Layer],
    name: str,
    stage: StageSpec,
    block: BlockSpec,
    size: tuple[int, int, int],
) -> Iterator[Step]:
    batch, area = size[0], size[1] * size[2]
    attn = f"{name}.attn"
    reduced = rows[attn].kernel  # the number of keys and values
    yield _plain(rows, "norm", (batch, area), f"{name}.norm1")

    # Keys and values read a smaller map where the stage reduces it, and a coarser one of that.
    ratio, factor = stage.reduction_ratio, block.kv_reduction
    if f"{attn}.sr" in rows:
        yield _product(rows, "reduction", (*size, ratio), f"{attn}.sr")
    if factor > 1:
        sizes = (batch, size[1] // ratio, size[2] // ratio, factor)
        yield Step(Shape("pool", sizes, (rows[f"{attn}.k"].in_dim,)), ((f"{attn}.k", 0),))
    yield _product(rows, "linear", (batch, area), f"{attn}.q")
    yield _product(rows, "linear", (batch, reduced), f"{attn}.k")
    yield _product(rows, "linear", (batch, reduced), f"{attn}.v")

    # The wider of queries and values decides: where torch
    # has no kernel for both, the narrower one is filled up.
    head_dim = max(rows[attn].in_dim, rows[attn].out_dim) // block.num_heads
    yield Step(
        Shape("attention", (batch, block.num_heads, area, reduced), (head_dim,)),
        ((attn, 0), (attn, 1)),
    )

    # The output product, then the residual addition.
    yield _product(rows, "linear", (batch, area), f"{attn}.proj")
    yield _plain(rows, "add", (batch, area), f"{attn}.proj")


def _ffn_steps(
    rows: Mapping[str, Layer], name: str, size: tuple[int, int, int], *, tanh: bool
) -> Iterator[Step]:
    flat = (size[0], size[1] * size[2])
    yield _plain(rows, "norm", flat, f"{name}.norm2")
    yield _product(rows, "linear", flat, f"{name}.mlp.fc1")

    # The GELU is timed together with the convolution, which has the same width.
    yield _plain(rows, "depthwise", (*size, int(tanh)), f"{name}.mlp.dwconv")
    yield _product(rows, "linear", flat, f"{name}.mlp.fc2")
    yield _plain(rows, "add", flat, f"{name}.mlp.fc2")


def _head_steps(
    rows: Mapping[str, Layer], maps: list[tuple[int, int]], whole: tuple[int, int, int]
) -> Iterator[Step]:
    batch, height, width = whole[0], *maps[0]
    concatenated = "decode_head.fuse" in rows

    # Each stage's branch at its own size, then upsampled
    # to that of the first and added to the others.
    for i, (h, w) in enumerate(maps):
        last = f"decode_head.branches.{i}"
        yield _product(rows, "linear", (batch, h * w), last)
        if f"decode_head.branch_norms.{i}" in rows:
            yield _plain(rows, "activation", (batch, h, w), f"decode_head.branch_norms.{i}")
        if f"decode_head.fuses.{i}" in rows:
            last = f"decode_head.fuses.{i}"
            yield _product(rows, "linear", (batch, h * w), last)
        if (h, w) != maps[0]:
            yield _plain(rows, "upsample", (batch, h, w, height, width), last)
        if i > 0 and not concatenated:
            yield _plain(rows, "sum", (batch, height * width), last)

    # As published: one product over the four maps side by side, at the first one's size.
    if concatenated:
        fuse = rows["decode_head.fuse"]
        yield Step(Shape("concat", (batch, height, width), (fuse.in_dim,)), ((fuse.name, 0),))
        yield _product(rows, "pointwise", (batch, height, width), fuse.name)

    # BatchNorm with ReLU, the classifier, and the upsampling to the image's size.
    yield _plain(rows, "activation", (batch, height, width), "decode_head.norm")
    yield _product(rows, "pointwise", (batch, height, width), "decode_head.classifier")
    yield _plain(rows, "upsample", (batch, height, width, *whole[1:]), "decode_head.classifier")


def _product(rows: Mapping[str, Layer], kind: Kind, sizes: tuple[int, ...], name: str) -> Step:
    return Step(
        Shape(kind, sizes, (rows[name].in_dim, rows[name].out_dim)), ((name, 0), (name, 1))
    )


def _plain(rows: Mapping[str, Layer], kind: Kind, sizes: tuple[int, ...], name: str) -> Step:
    """Returns a step as wide as the outputs of that row."""
    return Step(Shape(kind, sizes, (rows[name].out_dim,)), ((name, 1),))


@dataclass(frozen=True)
class Place:
    """Where a step is run. Tensors hold ones: times do not depend on values, and no random state moves."""

    device: torch.device
    precision: Precision

    @property
    def dtype(self) -> torch.dtype:
        return DTYPE_OF[self.precision]

    def ones(self, size: Sequence[int], dim: int) -> Tensor:
        return torch.ones((*size, dim), device=self.device, dtype=self.dtype)

    def map(self, size: Sequence[int], dim: int) -> Tensor:
        """`size`: B H W. Channels-last in memory, as all maps but the images are."""
        batch, height, width = size
        return to_map(self.ones((batch, height * width), dim), height, width)

    def module(self, build: Callable[[], nn.Module]) -> nn.Module:
        # Built without memory or random numbers, then filled with ones.
        with without_weights():
            module = build()

        module = module.to_empty(device=self.device).to(self.dtype).eval()
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.detach().fill_(1)
        return module


Runner = Callable[[], Tensor]


def build_step(shape: Shape, place: Place) -> Runner:
    """Returns the step, ready to be run again and again."""
    return _BUILDERS[shape.kind](place, shape.sizes, shape.dims)


def _embed(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    batch, height, width, kernel, stride = sizes
    module = place.module(
        lambda: PatchEmbed(dims[0], StageSpec(dims[1], kernel, stride, 1, ()), 1e-5)
    )

    # Images, which the first stage reads, lie as B C H W in memory, the maps between stages channels-last.
    x = (
        place.ones((batch, dims[0], height), width)
        if kernel == KERNEL_SIZES[0]
        else place.map((batch, height, width), dims[0])
    )
    return lambda: module(x)[0]


def _norm(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    module, x = place.module(lambda: nn.LayerNorm(dims[0])), place.ones(sizes, dims[0])
    return lambda: module(x)


def _linear(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    module, x = place.module(lambda: nn.Linear(dims[0], dims[1])), place.ones(sizes, dims[0])
    return lambda: module(x)


def _reduction(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    conv = place.module(lambda: nn.Conv2d(dims[0], dims[1], sizes[3], stride=sizes[3]))
    norm, x = place.module(lambda: nn.LayerNorm(dims[1])), place.map(sizes[:3], dims[0])
    return lambda: norm(to_tokens(conv(x)))


def _pool(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    x = place.map(sizes[:3], dims[0])
    return lambda: to_tokens(pool_map(x, sizes[3]))


def _attention(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    batch, num_heads, area, reduced = sizes
    q, k, v = (place.ones((batch, n), num_heads * dims[0]) for n in (area, reduced, reduced))

    # Any scale takes the same time.
    return lambda: attend(q, k, v, num_heads, 0.1)


def _depthwise(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    conv = place.module(lambda: nn.Conv2d(dims[0], dims[0], 3, padding=1, groups=dims[0]))
    act, x = nn.GELU("tanh" if sizes[3] else "none"), place.map(sizes[:3], dims[0])
    return lambda: act(to_tokens(conv(x)))


def _add(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    x, y = place.ones(sizes, dims[0]), place.ones(sizes, dims[0])
    return lambda: x + y


def _sum(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    x, y = place.ones(sizes, dims[0]), place.ones(sizes, dims[0])

    # In place, as the decode head adds its maps.
    return lambda: x.add_(y)


def _upsample(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    x, size = place.map(sizes[:3], dims[0]), sizes[3:]
    return lambda: F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _concat(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    # Only the total width is part of the shape, so the four maps take equal parts.
    maps = [place.map(sizes, max(1, dims[0] // 4)) for _ in range(4)]
    return lambda: torch.cat(maps, dim=1)


def _pointwise(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    module, x = place.module(lambda: nn.Conv2d(dims[0], dims[1], 1)), place.map(sizes, dims[0])
    return lambda: module(x)


def _activation(place: Place, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Runner:
    norm, act = place.module(lambda: nn.BatchNorm2d(dims[0])), nn.ReLU(inplace=True)
    x = place.map(sizes, dims[0])
    return lambda: act(norm(x))


_BUILDERS: dict[Kind, Callable[[Place, tuple[int, ...], tuple[int, ...]], Runner]] = {
    "embed": _embed,
    "norm": _norm,
    "linear": _linear,
    "reduction": _reduction,
    "pool": _pool,
    "attention": _attention,
    "depthwise": _depthwise,
    "add": _add,
    "upsample": _upsample,
    "sum": _sum,
    "concat": _concat,
    "pointwise": _pointwise,
    "activation": _activation,
}
