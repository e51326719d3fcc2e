"""Parameters, MACs and FLOPs.

Parameters and MACs come from a closed formula over the layers of a spec, so that a budget is solved without
building anything. MACs count what `torch.utils.flop_counter` counts (products of linear layers, convolutions and
attention; FLOPs are two MACs); normalisation, activations and upsampling are not counted, there as here.
Units: MACs and FLOPs for one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from segprune.model import check_input
from segprune.spec import BlockSpec, Spec, StageSpec, block_name, stage_name

Unit = Literal["params", "macs"]


@dataclass(frozen=True)
class Layer:
    """What one layer costs, as a function of its widths.

    `positions` is the number of output positions for one image and `kernel` the number of weights that one
    input and one output channel share. Kind "attention" stands for the two products of `positions` queries with
    `kernel` keys; its `in_dim` is the total query width, its `out_dim` the total value width.
    """

    name: str
    kind: Literal["product", "depthwise", "norm", "attention"]
    in_dim: int
    out_dim: int
    positions: int
    kernel: int = 1
    bias: bool = True

    def coefficients(self, unit: Unit) -> tuple[int, int, int]:
        """Returns (a, b, c) such that the cost is a · in_dim · out_dim + b · in_dim + c · out_dim."""
        # A product has in · out weights per kernel position; depth-wise layers and norms
        # have theirs per channel, a norm two of them. Attention costs positions · keys for
        # every query channel, and again for every value channel.
        match self.kind, unit:
            case "product", "params":
                return self.kernel, 0, int(self.bias)
            case "product", "macs":
                return self.positions * self.kernel, 0, 0
            case "depthwise", "params":
                return 0, 0, self.kernel + self.bias
            case "depthwise", "macs":
                return 0, 0, self.positions * self.kernel
            case "norm", "params":
                return 0, 0, 1 + self.bias
            case "attention", "macs":
                return 0, self.positions * self.kernel, self.positions * self.kernel
        return 0, 0, 0

    def cost(self, unit: Unit) -> int:
        a, b, c = self.coefficients(unit)
        return a * self.in_dim * self.out_dim + b * self.in_dim + c * self.out_dim


@dataclass(frozen=True)
class Counts:
    """Size and work of one network on one image of `input_shape` (H, W)."""

    parameters: int
    macs: int
    input_shape: tuple[int, int]

    @property
    def flops(self) -> int:
        return 2 * self.macs


def count(spec: Spec, input_shape: tuple[int, int]) -> Counts:
    """Returns parameters and MACs of `SegFormer(spec)` for one image of (H, W) pixels, each at least 32.

    >>> from segprune.spec import standard_spec
    >>> round(count(standard_spec("b0", 150), (512, 512)).macs / 1e9, 1)
    8.4
    """
    rows = layers(spec, input_shape)
    return Counts(
        sum(row.cost("params") for row in rows),
        sum(row.cost("macs") for row in rows),
        input_shape,
    )


def layers(spec: Spec, input_shape: tuple[int, int]) -> list[Layer]:
    """Returns one row per layer of `SegFormer(spec)`, named as its modules are."""
    check_input((1, spec.in_channels, *input_shape), spec.in_channels)
    rows: list[Layer] = []
    in_channels, positions = spec.in_channels, []

    height, width = input_shape
    for i, stage in enumerate(spec.stages):
        # The convolution's padding is half its kernel, so sizes are divided and rounded up.
        height, width = -(-height // stage.stride), -(-width // stage.stride)
        area = height * width
        positions.append(area)

        prefix, kernel = stage_name(i), stage.kernel_size**2
        rows.append(
            Layer(
                f"{prefix}.patch_embed.proj", "product", in_channels, stage.width, area, kernel
            )
        )
        rows.append(_norm(f"{prefix}.patch_embed.norm", stage.width))

        # Keys and values come from a map that is reduced
        # without padding, so its size is rounded down.
        reduced = height // stage.reduction_ratio, width // stage.reduction_ratio
        for j, block in enumerate(stage.blocks):
            rows += _block_layers(block_name(i, j), stage, block, area, reduced)
        rows.append(_norm(f"{prefix}.norm", stage.width))
        in_channels = stage.width

    return rows + list(_head_layers(spec, positions))


def _norm(name: str, dim: int) -> Layer:
    return Layer(name, "norm", dim, dim, 0)


def _block_layers(
    prefix: str, stage: StageSpec, block: BlockSpec, area: int, reduced: tuple[int, int]
) -> Iterator[Layer]:
    width = stage.width
    if block.has_attention:
        yield _norm(f"{prefix}.norm1", width)
        yield from _attention_layers(f"{prefix}.attn", stage, block, area, reduced)
    if block.has_ffn:
        yield _norm(f"{prefix}.norm2", width)
        yield Layer(f"{prefix}.mlp.fc1", "product", width, block.ffn_dim, area)

        # A depth-wise kernel of 3 × 3 has 9 weights per channel.
        yield Layer(f"{prefix}.mlp.dwconv", "depthwise", block.ffn_dim, block.ffn_dim, area, 9)
        yield Layer(f"{prefix}.mlp.fc2", "product", block.ffn_dim, width, area)


def _attention_layers(
    prefix: str, stage: StageSpec, block: BlockSpec, area: int, reduced: tuple[int, int]
) -> Iterator[Layer]:
    width, qk, v = stage.width, block.num_heads * block.qk_dim, block.num_heads * block.v_dim

    source = width  # channels of what keys and values read
    if block.reduction_dim is not None:
        source, kernel = block.reduction_dim, stage.reduction_ratio**2
        yield Layer(f"{prefix}.sr", "product", width, source, reduced[0] * reduced[1], kernel)
        yield _norm(f"{prefix}.norm", source)

    # Windows that reach beyond the edge count, so sizes are divided and rounded up.
    keys = -(-reduced[0] // block.kv_reduction) * -(-reduced[1] // block.kv_reduction)
    yield Layer(f"{prefix}.q", "product", width, qk, area)
    yield Layer(f"{prefix}.k", "product", source, qk, keys)
    yield Layer(f"{prefix}.v", "product", source, v, keys)

    # One row for both products of attention: its kernel is the number of keys.
    yield Layer(prefix, "attention", qk, v, area, keys)
    yield Layer(f"{prefix}.proj", "product", v, width, area)


def _head_layers(spec: Spec, positions: list[int]) -> Iterator[Layer]:
    form, dim, widths = spec.head_form, spec.decoder_dim, spec.branch_widths
    for i, (stage, branch) in enumerate(zip(spec.stages, widths, strict=True)):
        bias = form.branch_bias
        yield Layer(
            f"decode_head.branches.{i}", "product", stage.width, branch, positions[i], bias=bias
        )
        if form.branch_norm:
            yield _norm(f"decode_head.branch_norms.{i}", branch)
        if form.fuse == "per_stage":
            yield Layer(
                f"decode_head.fuses.{i}", "product", branch, dim, positions[i], bias=False
            )

    # Taken at the largest map's size, which makes it expensive.
    if form.fuse == "concatenated":
        yield Layer("decode_head.fuse", "product", sum(widths), dim, positions[0], bias=False)

    yield _norm("decode_head.norm", dim)
    yield Layer("decode_head.classifier", "product", dim, spec.num_classes, positions[0])


def removed_shares(before: Counts, after: Counts) -> Mapping[Any, float]:
    """Returns the shares of "params" and of "macs" that the second network lacks, below 0 where it has more."""
    return {
        "params": 1.0 - after.parameters / before.parameters,
        "macs": 1.0 - after.macs / before.macs,
    }
