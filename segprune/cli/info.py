"""`segprune info FILE`: what a checkpoint holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from typer import Argument, Option

from segprune import checkpoint
from segprune.checkpoint import Checkpoint
from segprune.cli.console import console, show_notes, show_settings, show_table
from segprune.cli.flags import switch
from segprune.runs.records import network_size
from segprune.spec import BlockSpec, spec_to_dict
from segprune.stats import count


@dataclass(frozen=True)
class InfoConfig:
    model_path: Annotated[
        str, Argument(metavar="FILE", help=".pth, .pt, .safetensors, a Hugging Face folder or hub name.")
    ]
    input_shape: Annotated[
        tuple[int, int], Option("--input_shape", metavar="H W", help="Size at which MACs are counted.")
    ] = (512, 512)
    dialect: Annotated[str | None, Option("--dialect", help="Overrules the dialect that is recognised.")] = None
    num_classes: Annotated[
        int | None, Option("--num_classes", help="For a backbone-only file: classes of the new head.")
    ] = None
    as_json: Annotated[bool, switch("--json", "Print one JSON object instead of tables.")] = False


def run(config: InfoConfig, given: frozenset[str]) -> None:
    """Show a checkpoint's dialect, variant, widths per stage and block, parameters and MACs."""
    found = checkpoint.read(config.model_path, dialect=config.dialect, num_classes=config.num_classes)
    counts = count(found.spec, config.input_shape)
    if config.as_json:
        record = {"dialect": found.dialect, "notes": list(found.notes), "spec": spec_to_dict(found.spec)}
        console.print_json(json.dumps(record | network_size(counts) | {"input_shape": list(config.input_shape)}))
        return
    size = f"{config.input_shape[0]}×{config.input_shape[1]}"
    settings = {
        "dialect": found.dialect,
        "variant": found.spec.variant,
        "num_classes": found.spec.num_classes,
        "decode head": _head(found),
        "parameters": f"{counts.parameters:,}",
        "MACs": f"{counts.macs / 1e9:.3f} G at {size}",
        "FLOPs": f"{counts.flops / 1e9:.3f} G (2 × MACs)",
    }
    show_settings(config.model_path, settings)
    rows = [
        [f"stages.{s}.blocks.{b}", str(stage.width), *_block(block)]
        for s, stage in enumerate(found.spec.stages)
        for b, block in enumerate(stage.blocks)
    ]
    title = "Widths, named as in plans and in --ignore; qk and v per head"
    show_table(title, ["block", "stage", "heads", "qk", "v", "reduction", "ffn"], rows)
    show_notes(found.notes)


def _head(found: Checkpoint) -> str:
    dims = found.spec.branch_dims
    if dims is None:
        return f"folded, width {found.spec.decoder_dim}"
    kind = "as published" if found.spec.head == "mlp" else "mmsegmentation's, with BatchNorm and ReLU in its branches"
    return f"{kind}, branches {' '.join(map(str, dims))}, width {found.spec.decoder_dim}"


def _block(block: BlockSpec) -> list[str]:
    widths = (block.num_heads, block.qk_dim, block.v_dim, block.reduction_dim, block.ffn_dim)
    return [str(width) if width else "–" for width in widths]  # a branch that was removed has widths 0
