"""SegFormer: hierarchical MiT encoder and all-MLP decode head, dense, folded or pruned.

Written from "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers"
(arXiv 2105.15203). Shapes: B batch, C channels, H W the map's height and width, N = H·W tokens, M the
reduced number of tokens, h heads. Maps lie channels-last in memory, so that B N C tokens and B C H W maps
are views of each other.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from segprune.spec import NUM_STAGES, RGB, BlockSpec, Numerics, Spec, StageSpec


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    # In this order torch sees the channels-last layout for a single image too, and its
    # convolutions are up to 14 times faster.
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # B N C -> B C H W


def to_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)  # B C H W -> B N C


def to_upsample(maps: Tensor) -> Tensor:
    """Returns maps in the layout in which their device upsamples them fastest: on a GPU, channel after channel.

    There upsampling is 2.6 times slower from channels-last maps, and an argmax after it 3.8 times. Compilers choose
    layouts themselves, so what they and exporters trace is left as it is.
    """
    if maps.is_cuda and not torch.compiler.is_compiling():
        return maps.contiguous()
    return maps


def pool_map(maps: Tensor, factor: int) -> Tensor:
    """Averages B C H W over windows of `factor` × `factor`; one that reaches beyond the edge counts what lies inside."""
    # A window larger than the map averages all of it, but OpenVINO refuses one. Sizes are no integers while traced.
    height, width = (
        min(factor, side) if isinstance(side, int) else factor for side in maps.shape[2:]
    )
    return F.avg_pool2d(maps, (height, width), ceil_mode=True, count_include_pad=False)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): while training, a sample's whole branch is dropped."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x

        # One draw per sample. Dividing by the chance to be kept leaves the mean as it was.
        keep = x.new_empty((x.shape[0], 1, 1)).bernoulli_(1.0 - self.rate)
        return x * keep / (1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class PatchEmbed(nn.Module):
    """Overlapping patch embedding: a strided convolution, then a LayerNorm over the channels."""

    def __init__(self, in_channels: int, stage: StageSpec, eps: float) -> None:
        super().__init__()

        # Windows overlap: they are wider than the stride, and padded by half of themselves.
        kernel = stage.kernel_size
        self.proj = nn.Conv2d(
            in_channels, stage.width, kernel, stride=stage.stride, padding=kernel // 2
        )
        self.norm = nn.LayerNorm(stage.width, eps=eps)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        height, width = x.shape[2:]
        return self.norm(to_tokens(x)), height, width


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """Takes queries B N h·d, keys B M h·d and values B M h·e to B N h·e."""
    q, k, v = (
        t.unflatten(2, (num_heads, -1)).transpose(1, 2) for t in (q, k, v)
    )  # B N h·d -> B h N d

    # Torch's fused kernel for CPUs takes d = e only, and what runs
    # otherwise is three to six times slower; so there the narrower
    # ones are filled up with zeros, which changes no product.
    qk_dim, v_dim = q.shape[-1], v.shape[-1]
    if q.device.type == "cpu" and qk_dim < v_dim:
        q, k = (F.pad(t, (0, v_dim - qk_dim)) for t in (q, k))
    elif q.device.type == "cpu" and v_dim < qk_dim:
        v = F.pad(v, (0, qk_dim - v_dim))

    out = F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :v_dim]
    return out.transpose(1, 2).flatten(2)  # B h N e -> B N h·e


class Attention(nn.Module):
    """Efficient self-attention: keys and values come from a map reduced by a strided convolution, and by averages over
    windows where `kv_reduction` is above 1.

    Query/key and value widths may differ, and the scale is stored: after channels are cut, the products of
    those that are kept are scaled as they were trained.
    """

    def __init__(self, width: int, block: BlockSpec, reduction_ratio: int, eps: float) -> None:
        super().__init__()
        self.num_heads = block.num_heads
        self.qk_scale = block.qk_scale
        self.kv_reduction = block.kv_reduction

        # Keys and values read the reduced map, which may be narrower.
        source = width if block.reduction_dim is None else block.reduction_dim
        self.q = nn.Linear(width, block.num_heads * block.qk_dim)
        self.k = nn.Linear(source, block.num_heads * block.qk_dim)
        self.v = nn.Linear(source, block.num_heads * block.v_dim)
        self.proj = nn.Linear(block.num_heads * block.v_dim, width)

        # Where the ratio is 1, keys and values read the tokens themselves.
        if block.reduction_dim is None:
            self.sr, self.norm = None, None
        else:
            self.sr = nn.Conv2d(
                width, block.reduction_dim, reduction_ratio, stride=reduction_ratio
            )
            self.norm = nn.LayerNorm(block.reduction_dim, eps=eps)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        # All N tokens are queries. Keys and values are
        # M tokens of a smaller map, if there is one.
        source = x
        if self.sr is not None and self.norm is not None:
            reduced = self.sr(to_map(x, height, width))
            height, width = reduced.shape[2:]
            source = self.norm(to_tokens(reduced))  # B N C -> B M C
        source = self.pool(source, height, width)
        return self.proj(
            attend(self.q(x), self.k(source), self.v(source), self.num_heads, self.qk_scale)
        )

    def pool(self, source: Tensor, height: int, width: int) -> Tensor:
        """Returns what keys and values read of a map's tokens, B M C: averages over windows, if it is to be coarser."""
        if self.kv_reduction == 1:
            return source
        return to_tokens(pool_map(to_map(source, height, width), self.kv_reduction))


class Mlp(nn.Module):
    """Mix-FFN: between its two linear layers a 3×3 depth-wise convolution brings in positions."""

    def __init__(self, width: int, ffn_dim: int, gelu: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ffn_dim)
        self.dwconv = nn.Conv2d(ffn_dim, ffn_dim, 3, padding=1, groups=ffn_dim)
        self.act = nn.GELU(approximate=gelu)
        self.fc2 = nn.Linear(ffn_dim, width)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        # B N C -> B C H W for the convolution, and back.
        hidden = to_tokens(self.dwconv(to_map(self.fc1(x), height, width)))
        return self.fc2(self.act(hidden))


class Block(nn.Module):
    """Two residual branches, attention and FFN, each behind its LayerNorm; of a removed branch both are None."""

    norm1: nn.LayerNorm | None
    attn: Attention | None
    norm2: nn.LayerNorm | None
    mlp: Mlp | None

    def __init__(
        self, stage: StageSpec, block: BlockSpec, numerics: Numerics, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = None, None, None, None

        # A branch that was removed leaves no module and no parameter.
        if block.has_attention:
            self.norm1 = nn.LayerNorm(stage.width, eps=numerics.norm_eps)
            self.attn = Attention(
                stage.width, block, stage.reduction_ratio, numerics.embed_norm_eps
            )
        if block.has_ffn:
            self.norm2 = nn.LayerNorm(stage.width, eps=numerics.norm_eps)
            self.mlp = Mlp(stage.width, block.ffn_dim, numerics.gelu)
        self.drop_path = DropPath(drop_path)

    def list_branches(
        self,
    ) -> list[tuple[Literal["attn", "mlp"], nn.LayerNorm, Attention | Mlp]]:
        """Returns the branches that are there, in the order in which they run, each with the LayerNorm before it."""
        branches: list[tuple[Literal["attn", "mlp"], nn.LayerNorm, Attention | Mlp]] = []
        if self.norm1 is not None and self.attn is not None:
            branches.append(("attn", self.norm1, self.attn))
        if self.norm2 is not None and self.mlp is not None:
            branches.append(("mlp", self.norm2, self.mlp))
        return branches

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        if self.norm1 is not None and self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        if self.norm2 is not None and self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x), height, width))
        return x


class Stage(nn.Module):
    def __init__(
        self, in_channels: int, stage: StageSpec, numerics: Numerics, drop_paths: list[float]
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_channels, stage, numerics.embed_norm_eps)
        self.blocks = nn.ModuleList(
            Block(stage, block, numerics, rate)
            for block, rate in zip(stage.blocks, drop_paths, strict=True)
        )
        self.norm = nn.LayerNorm(stage.width, eps=numerics.norm_eps)

    def list_blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(self, x: Tensor, *, checkpointed: bool = False) -> Tensor:
        tokens, height, width = self.patch_embed(x)
        for block in self.blocks:
            # Only the block's input is kept. The backward pass computes the rest again.
            if checkpointed:
                tokens = checkpoint(block, tokens, height, width, use_reentrant=False)
            else:
                tokens = block(tokens, height, width)
        return to_map(self.norm(tokens), height, width)


def drop_path_rates(spec: Spec) -> list[float]:
    """Returns every block's rate: from 0 for the first, evenly up to the spec's for the last (arXiv 1603.09382)."""
    depth = sum(len(stage.blocks) for stage in spec.stages)
    return [spec.numerics.drop_path * i / max(depth - 1, 1) for i in range(depth)]


class Encoder(nn.Module):
    """Mix Transformer. Images B 3 H W to four maps B C_s H/4·2^(s-1) W/4·2^(s-1).

    With `checkpointing` set, training keeps only the blocks' inputs and computes the rest a second time in the
    backward pass (arXiv 1604.06174): less memory, about a third more time, the same gradients.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.checkpointing = False
        self.stages = nn.ModuleList()
        rates, in_channels = iter(drop_path_rates(spec)), spec.in_channels

        # Rates rise over all blocks of the network, so
        # every stage takes its part of one sequence.
        for stage in spec.stages:
            self.stages.append(
                Stage(in_channels, stage, spec.numerics, [next(rates) for _ in stage.blocks])
            )
            in_channels = stage.width

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x, checkpointed=self.checkpointing and self.training)
            maps.append(x)
        return maps


class DecodeHead(nn.Module):
    """All-MLP decode head; four maps in, logits B K H/4 W/4 out.

    As published, each map goes through its branch, is upsampled to a quarter of the input's size, and the
    concatenation c4, c3, c2, c1 through `fuse`. Folded (`branch_dims` None), branch and slice of `fuse` are one
    product per stage, taken before upsampling, and the upsampled maps are summed: see segprune/fold.py.

    mmsegmentation's (`head` "conv") has a BatchNorm and a ReLU in each branch, so a branch cannot become one with its
    slice of the fuse convolution. But the slice still commutes with upsampling; so there is one product per stage,
    `fuses`, taken before it, and the maps are summed as in a folded head. That is the same function, in training too,
    for a third of the MACs: no second form of this head is needed, and there is nothing to fold.
    """

    branch_norms: nn.ModuleList | None
    fuses: nn.ModuleList | None
    fuse: nn.Conv2d | None

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        numerics, form = spec.numerics, spec.head_form
        dim, widths = spec.decoder_dim, spec.branch_widths

        # One product per stage, then what the form has to join them.
        self.branches = nn.ModuleList(
            nn.Linear(stage.width, width, bias=form.branch_bias)
            for stage, width in zip(spec.stages, widths, strict=True)
        )
        self.branch_norms, self.fuses, self.fuse = None, None, None
        if form.branch_norm:
            self.branch_norms = nn.ModuleList(_batch_norm(width, numerics) for width in widths)
        if form.fuse == "per_stage":
            self.fuses = nn.ModuleList(nn.Linear(width, dim, bias=False) for width in widths)
        elif form.fuse == "concatenated":
            self.fuse = nn.Conv2d(sum(widths), dim, 1, bias=False)

        # All forms end alike.
        self.norm = _batch_norm(dim, numerics)
        self.act = nn.ReLU(inplace=True)
        dropout = nn.Dropout2d if numerics.head_dropout_kind == "2d" else nn.Dropout
        self.dropout = dropout(numerics.head_dropout)
        self.classifier = nn.Conv2d(dim, spec.num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classifier(self.dropout(self.act(self.norm(self.fused(maps)))))

    def fused(self, maps: list[Tensor]) -> Tensor:
        """Returns what the BatchNorm reads, B D H/4 W/4."""
        # Every stage's products are taken at its own size, then upsampled to the first stage's.
        size, parts = maps[0].shape[2:], []
        for i, x in enumerate(maps):
            x = self.hidden(i, x)
            if self.fuses is not None:
                x = to_map(self.fuses[i](to_tokens(x)), *x.shape[2:])
            parts.append(self._resize(x, size))

        # The published order is c4, c3, c2, c1: the weights of `fuse` depend on it.
        if self.fuse is not None:
            return self.fuse(torch.cat(parts[::-1], dim=1))
        fused = parts[3]  # fresh from a product, so that it can be added to in place
        for x in parts[2::-1]:
            fused += x
        return fused

    def summed_products(self) -> nn.ModuleList:
        """Returns the products, one per stage, whose upsampled results are summed; not of a head that concatenates."""
        assert self.fuse is None
        return self.branches if self.fuses is None else self.fuses

    def hidden(self, i: int, x: Tensor) -> Tensor:
        """Returns what stage i's branch puts out, at the stage's own size."""
        x = to_map(self.branches[i](to_tokens(x)), *x.shape[2:])
        return x if self.branch_norms is None else self.act(self.branch_norms[i](x))

    @staticmethod
    def _resize(x: Tensor, size: torch.Size) -> Tensor:
        # The first stage's map is not upsampled, but summed or joined with maps that are, so it gets their layout too.
        x = to_upsample(x)
        if x.shape[2:] == size:
            return x
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _batch_norm(dim: int, numerics: Numerics) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(dim, eps=numerics.bn_eps, momentum=numerics.bn_momentum)


class SegFormer(nn.Module):
    """The whole network: normalised images B 3 H W in, logits B K H W out, K classes.

    H and W are at least 32 (the last stage has a 32nd of each); other multiples than of 32 are allowed.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decode_head = DecodeHead(spec)
        if (
            not self.decode_head.classifier.weight.is_meta
        ):  # there, random numbers cost a second and come to nothing
            self.apply(_init_weights)
            nn.init.normal_(
                self.decode_head.classifier.weight, std=0.01
            )  # so that training starts from even odds

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(self.parts(x)[1], x.shape[2:])

    def list_stages(self) -> list[Stage]:
        return [stage for stage in self.encoder.stages if isinstance(stage, Stage)]

    def parts(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Returns the encoder's four maps, and the logits B K H/4 W/4 before the last upsampling."""
        check_input(x.shape, self.spec.in_channels)
        maps = self.encoder(x)
        return maps, self.decode_head(maps)

    def resize(self, logits: Tensor, size: torch.Size) -> Tensor:
        """Upsamples logits to the input's (H, W), by the rule that the weights were trained with."""
        return F.interpolate(
            to_upsample(logits),
            size=size,
            mode="bilinear",
            align_corners=self.spec.numerics.align_corners,
        )

    @property
    def upsamples_last(self) -> bool:
        """Whether logits are those of `parts`, resized: a subclass may do more."""
        return type(self).forward is SegFormer.forward

    def classes(self, x: Tensor) -> Tensor:
        """Returns the class of every pixel, B H W: exactly the argmax of the logits.

        On a CPU these never exist as a whole. On a GPU they do; `segprune.compiled` with `classes` spares them there.
        """
        logits, size = self.parts(x)[1], x.shape[2:]
        kept = find_winners(logits, size)
        if kept is not None:
            logits = logits.permute(0, 2, 3, 1).index_select(3, kept).permute(0, 3, 1, 2)

        # Strips end between two rows of the source, so that neighbours share one row only.
        tops = [0]
        if self.can_resize_rows(logits, size):
            numbers_per_row = logits.shape[0] * logits.shape[1] * size[1]
            step = max(1, STRIP_NUMBERS // (numbers_per_row * UPSAMPLED)) * UPSAMPLED
            tops += range(step - UPSAMPLED // 2, size[0], step)

        strips = []
        for top, bottom in zip(tops, [*tops[1:], size[0]], strict=True):
            strips.append(self._resize_part(logits, size, top, bottom).argmax(1))
        classes = torch.cat(strips, dim=1)
        return classes if kept is None else kept[classes]

    def _resize_part(self, logits: Tensor, size: torch.Size, top: int, bottom: int) -> Tensor:
        if (top, bottom) == (0, size[0]):
            return self.resize(logits, size)
        return self.resize_rows(logits, size, top, bottom)

    def can_resize_rows(self, logits: Tensor, size: torch.Size) -> bool:
        """Returns whether `resize_rows` gives these logits the bits of `resize`.

        By a whole number and without aligned corners, weights are exact and the same for all rows; otherwise they are
        rounded by where a row lies. With a narrower result PyTorch chooses its kernel by the height, and GPUs gain
        nothing by strips.
        """
        return (
            logits.device.type == "cpu"
            and not self.spec.numerics.align_corners
            and logits.shape[2] * UPSAMPLED == size[0]
            and size[1] >= 128
        )

    def resize_rows(self, logits: Tensor, size: torch.Size, top: int, bottom: int) -> Tensor:
        """Returns rows `top` to `bottom` of what `resize` returns, B K r W, in the time that they take alone."""
        # Upsample only the rows of the source that these read. Where they are cut out,
        # there is an edge now, which spoils half a row of the source; that is cut off.
        half = UPSAMPLED // 2
        first = max(0, (top - half) // UPSAMPLED)
        last = min(logits.shape[2] - 1, (bottom - 1 + half) // UPSAMPLED)
        source = logits[:, :, first : last + 1]

        # The layout in memory decides on PyTorch's kernel, so the rows get that of the whole.
        channels_last = logits.is_contiguous(memory_format=torch.channels_last)
        source = source.contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        rows = self.resize(source, torch.Size((source.shape[2] * UPSAMPLED, size[1])))
        return rows[:, :, top - first * UPSAMPLED : bottom - first * UPSAMPLED]


def find_winners(logits: Tensor, size: torch.Size) -> Tensor | None:
    """Returns the classes that can be the highest anywhere once logits B K h w are upsampled to `size`, ascending.

    An upsampled logit lies between those of its four neighbours. So a class cannot win among these where its highest is
    below the lowest of another, by more than rounding. Most of 150 classes win nowhere in an image. A few more are
    returned, so that each keeps its place in PyTorch's vectors, on which its last bit depends. None: take all.
    """
    num_classes = logits.shape[1]
    worthwhile = logits.device.type == "cpu" and num_classes >= 2 * LANES
    in_vectors = logits.is_contiguous(memory_format=torch.channels_last) and sum(size) > 128
    if not worthwhile or not in_vectors:
        return None

    # Of nine neighbours, every other of which begins nine more, the lowest and the highest.
    highest = F.max_pool2d(logits, 3, stride=2, ceil_mode=True)  # B K h/2 w/2
    lowest = -F.max_pool2d(-logits, 3, stride=2, ceil_mode=True)

    # NaN and infinity exclude no class: nothing is below them.
    largest = torch.maximum(highest.amax(), -lowest.amin())
    rounding = 16 * torch.finfo(logits.dtype).eps * largest
    floor = lowest.amax(1, keepdim=True) - rounding
    excluded = (highest < floor).permute(0, 2, 3, 1).flatten(0, 2).all(0)

    # What does not fill a vector at the end remains, and of the others whole vectors.
    whole = num_classes // LANES * LANES
    excluded[whole:] = False
    spare = int((~excluded[:whole]).sum()) % LANES
    if spare:
        excluded[excluded.nonzero()[: LANES - spare]] = False
    kept = (~excluded).nonzero().flatten()
    return kept if 2 * len(kept) <= num_classes else None


# What a pass calls one after another; the upsampling of the logits follows them.
PARTS = (*(f"encoder.stages.{i}" for i in range(NUM_STAGES)), "decode_head")
MIN_SIZE = 32
LANES = 16  # float32 numbers in the widest vectors
UPSAMPLED = 4  # times: the decode head works at a quarter of the input's size
STRIP_NUMBERS = 1 << 21  # logits in one strip: 8 MiB, of which caches hold the part in use


def check_input(shape: tuple[int, ...], in_channels: int = RGB) -> None:
    """Raises ValueError for what is not a batch of images B C H W of so many channels, both sides at least 32."""
    if len(shape) != 4 or shape[1] != in_channels:
        raise ValueError(
            f"The network takes images as B {in_channels} H W, got shape {tuple(shape)}."
        )
    if min(shape[2:]) < MIN_SIZE:
        raise ValueError(
            f"The input is {shape[2]}×{shape[3]} pixels; both sides must be at least {MIN_SIZE}, "
            "since the last stage works at a 32nd of them."
        )


def _init_weights(module: nn.Module) -> None:
    """Draws weights as published: linear layers truncated normal with deviation 0.02, convolutions by fan-out."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        # Variance 2 / fan-out, where the fan-out counts one group's outputs.
        kernel = module.kernel_size[0] * module.kernel_size[1]
        fan_out = kernel * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)

    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
