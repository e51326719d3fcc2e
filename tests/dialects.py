"""Other SegFormers, the oracles: one written plainly from the paper under NVlabs' public names, one under
mmsegmentation's, and transformers' own.

The plain ones take their numbers from PUBLISHED, which repeats what each code base is known to compute.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segprune.spec import DECODER_DIMS, DEPTHS, WIDTHS

Fill = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Published:
    """LayerNorm eps of blocks and ends, of embeddings and reductions; fuse BatchNorm eps; GELU; last upsampling."""

    eps: float = 1e-6
    inner_eps: float = 1e-5
    bn_eps: float = 1e-5
    gelu: str = "none"
    align_corners: bool = False


PUBLISHED = {
    "nvlabs": Published(),
    "bubbliiiing": Published(bn_eps=1e-3, gelu="tanh", align_corners=True),
    "smp": Published(align_corners=True),
    "mmseg": Published(inner_eps=1e-6),
}


def sequence(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # B C H W -> B N C


def picture(x: Tensor, like: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, *like.shape[2:])  # B N C -> B C H W


class Embed(nn.Module):
    def __init__(self, inputs: int, width: int, kernel: int, stride: int, eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, width, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(width, eps=eps)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        if ratio > 1:
            self.sr, self.norm = (
                nn.Conv2d(width, width, ratio, ratio),
                nn.LayerNorm(width, eps=eps),
            )

    def forward(self, x: Tensor) -> Tensor:
        tokens = sequence(x)
        source = self.norm(sequence(self.sr(x))) if hasattr(self, "sr") else tokens
        keys, values = self.kv(source).tensor_split(2, dim=2)
        outs = []
        for q, k, v in zip(
            *(t.chunk(self.heads, dim=2) for t in (self.q(tokens), keys, values)), strict=True
        ):
            outs.append((q @ k.mT / q.shape[2] ** 0.5).softmax(dim=2) @ v)
        return picture(self.proj(torch.cat(outs, dim=2)), x)


class Mlp(nn.Module):
    def __init__(self, width: int, gelu: str, ratio: int = 4) -> None:
        super().__init__()
        self.gelu = gelu
        dim = ratio * width
        self.fc1, self.fc2 = nn.Linear(width, dim), nn.Linear(dim, width)
        self.dwconv = nn.Module()
        self.dwconv.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dwconv.dwconv(picture(self.fc1(sequence(x)), x))
        return picture(self.fc2(F.gelu(sequence(hidden), approximate=self.gelu)), x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int, numbers: Published) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            nn.LayerNorm(width, eps=numbers.eps),
            nn.LayerNorm(width, eps=numbers.eps),
        )
        self.attn, self.mlp = (
            Attention(width, heads, ratio, numbers.inner_eps),
            Mlp(width, numbers.gelu),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(picture(self.norm1(sequence(x)), x))
        return x + self.mlp(picture(self.norm2(sequence(x)), x))


class Reference(nn.Module):
    """A dense variant under NVlabs' names; `conv_seg` adds the layer that their files carry and nothing uses."""

    def __init__(
        self, variant: str, num_classes: int, numbers: Published, *, conv_seg: bool = False
    ) -> None:
        super().__init__()
        self.numbers = numbers
        self.backbone, self.decode_head = nn.Module(), nn.Module()
        inputs, dim = 3, DECODER_DIMS[variant]
        for s, (width, depth) in enumerate(
            zip(WIDTHS[variant], DEPTHS[variant], strict=True), 1
        ):
            kernel, stride, heads, ratio = (
                (7, 4, 1, 8),
                (3, 2, 2, 4),
                (3, 2, 5, 2),
                (3, 2, 8, 1),
            )[s - 1]
            blocks = [Block(width, heads, ratio, numbers) for _ in range(depth)]
            self.backbone.add_module(
                f"patch_embed{s}", Embed(inputs, width, kernel, stride, numbers.inner_eps)
            )
            self.backbone.add_module(f"block{s}", nn.Sequential(*blocks))
            self.backbone.add_module(f"norm{s}", nn.LayerNorm(width, eps=numbers.eps))
            self.decode_head.add_module(
                f"linear_c{s}", nn.ModuleDict({"proj": nn.Linear(width, dim)})
            )
            inputs = width
        bn = nn.BatchNorm2d(dim, eps=numbers.bn_eps)
        fuse = {"conv": nn.Conv2d(4 * dim, dim, 1, bias=False), "bn": bn}
        self.decode_head.linear_fuse = nn.ModuleDict(fuse)
        self.decode_head.linear_pred = nn.Conv2d(dim, num_classes, 1)
        if conv_seg:
            self.decode_head.conv_seg = nn.Conv2d(128, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, maps = x.shape[2:], []
        for s in range(1, 5):
            embed = self.backbone.get_submodule(f"patch_embed{s}")
            x = embed.proj(x)
            x = self.backbone.get_submodule(f"block{s}")(picture(embed.norm(sequence(x)), x))
            x = picture(self.backbone.get_submodule(f"norm{s}")(sequence(x)), x)
            branch = picture(
                self.decode_head.get_submodule(f"linear_c{s}").proj(sequence(x)), x
            )
            maps.insert(
                0,
                F.interpolate(branch, maps[-1].shape[2:], mode="bilinear") if maps else branch,
            )
        fuse = self.decode_head.linear_fuse
        logits = self.decode_head.linear_pred(fuse.bn(fuse.conv(torch.cat(maps, dim=1))).relu())
        return F.interpolate(
            logits, size, mode="bilinear", align_corners=self.numbers.align_corners
        )


class ReducedAttention(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int, eps: float) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        if ratio > 1:
            self.sr, self.norm = (
                nn.Conv2d(width, width, ratio, ratio),
                nn.LayerNorm(width, eps=eps),
            )

    def forward(self, x: Tensor) -> Tensor:
        tokens = sequence(x)
        source = self.norm(sequence(self.sr(x))) if hasattr(self, "sr") else tokens
        return picture(self.attn(tokens, source, source, need_weights=False)[0], x)


class Layer(nn.Module):
    def __init__(
        self, width: int, hidden: int, heads: int, ratio: int, numbers: Published
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            nn.LayerNorm(width, eps=numbers.eps),
            nn.LayerNorm(width, eps=numbers.eps),
        )
        self.attn = ReducedAttention(width, heads, ratio, numbers.inner_eps)
        depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        up, down = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.ffn = nn.Module()
        self.ffn.layers = nn.Sequential(
            up, depthwise, nn.GELU(numbers.gelu), nn.Dropout(0.0), down, nn.Dropout(0.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(picture(self.norm1(sequence(x)), x))
        return x + self.ffn.layers(picture(self.norm2(sequence(x)), x))


class ConvModule(nn.Module):
    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.conv, self.bn = (
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs, eps=eps),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class ConvReference(nn.Module):
    """A dense variant under mmsegmentation 1.x's names, or what its classes build with these arguments."""

    def __init__(
        self,
        variant: str,
        num_classes: int,
        numbers: Published,
        *,
        embed_dims: int | None = None,
        mlp_ratio: int = 4,
        channels: int = 256,
    ) -> None:
        super().__init__()
        self.backbone, self.decode_head = nn.Module(), nn.Module()
        self.backbone.layers, self.decode_head.convs = nn.ModuleList(), nn.ModuleList()
        inputs, dim = 3, channels
        for i, depth in enumerate(DEPTHS[variant]):
            kernel, stride, heads, ratio = (
                (7, 4, 1, 8),
                (3, 2, 2, 4),
                (3, 2, 5, 2),
                (3, 2, 8, 1),
            )[i]
            width = heads * (embed_dims or WIDTHS[variant][0])
            embed = nn.Module()
            embed.projection = nn.Conv2d(inputs, width, kernel, stride, kernel // 2)
            embed.norm = nn.LayerNorm(width, eps=numbers.inner_eps)
            blocks = nn.ModuleList(
                Layer(width, mlp_ratio * width, heads, ratio, numbers) for _ in range(depth)
            )
            self.backbone.layers.append(
                nn.ModuleList([embed, blocks, nn.LayerNorm(width, eps=numbers.eps)])
            )
            self.decode_head.convs.append(ConvModule(width, dim, numbers.bn_eps))
            inputs = width
        self.decode_head.fusion_conv = ConvModule(4 * dim, dim, numbers.bn_eps)
        self.decode_head.conv_seg = nn.Conv2d(dim, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, maps = x.shape[2:], []
        for (embed, blocks, norm), conv in zip(
            self.backbone.layers, self.decode_head.convs, strict=True
        ):
            x = embed.projection(x)
            x = picture(embed.norm(sequence(x)), x)
            for block in blocks:
                x = block(x)
            x = picture(norm(sequence(x)), x)
            branch = conv(x)
            maps.append(
                F.interpolate(branch, maps[0].shape[2:], mode="bilinear") if maps else branch
            )
        logits = self.decode_head.conv_seg(self.decode_head.fusion_conv(torch.cat(maps, dim=1)))
        return F.interpolate(logits, size, mode="bilinear")


def reference(
    dialect: str, fill: Fill, variant: str = "b0", num_classes: int = 5, **options: bool
) -> nn.Module:
    """In float32 and eval mode, every weight and statistic as training would leave it."""
    kind = ConvReference if dialect == "mmseg" else Reference
    return build_filled(lambda: kind(variant, num_classes, PUBLISHED[dialect], **options), fill)


def smp_names(nvlabs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as segmentation_models_pytorch calls them."""
    names = {"backbone.": "encoder.", "decode_head.linear_fuse.conv": "decoder.fuse_stage.0"}
    names |= {
        "decode_head.linear_fuse.bn": "decoder.fuse_stage.1",
        "decode_head.linear_pred": "segmentation_head.0",
    }
    names |= {
        f"decode_head.linear_c{s}.proj": f"decoder.mlp_stage.{4 - s}.linear"
        for s in range(1, 5)
    }
    state = {}
    for key, tensor in nvlabs.items():
        old = next(old for old in names if key.startswith(old))
        state[names[old] + key.removeprefix(old)] = tensor
    return state


def state_in(dialect: str, fill: Fill, **options: bool) -> dict[str, Tensor]:
    """A b0 with 5 classes as that dialect saves it (hf: as in memory)."""
    if dialect == "hf":
        return hf_model("b0", fill).state_dict()
    state = reference(dialect, fill, **options).state_dict()
    return smp_names(state) if dialect == "smp" else state


def hf_config(variant: str, num_classes: int = 5) -> SegformerConfig:
    return SegformerConfig(
        hidden_sizes=list(WIDTHS[variant]),
        depths=list(DEPTHS[variant]),
        decoder_hidden_size=DECODER_DIMS[variant],
        num_labels=num_classes,
    )


def hf_model(
    variant: str, fill: Fill, kind: type[nn.Module] = SegformerForSemanticSegmentation
) -> nn.Module:
    return build_filled(lambda: kind(hf_config(variant)), fill)


def build_filled(build: Callable[[], nn.Module], fill: Fill) -> nn.Module:
    """In eval mode; built without its slow initialisation, all of which `fill` overwrites."""
    with torch.device("meta"):
        model = build()
    model = model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return fill(model.eval())
