"""`segprune eval FILE`: mIoU of any checkpoint on a VOC folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

from typer import Argument, Option

from segprune import checkpoint
from segprune.cli.common import (
    check_data,
    choose_device,
    console,
    progress_bar,
    show_notes,
    show_score,
    show_settings,
    switch,
)
from segprune.data import open_source
from segprune.model import check_input
from segprune.training.evaluate import evaluate


@dataclass(frozen=True)
class EvalConfig:
    model_path: Annotated[
        str, Argument(metavar="FILE", help=".pth, .pt, .safetensors, a Hugging Face folder or hub name.")
    ]
    data: Annotated[str, Option("--data", help="Folder in VOC layout.")] = "VOCdevkit"
    split: Annotated[str, Option("--split", help="Name of a list in ImageSets/Segmentation.")] = "val"
    input_shape: Annotated[
        tuple[int, int], Option("--input_shape", metavar="H W", help="Pictures are letterboxed to this size.")
    ] = (512, 512)
    batch_size: Annotated[int, Option("--batch_size", min=1, help="Pictures at a time.")] = 8
    num_workers: Annotated[int, Option("--num_workers", min=0, help="Processes that load pictures.")] = 2
    cuda: Annotated[bool, switch("--cuda", "Use the GPU.")] = False
    dialect: Annotated[str | None, Option("--dialect", help="Overrules the dialect that is recognised.")] = None
    json_path: Annotated[str, Option("--json", metavar="PATH", help="Save the score there as JSON.")] = ""


def run(config: EvalConfig, given: frozenset[str]) -> None:
    """Score a checkpoint on a VOC folder: IoU per class, mIoU, pixel accuracy.

    The score is that of the original pixels: logits are resized to each mask's own size.
    """
    check_input((1, 3, *config.input_shape))
    device = choose_device(config.cuda)
    found = checkpoint.read(config.model_path, dialect=config.dialect)
    num_classes = found.spec.num_classes
    read = {"dialect": found.dialect, "variant": found.spec.variant, "num_classes": num_classes}
    show_settings("Evaluation", asdict(config) | read)
    show_notes(found.notes)
    check_data(config.data, num_classes, (config.split,))
    samples = open_source(config.data).split(config.split)
    model = checkpoint.build(found).to(device)
    with progress_bar("scoring") as advance:
        score = evaluate(
            model,
            samples,
            num_classes,
            config.input_shape,
            device=device,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            progress=advance,
        )
    show_score(f"{config.model_path} on {config.split}", score, config.data)
    if config.json_path:
        record = asdict(score) | {"settings": asdict(config), "num_classes": num_classes}
        checkpoint.write_json(record, config.json_path)
        console.print(f"Saved: {config.json_path}", soft_wrap=True)
