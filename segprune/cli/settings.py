"""The flags of training, and what the loop is told for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from typer import Option

from segprune.cli.flags import Amp, Layout, LoaderProcesses, SkipBad, switch
from segprune.cli.machine import AUTO
from segprune.runs.folder import check_not_overwritten
from segprune.training.config import TrainConfig
from segprune.training.distill import Distillation
from segprune.training.losses import LOSSES, WEIGHT_RULES, SegmentationLoss, class_weights_from_counts, parse_loss
from segprune.training.optim import check_optimizer
from segprune.training.schedule import voc_lr, voc_schedule

SCRATCH_LR, PRETRAINED_LR = 1e-3, 6e-5  # the first as measured on the generated data, the second the paper's
MUCH_LOST = 0.9  # of the mIoU still there; see docs/log.md
VOC_LR = {"adamw": 1e-4, "sgd": 1e-2}  # what the VOC scripts start from


@dataclass(frozen=True)
class TrainSettings:
    PANELS: ClassVar[Mapping[str, str]] = {
        "data": "Data",
        "model_path": "The network",
        "epochs": "How long",
        "teacher": "Learning from a teacher",
        "loss": "Loss",
        "optimizer": "Optimiser and learning rate",
        "scale": "Augmentation and regularisation",
        "checkpointing": "Memory and speed",
        "eval_every": "What is saved, and when",
        "num_workers": "The run",
    }

    data: Annotated[
        str, Option("--data", help="Data set: a folder, a list file or a Hugging Face name; see docs/data.md.")
    ] = "VOCdevkit"
    layout: Layout = None
    skip_bad: SkipBad = False
    model_path: Annotated[
        str, Option("--model_path", help="Checkpoint to start from, pruned or not; empty: from scratch.")
    ] = ""
    phi: Annotated[
        str | None, Option("--phi", help="MiT variant b0 … b5; read off the checkpoint if there is one, else b2.")
    ] = None
    num_classes: Annotated[
        int | None,
        Option("--num_classes", help="Background included; read off the checkpoint if there is one, else 8."),
    ] = None
    input_shape: Annotated[
        tuple[int, int], Option("--input_shape", metavar="H W", help="Size of the crops trained on, and of scoring.")
    ] = (512, 512)
    epochs: Annotated[int, Option("--epochs", help="Passes over the training pictures.")] = 50
    batch_size: Annotated[int, Option("--batch_size", help="Pictures per step, over all processes.")] = 8
    accumulate: Annotated[
        int, Option("--accumulate", help="Take each batch in so many pieces, one after another, to save memory.")
    ] = 1
    teacher: Annotated[
        str, Option("--teacher", help="Dense checkpoint to learn from beside the labels (distillation).")
    ] = ""
    distill_pixel: Annotated[
        float, Option("--distill_pixel", help="Weight of the classes' probabilities at each pixel; 0: off.")
    ] = Distillation.pixel
    distill_channel: Annotated[
        float, Option("--distill_channel", help="Weight of where each class is seen; 0: off.")
    ] = Distillation.channel
    distill_feature: Annotated[
        float, Option("--distill_feature", help="Weight of the four stages' features; 0: off.")
    ] = Distillation.feature
    loss: Annotated[str, Option("--loss", help=f"Sum of {', '.join(LOSSES)}, for example ce+0.5*dice.")] = "ce"
    class_weights: Annotated[
        str,
        Option("--class_weights", help="One number per class, or from the data: enet (1/ln) or median (frequency)."),
    ] = ""
    label_smoothing: Annotated[float, Option("--label_smoothing", help="Share of each label spread over all.")] = 0.0
    optimizer: Annotated[str, Option("--optimizer", help="adamw or sgd.")] = "adamw"
    lr: Annotated[
        float | None,
        Option(
            "--lr",
            help="Highest learning rate. If not given: 1e-3 from scratch, 6e-5 from a checkpoint, a tenth of the rate "
            "that a file of ours was trained with from scratch, or else what it was fine-tuned with.",
        ),
    ] = None
    lr_rule: Annotated[
        str,
        Option(
            "--lr_rule",
            help="voc: as the VOC scripts do, --lr (if not given 1e-4, for sgd 1e-2) times batch size / 16, clipped; "
            "cosine decay.",
        ),
    ] = ""
    head_lr: Annotated[
        float | None,
        Option(
            "--head_lr", help="Rate of the decode head in rates of the encoder; 10 on a bare backbone, as published."
        ),
    ] = None
    layer_decay: Annotated[
        float,
        Option("--layer_decay", help="The encoder's rate times it with every block further from the head; 1: none."),
    ] = 1.0
    weight_decay: Annotated[float, Option("--weight_decay", help="Biases and norms have none.")] = 0.01
    momentum: Annotated[float, Option("--momentum", help="Of SGD; AdamW's first beta.")] = 0.9
    decay: Annotated[str, Option("--decay", help="How the learning rate falls: poly, cosine or constant.")] = "poly"
    warmup: Annotated[float, Option("--warmup", help="Share of all steps in which the learning rate rises.")] = 0.05
    clip_norm: Annotated[float, Option("--clip_norm", help="Clip the gradients' norm to it; 0: do not.")] = 0.0
    ema: Annotated[
        float, Option("--ema", help="Score and save a moving average of the weights with this decay; 0: none.")
    ] = 0.0
    freeze_epochs: Annotated[int, Option("--freeze_epochs", help="First so many epochs: only the decode head.")] = 0
    scale: Annotated[
        tuple[float, float], Option("--scale", metavar="LOW HIGH", help="Random resizing before the crop.")
    ] = (0.5, 2.0)
    drop_path: Annotated[
        float | None,
        Option(
            "--drop_path",
            min=0.0,
            max=0.9,
            help="Stochastic depth of the last block; read off the checkpoint if there is one, else 0.1.",
        ),
    ] = None
    checkpointing: Annotated[bool, switch("--checkpointing", "Compute the blocks twice to keep less in memory.")] = (
        False
    )
    compile: Annotated[bool, switch("--compile", "Compile the network first (torch.compile).")] = False
    amp: Amp = AUTO
    tf32: Annotated[
        bool | None,
        Option(
            "--tf32/--no_tf32",
            help="Take float32 products in TF32 while training on a GPU; if not given, where the GPU can.",
        ),
    ] = None
    eval_every: Annotated[int, Option("--eval_every", help="Epochs between two scores on the val list.")] = 1
    save_steps: Annotated[int, Option("--save_steps", help="Also save the state for --resume every so many steps.")] = 0
    keep: Annotated[int, Option("--keep", min=0, help="Keep the weights of so many latest epochs as files.")] = 0
    tensorboard: Annotated[bool, switch("--tensorboard", "Write logs for TensorBoard too.")] = False
    num_workers: LoaderProcesses = None
    cuda: Annotated[bool, switch("--cuda", "Use the GPU; several GPUs by torchrun train.py …")] = False
    seed: Annotated[int, Option("--seed", help="Of weights, order and augmentation.")] = 11
    save_dir: Annotated[str, Option("--save_dir", help="Folder for checkpoints and results.")] = "logs"
    dialect: Annotated[str | None, Option("--dialect", help="Overrules the dialect that is recognised.")] = None
    teacher_dialect: Annotated[str | None, Option("--teacher_dialect", help="The same for the --teacher.")] = None
    resume: Annotated[
        bool, switch("--resume", "Go on with the run in --save_dir, with the settings it was started with.")
    ] = False


def check_settings(config: TrainSettings) -> None:
    """ValueError for settings that no run can have, before anything long begins."""
    assert config.num_classes is not None
    check_not_overwritten(Path(config.save_dir), config.model_path, config.teacher)
    train_config(config, config.num_classes, (1,) * config.num_classes)


def with_rates(config: TrainSettings, extra: Mapping[str, Any]) -> tuple[TrainSettings, str]:
    """The settings with a learning rate, and why it is that; `extra` is the checkpoint's that training starts from."""
    if config.resume:
        return config, f"Learning rate {config.lr:g}, as the run was started with."
    if config.lr_rule == "voc":
        check_optimizer(config.optimizer)
        asked = VOC_LR[config.optimizer] if config.lr is None else config.lr
        lr = voc_lr(asked, config.batch_size, config.optimizer)
        return replace(config, lr=lr), (
            f"Learning rate {lr:g}: {asked:g} for 16 pictures a step, times {config.batch_size} / 16, within the "
            f"limits of the VOC scripts for {config.optimizer}."
        )
    if config.lr is not None:
        return config, f"Learning rate {config.lr:g}, as asked for."
    if not config.model_path:
        return replace(config, lr=SCRATCH_LR), f"Learning rate {SCRATCH_LR:g}: from scratch, no --lr was given."
    if "lr" in extra:
        lr = float(extra["lr"]) / 10
        return replace(config, lr=lr), f"Learning rate {lr:g}: a tenth of what the network was trained with."
    if "finetuned_lr" in extra:
        lr = float(extra["finetuned_lr"])
        return replace(config, lr=lr), f"Learning rate {lr:g}: what the network was fine-tuned with before."
    return replace(config, lr=PRETRAINED_LR), (
        f"Learning rate {PRETRAINED_LR:g}: the paper's, since the file does not say what it was trained with."
    )


def advice(before: float, after: float, lr: float) -> tuple[str, ...]:
    """A note where pruning took more of the mIoU than `lr`, a tenth of the original rate, brings back; else none."""
    if after >= MUCH_LOST * before:
        return ()
    return (
        f"The cut network keeps {after / max(before, 1e-9):.0%} of the dense mIoU. Where so much is lost, the original "
        f"learning rate brings more of it back than the tenth taken here; --lr {10 * lr:g} is worth a try.",
    )


def train_config(config: TrainSettings, num_classes: int, pixels: tuple[int, ...]) -> TrainConfig:
    """What the loop is told; `pixels` per class are for weights that come from the data."""
    assert config.lr is not None
    schedule: dict[str, Any] = {"decay": config.decay, "warmup": config.warmup}
    if config.lr_rule == "voc":
        schedule = voc_schedule(config.epochs)
    weights = class_weights(config.class_weights, num_classes, pixels)
    distillation = None
    if config.teacher:
        distillation = Distillation(
            pixel=config.distill_pixel, channel=config.distill_channel, feature=config.distill_feature
        )
    same = (
        "input_shape",
        "epochs",
        "batch_size",
        "accumulate",
        "optimizer",
        "lr",
        "weight_decay",
        "layer_decay",
        "momentum",
        "clip_norm",
    )
    also = ("ema", "freeze_epochs", "scale", "eval_every", "save_steps", "num_workers", "seed", "tf32", "compile")
    return TrainConfig(
        num_classes=num_classes,
        head_lr_factor=1.0 if config.head_lr is None else config.head_lr,
        loss=SegmentationLoss(parse_loss(config.loss), weights, config.label_smoothing),
        distillation=distillation,
        mixed_precision=config.amp,
        **schedule,
        **{name: getattr(config, name) for name in same + also},
    )


def class_weights(text: str, num_classes: int, pixels: tuple[int, ...]) -> tuple[float, ...] | None:
    """--class_weights: nothing, a rule for the pixels counted, or one number per class."""
    if not text:
        return None
    if text in WEIGHT_RULES:
        return class_weights_from_counts(pixels, text)
    try:
        weights = tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError as error:
        rules = ", ".join(WEIGHT_RULES)
        raise ValueError(f"--class_weights is {text!r}; give {rules}, or one number per class: 1,2,0.5.") from error
    if len(weights) != num_classes:
        raise ValueError(f"--class_weights has {len(weights)} numbers for {num_classes} classes; give one per class.")
    return weights
