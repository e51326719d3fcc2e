"""`segprune info FILE`: what a checkpoint holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from typer import Option

from segprune import checkpoint
from segprune.checkpoint import Checkpoint
from segprune.cli.console import console, show_notes, show_settings, show_table
from segprune.cli.flags import Dialect, Heads, ModelFile, Weights, switch
from segprune.runs.records import network_size
from segprune.spec import BlockSpec, Spec, spec_to_dict
from segprune.stats import count

WIDTHS = ("block", "stage", "heads", "qk", "v", "reduction", "ffn")
NEW_CLASSES = 150  # of the head that a bare backbone is shown with, as published


@dataclass(frozen=True)
class InfoFlags:
    model_path: ModelFile
    input_shape: Annotated[
        tuple[int, int],
        Option("--input_shape", metavar="H W", help="Size at which MACs are counted."),
    ] = (512, 512)
    dialect: Dialect = None
    weights: Weights = None
    heads: Heads = None
    num_classes: Annotated[
        int | None,
        Option("--num_classes", help="For a backbone-only file: classes of the new head."),
    ] = None
    as_json: Annotated[bool, switch("--json", "Print one JSON object instead of tables.")] = (
        False
    )


def run(flags: InfoFlags) -> None:
    """Show a checkpoint's dialect, variant, widths per stage and block, parameters and MACs."""
    opened = checkpoint.read(
        flags.model_path,
        dialect=flags.dialect,
        num_classes=flags.num_classes,
        weights=flags.weights,
        heads=flags.heads,
        new_classes=NEW_CLASSES,
    )
    spec = opened.spec
    counts = count(spec, flags.input_shape)

    # For programs: JSON alone, without tables and notes.
    if flags.as_json:
        record = {
            "dialect": opened.dialect,
            "notes": list(opened.notes),
            "spec": spec_to_dict(spec),
        }
        console.print_json(
            json.dumps(
                record | network_size(counts) | {"input_shape": list(flags.input_shape)}
            ),
            # Escapes, where the output's encoding lacks letters: a program gets all of them.
            ensure_ascii=not console.encoding.startswith("utf"),
        )
        return

    # The whole network.
    facts = {
        "dialect": opened.dialect,
        "variant": spec.variant,
        "num_classes": spec.num_classes,
        "decode head": _describe_head(opened),
        "channels": spec.in_channels,
        **_describe_preprocessing(spec),
        "parameters": f"{counts.parameters:,}",
        "MACs": f"{counts.macs / 1e9:.3f} G at {flags.input_shape[0]}×{flags.input_shape[1]}",
        "FLOPs": f"{counts.flops / 1e9:.3f} G (2 × MACs)",
    }
    show_settings(flags.model_path, facts)

    # A row per block, since pruning makes the blocks of a stage differ.
    rows = []
    for i, stage in enumerate(spec.stages):
        for j, block in enumerate(stage.blocks):
            rows.append([f"stages.{i}.blocks.{j}", str(stage.width), *_describe_block(block)])
    title = (
        "Widths, named as in plans and in --ignore; qk and v per head; kv ÷: side of the windows that keys and values "
        "are averaged over"
    )
    show_table(title, [*WIDTHS, "kv ÷"], rows)
    show_notes(opened.notes)


def _describe_head(opened: Checkpoint) -> str:
    spec = opened.spec
    branches = "" if spec.folded else f"branches {' '.join(map(str, spec.branch_widths))}, "
    return f"{spec.head_form.branches}; {branches}width {spec.decoder_dim}"


def _describe_preprocessing(spec: Spec) -> dict[str, str]:
    """Returns how images and labels are read, as the flags that overrule it are named."""
    own = spec.preprocessing
    numbers = {"mean": own.mean, "std": own.std}
    facts = {
        name: " ".join(f"{value:g}" for value in all_of) for name, all_of in numbers.items()
    }
    if own.num_channels != spec.in_channels:
        facts = dict.fromkeys(numbers, f"not stated for {spec.in_channels} channels")
    facts["pixels"] = f"(pixels 0..255 - mean) / std, {own.channels.upper()}"
    if own.size is not None:
        facts["pixels"] += f"; trained at {own.size[0]}×{own.size[1]}"

    facts["labels"] = f"{own.label_offset:+d}" if own.label_offset else "as they are"
    facts["labels"] += f"; {own.ignore_index} is ignored"
    return facts


def _describe_block(block: BlockSpec) -> list[str]:
    widths = (block.num_heads, block.qk_dim, block.v_dim, block.reduction_dim, block.ffn_dim)
    return [
        *(str(width) if width else "–" for width in widths),
        str(block.kv_reduction) if block.has_attention else "–",
    ]  # a branch that was removed has widths 0
