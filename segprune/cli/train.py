"""`segprune train`, and train.py: from scratch, from any checkpoint, from a pruned file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Option

from segprune import checkpoint
from segprune.checkpoint import check_writable
from segprune.cli.common import choose_device, console, open_data, show_notes, show_score, show_settings, switch
from segprune.cli.fitting import Resumable, fit, load_resumable
from segprune.cli.journal import BEST, LAST, Fit, check_not_overwritten
from segprune.data import LAYOUTS, Source
from segprune.fold import fold_decoder
from segprune.model import SegFormer, check_input
from segprune.spec import Spec, standard_spec
from segprune.training.config import TrainConfig
from segprune.training.distill import Distillation
from segprune.training.losses import LOSSES, WEIGHT_RULES, SegmentationLoss, class_weights_from_counts, parse_loss
from segprune.training.optim import check_optimizer
from segprune.training.schedule import voc_lr, voc_schedule

SCRATCH_LR, PRETRAINED_LR = 1e-3, 6e-5  # the first as measured on the generated data, the second the paper's
VOC_LR = {"adamw": 1e-4, "sgd": 1e-2}  # what the VOC scripts start from


@dataclass(frozen=True)
class TrainSettings:
    data: Annotated[
        str, Option("--data", help="Data set: a folder, a list file or a Hugging Face name; see docs/data.md.")
    ] = "VOCdevkit"
    layout: Annotated[
        str | None, Option("--layout", help=f"Overrules the layout that is recognised: {', '.join(LAYOUTS)}.")
    ] = None
    skip_bad: Annotated[
        bool, switch("--skip_bad", "Go on without pictures that cannot be read; all are tried before training.")
    ] = False
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
            help="Highest learning rate. If not given: 1e-3 from scratch, 6e-5 from a checkpoint, "
            "and a tenth of the rate that a file of ours was trained with.",
        ),
    ] = None
    lr_rule: Annotated[
        str,
        Option(
            "--lr_rule",
            help="voc: as the VOC scripts do, --lr (1e-4 if not given, 1e-2 for sgd) times batch size / 16, clipped; cosine decay.",
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
        Option("--layer_decay", help="The encoder's rate times it with every block further from the head; 1: no decay."),
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
    amp: Annotated[str, Option("--amp", help="Mixed precision: no, fp16 or bf16.")] = "no"
    eval_every: Annotated[int, Option("--eval_every", help="Epochs between two scores on the val list.")] = 1
    save_steps: Annotated[int, Option("--save_steps", help="Also save the state for --resume every so many steps.")] = 0
    keep: Annotated[int, Option("--keep", min=0, help="Keep the weights of so many latest epochs as files.")] = 0
    tensorboard: Annotated[bool, switch("--tensorboard", "Write logs for TensorBoard too.")] = False
    num_workers: Annotated[int, Option("--num_workers", min=0, help="Processes that load pictures.")] = 2
    cuda: Annotated[bool, switch("--cuda", "Use the GPU; several GPUs by torchrun train.py …")] = False
    seed: Annotated[int, Option("--seed", help="Of weights, order and augmentation.")] = 11
    save_dir: Annotated[str, Option("--save_dir", help="Folder for checkpoints and results.")] = "logs"
    dialect: Annotated[str | None, Option("--dialect", help="Overrules the dialect that is recognised.")] = None
    teacher_dialect: Annotated[str | None, Option("--teacher_dialect", help="The same for the --teacher.")] = None
    resume: Annotated[
        bool, switch("--resume", "Go on with the run in --save_dir, with the settings it was started with.")
    ] = False


TEACHER_FLAGS = ("distill_pixel", "distill_channel", "distill_feature", "teacher_dialect")


def run(config: TrainSettings, given: frozenset[str]) -> None:
    """Train or fine-tune a SegFormer, and score it after every epoch.

    Fine-tuning a pruned network, as a rule: a tenth of the original learning rate, 50 to 100 epochs, --teacher with
    the dense network, optionally --freeze_epochs first. Several GPUs: torchrun --nproc_per_node N train.py --cuda …
    """
    folder = Path(config.save_dir)
    resumed = None
    notes: tuple[str, ...] = ()
    if config.resume:
        resumed, extra = load_resumable(folder)
        config = _resumed_config(config, given, resumed)
        model = SegFormer(resumed.spec)
    else:
        _check_flags(config, given)
        check_not_overwritten(folder, config.model_path, config.teacher)
        model, notes, extra, config = _start(config)
    check_input((1, 3, *config.input_shape))
    choose_device(config.cuda)
    config, reason = with_rates(config, extra)
    check_settings(config)
    show_settings("Resumed training" if config.resume else "Training", asdict(config))
    show_notes((*notes, reason))
    source, labels = open_data(
        config.data,
        config.layout,
        model.spec.num_classes,
        ("train", "val"),
        skip_bad=config.skip_bad,
        num_workers=config.num_workers,
    )
    check_writable(folder)
    done = fit_with(config, model, source, labels.pixels, extra, resumed)
    show_score(f"Best epoch {done.epoch} on val", done.score, source.class_names)
    console.print(f"Saved: {folder / BEST}\n       {folder / LAST}", soft_wrap=True)


def fit_with(
    config: TrainSettings,
    model: SegFormer,
    source: Source,
    pixels: tuple[int, ...],
    extra: dict[str, Any],
    resumed: Resumable | None = None,
) -> Fit:
    """One run as the settings say, their rates chosen; `pixels` of each class are what the label check counted.

    `extra` is what the checkpoint carries on from the one it started from.
    """
    assert config.lr is not None
    from_scratch = config.lr if not config.model_path else 10 * config.lr  # the rate whose tenth suits what comes next
    classes = {"class_names": list(source.class_names), "palette": list(source.palette)} if source.class_names else {}
    model.encoder.checkpointing = config.checkpointing
    return fit(
        model,
        train_config(config, model.spec.num_classes, pixels),
        source,
        Path(config.save_dir),
        cuda=config.cuda,
        settings=asdict(config),
        extra={"lr": from_scratch} | extra | classes,
        teacher=_teacher(config, model, source.class_names) if config.teacher else None,
        resumed=resumed,
        keep=config.keep,
        tensorboard=config.tensorboard,
    )


def _teacher(config: TrainSettings, student: SegFormer, names: tuple[str, ...]) -> SegFormer:
    """The dense network with its head folded; refused if it knows other classes than the student."""
    found = checkpoint.read(config.teacher, dialect=config.teacher_dialect)  # which refuses a bare backbone
    if found.spec.num_classes != student.spec.num_classes:
        raise ValueError(
            f"--teacher {config.teacher} has {found.spec.num_classes} classes and the network to train "
            f"{student.spec.num_classes}; give a teacher that was trained for the same classes (another number often "
            "means another rule of which label is ignored)."
        )
    for number, (theirs, ours) in enumerate(zip(found.extra.get("class_names", ()), names, strict=False)):
        if theirs != ours:
            raise ValueError(
                f"--teacher {config.teacher} calls class {number} {theirs!r} and the data {ours!r}; "
                "give a teacher that was trained for the same classes."
            )
    return fold_decoder(checkpoint.build(found))


def _check_flags(config: TrainSettings, given: frozenset[str]) -> None:
    for name in TEACHER_FLAGS:
        if name in given and not config.teacher:
            raise ValueError(f"--{name} has no effect without --teacher; give the dense checkpoint to learn from.")
    for name in ("decay", "warmup"):
        if name in given and config.lr_rule:
            raise ValueError(f"--{name} has no effect with --lr_rule {config.lr_rule}, which sets it; leave one out.")
    if config.lr_rule not in ("", "voc"):
        raise ValueError(f"--lr_rule {config.lr_rule!r} is unknown; it knows voc.")


def _start(config: TrainSettings) -> tuple[SegFormer, tuple[str, ...], dict[str, Any], TrainSettings]:
    """Network, notes to show, the extra to carry on, and the settings with what was read off the file."""
    torch.manual_seed(config.seed)
    notes: tuple[str, ...] = ()
    extra: dict[str, Any] = {}
    backbone_only = False
    if not config.model_path:
        if config.dialect is not None:
            raise ValueError("--dialect was given without --model_path; it says who wrote a checkpoint.")
        spec = standard_spec(config.phi or "b2", 8 if config.num_classes is None else config.num_classes)
        model = SegFormer(_with_drop_path(spec, config.drop_path))
    else:
        found = checkpoint.read(
            config.model_path, dialect=config.dialect, variant=config.phi, num_classes=config.num_classes
        )
        found = replace(found, spec=_with_drop_path(found.spec, config.drop_path))
        model, notes, extra = checkpoint.build(found).train(), found.notes, dict(found.extra)
        backbone_only = found.backbone_only
    head_lr = config.head_lr
    if head_lr is None:
        head_lr = 10.0 if backbone_only else 1.0
    read = replace(config, phi=model.spec.variant, num_classes=model.spec.num_classes, head_lr=head_lr)
    return model, notes, extra, read


def _with_drop_path(spec: Spec, rate: float | None) -> Spec:
    return spec if rate is None else replace(spec, numerics=replace(spec.numerics, drop_path=rate))


def _resumed_config(config: TrainSettings, given: frozenset[str], resumed: Resumable) -> TrainSettings:
    """The old run's settings; flags given now are kept beside them, and refused by the loop if they contradict."""
    old = {name: tuple(v) if isinstance(v, list) else v for name, v in resumed.settings.items()}
    flags = {name: getattr(config, name) for name in given}
    fixed = ("model_path", "phi", "num_classes", "dialect", "drop_path", "teacher", "lr_rule")
    wrong = [name for name in fixed if name in flags and flags[name] != old[name]]
    if wrong:
        raise ValueError(
            f"The run to resume had --{wrong[0]} {_word(old[wrong[0]])}, now it is {_word(flags[wrong[0]])}; "
            "leave the flag out."
        )
    resumed_config = replace(config, **{**old, **flags, "resume": True})
    _check_flags(resumed_config, given)
    return resumed_config


def _word(value: Any) -> str:
    return "none" if value in (None, "") else str(value)


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
    return replace(config, lr=PRETRAINED_LR), (
        f"Learning rate {PRETRAINED_LR:g}: the paper's, since the file does not say what it was trained with."
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
    also = ("ema", "freeze_epochs", "scale", "eval_every", "save_steps", "num_workers", "seed", "compile")
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
