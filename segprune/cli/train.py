"""`segprune train`, and train.py: from scratch, from any checkpoint, from a pruned file."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from segprune import checkpoint
from segprune.checkpoint import Checkpoint
from segprune.cli.console import (
    choose_device,
    classes_of,
    console,
    open_data,
    show_notes,
    show_score,
    show_settings,
)
from segprune.cli.machine import fit_to_machine
from segprune.cli.prune.closing import add_finetuned, show_closing, unfinished
from segprune.cli.settings import TrainSettings, check_settings, train_config, with_rates
from segprune.cli.view import training_view
from segprune.data import Source
from segprune.files import check_writable
from segprune.fold import fold_decoder
from segprune.model import SegFormer, check_input
from segprune.runs.fit import Resumable, fit, load_resumable
from segprune.runs.folder import BEST, LAST, Fit, check_not_overwritten
from segprune.spec import Spec, standard_spec

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
        model, notes = SegFormer(resumed.spec), _complete(config, resumed)
    else:
        _check_flags(config, given)
        check_not_overwritten(folder, config.model_path, config.teacher)
        model, notes, extra, config = _start(config)
    check_input((1, 3, *config.input_shape))
    device = choose_device(config.cuda)
    if "tf32" in given and config.tf32 and device.type != "cuda":
        raise ValueError("--tf32 has no effect on a CPU; add --cuda, or leave it out.")
    config, chosen = fit_to_machine(config, device)
    config, reason = with_rates(config, extra)
    check_settings(config)
    teacher = _read_teacher(config, model.spec.num_classes)
    show_settings("Resumed training" if config.resume else "Training", asdict(config))
    show_notes((*notes, reason, *chosen))
    assert config.num_workers is not None
    source, labels = open_data(
        config.data,
        config.layout,
        model.spec.num_classes,
        ("train", "val"),
        skip_bad=config.skip_bad,
        num_workers=config.num_workers,
        trained=config.resume or bool(config.model_path and "num_classes" not in given),  # a bare backbone needs it
        classes=lambda names: check_teacher_names(
            f"--teacher {config.teacher}", teacher, names, "give a teacher that was trained for the same classes"
        ),
    )
    check_writable(folder)
    done = fit_with(config, model, source, labels.pixels, extra, teacher, resumed)
    show_score(f"Best epoch {done.epoch} on val", done.score, source.class_names)
    console.print(f"Saved: {folder / BEST}\n       {folder / LAST}", soft_wrap=True)
    record = unfinished(folder, config.epochs) if config.resume else None
    if record is not None and os.environ.get("RANK", "0") == "0":  # of several processes one writes
        add_finetuned(record, done, folder.resolve().parent)
        show_closing(record, folder.resolve().parent)


def fit_with(
    config: TrainSettings,
    model: SegFormer,
    source: Source,
    pixels: tuple[int, ...],
    extra: dict[str, Any],
    teacher: Checkpoint | None,
    resumed: Resumable | None = None,
    partial: bool = False,
) -> Fit:
    """One run as the settings say, their rates chosen; `pixels` of each class are what the label check counted.

    `extra` is what the checkpoint carries on from the one it started from; `teacher` is the one that settings name.
    """
    assert config.lr is not None
    rate = {} if "lr" in extra else {"finetuned_lr" if config.model_path else "lr": config.lr}  # lr: from scratch
    model.encoder.checkpointing = config.checkpointing
    with training_view() as view:
        return fit(
            model,
            train_config(config, model.spec.num_classes, pixels),
            source,
            Path(config.save_dir),
            cuda=config.cuda,
            settings=asdict(config),
            extra=extra | rate | classes_of(source, model.spec.num_classes),
            teacher=None if teacher is None else fold_decoder(checkpoint.build(teacher)),
            partial=partial,
            resumed=resumed,
            keep=config.keep,
            tensorboard=config.tensorboard,
            on_step=view.step,
            on_result=view.epoch,
        )


def _read_teacher(config: TrainSettings, num_classes: int) -> Checkpoint | None:
    """The dense network to learn from, if there is to be one; refused if it has another number of classes."""
    if not config.teacher:
        return None
    try:
        found = checkpoint.read(config.teacher, dialect=config.teacher_dialect)  # which refuses a bare backbone
    except FileNotFoundError as error:
        if not config.resume:
            raise
        raise FileNotFoundError(
            f"The run to resume learns from --teacher {config.teacher}, which is not there; put it back, or give its "
            "new place as --teacher."
        ) from error
    if found.spec.num_classes != num_classes:
        raise ValueError(
            f"--teacher {config.teacher} has {found.spec.num_classes} classes and the network to train "
            f"{num_classes}; give a teacher that was trained for the same classes (another number often "
            "means another rule of which label is ignored)."
        )
    return found


def check_teacher_names(flag: str, teacher: Checkpoint | None, names: tuple[str, ...], remedy: str) -> None:
    """ValueError where the teacher, which `flag` gave, and the data name a class differently, as far as both do.

    Another tool's file may have other words for the same classes; there it has to be a name of another class.
    """
    theirs = () if teacher is None else teacher.extra.get("class_names", ())
    words = teacher is not None and teacher.dialect != "segprune"
    for number, (their, our) in enumerate(zip(theirs, names, strict=False)):
        if their != our and (not words or their in names):
            raise ValueError(f"{flag} calls class {number} {their!r} and the data {our!r}; {remedy}.")


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
    """The old run's settings; flags given now are kept beside them, and refused by the loop if they contradict.

    Data and teacher may lie elsewhere now; the loop knows whether they are the same.
    """
    old = {name: tuple(v) if isinstance(v, list) else v for name, v in resumed.settings.items()}
    old.setdefault("tf32", False)  # runs of earlier versions, which do not say, trained without
    flags = {name: getattr(config, name) for name in given}
    fixed = ("model_path", "phi", "num_classes", "dialect", "drop_path", "lr", "lr_rule")
    wrong = [name for name in fixed if name in flags and flags[name] != old[name]]
    if bool(flags.get("teacher", old["teacher"])) != bool(old["teacher"]):
        wrong.append("teacher")
    if wrong:
        raise ValueError(
            f"The run to resume had --{wrong[0]} {_word(old[wrong[0]])}, now it is {_word(flags[wrong[0]])}; "
            "leave the flag out."
        )
    resumed_config = replace(config, **{**old, **flags, "resume": True})
    _check_flags(resumed_config, given)
    return resumed_config


def _complete(config: TrainSettings, resumed: Resumable) -> tuple[str, ...]:
    """A note where the run to resume had come to its end."""
    if resumed.state.epoch < config.epochs:
        return ()
    return (
        f"This run is complete ({resumed.state.epoch} of {config.epochs} epochs), so nothing is trained; to train on, "
        f"start a new one with --model_path {Path(config.save_dir) / LAST} and another --save_dir.",
    )


def _word(value: Any) -> str:
    return "none" if value in (None, "") else str(value)
