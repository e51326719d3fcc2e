"""A run of `segprune train`, in the order in which things happen."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from segprune import checkpoint
from segprune.checkpoint import Checkpoint
from segprune.cli.console import (
    choose_device,
    console,
    open_data,
    show_notes,
    show_score,
    show_settings,
)
from segprune.cli.flags import InputFlags
from segprune.cli.prune.closing import STARTED_FROM, add_finetuned, show_closing, unfinished
from segprune.cli.report import make_page
from segprune.cli.train.flags import RunFlags, StartFlags, TrainSettings, check_effects
from segprune.cli.train.view import training_view
from segprune.data import DataChoices, Source
from segprune.files import check_writable
from segprune.fold import fold_decoder
from segprune.machine import fit_to_machine
from segprune.model import SegFormer, check_input
from segprune.runs.fit import Resumable, RunStopped, fit, load_resumable
from segprune.runs.folder import BEST, LAST, Fit, Saving, check_not_overwritten
from segprune.spec import Spec, preprocessing_of, standard_spec
from segprune.training.losses import compute_class_weights
from segprune.training.objective import check_same_images
from segprune.training.options import TrainOptions
from segprune.training.rates import choose_rates
from segprune.training.state import TrainingInterrupted, fingerprint_of


def run(
    start: StartFlags,
    inputs: InputFlags,
    options: TrainOptions,
    run: RunFlags,
    given: frozenset[str],
) -> None:
    """Train or fine-tune a SegFormer, and score it after every epoch.

    Fine-tuning a pruned network, as a rule: a tenth of the original learning rate, 50 to 100 epochs, --teacher with
    the dense network, optionally --freeze_epochs first. Several GPUs: torchrun --nproc_per_node N train.py --cuda …
    """
    settings = TrainSettings(start, options, run, inputs)
    folder = Path(run.save_dir)

    # Start a network, or take up the run that stopped.
    resumed = None
    if run.resume:
        # The state holds the settings; flags that are given now may change a few of them.
        resumed, extra = load_resumable(folder)
        settings = _restore_settings(settings, given, resumed)
        model = SegFormer(resumed.spec)
        notes = _note_complete(settings, resumed)
        reason = f"Learning rate {settings.options.lr:g}, as the run was started with."
    else:
        check_effects(settings, given)
        # A run must not write its files over the checkpoint that it starts from.
        check_not_overwritten(folder, start.model_path, start.teacher)
        model, notes, extra, settings, reason = _start_network(settings)
    start, options, inputs = settings.start, settings.options, settings.inputs
    num_classes = model.spec.num_classes

    # Check and choose everything else, before anything long begins.
    check_input((1, 3, *options.input_shape))
    device = choose_device(settings.run.cuda)
    options, chosen = fit_to_machine(options, device)
    settings = replace(settings, options=options)
    # Checks how many weights there are; the true ones need the labels, which come later.
    compute_class_weights(options.class_weights, (1,) * num_classes)
    teacher = _read_teacher(settings, model.spec)
    read = {"phi": model.spec.variant, "num_classes": num_classes, "lr": options.lr}
    show_settings("Resumed training" if resumed else "Training", settings.merged(), given, read)
    show_notes((*notes, reason, *chosen, *_note_other_labels(teacher, model.spec)))

    # Open the data, and check its labels.
    def check_names(names: tuple[str, ...]) -> None:
        remedy = "give a teacher that was trained for the same classes"
        check_teacher_names(f"--teacher {start.teacher}", teacher, names, remedy)

    assert options.num_workers is not None
    source, labels = open_data(
        start.data,
        start.layout,
        num_classes,
        ("train", "val"),
        choices=DataChoices(
            inputs.label_offset,
            start.val_split,
            start.val_share,
            options.seed,
            preprocessing_of(model),
        ),
        skip_bad=start.skip_bad,
        num_workers=options.num_workers,
        trained=run.resume
        or bool(
            start.model_path and "num_classes" not in given
        ),  # a bare backbone needs the flag
        classes=check_names,
    )
    check_writable(folder)

    # Read now, so that results which cannot be closed are refused before the training.
    record = unfinished(folder, options.epochs, extra) if resumed else None

    # Train.
    fitted = fit_with(settings, model, source, labels.pixels, extra, teacher, resumed=resumed)
    show_score(f"Best epoch {fitted.epoch} on val", fitted.score, source.class_names)
    console.print(f"Saved: {folder / BEST}\n       {folder / LAST}", soft_wrap=True)

    # A run of `segprune prune` that stopped while it fine-tuned is closed here.
    if os.environ.get("RANK", "0") != "0":  # one of several processes writes
        return
    if record is not None:
        add_finetuned(record, fitted, folder.resolve().parent)
        show_closing(record, folder.resolve().parent)
        make_page(folder.resolve().parent, device)
    make_page(folder, device)


def fit_with(
    settings: TrainSettings,
    model: SegFormer,
    source: Source,
    pixels: tuple[int, ...],
    extra: Mapping[str, Any],
    teacher: Checkpoint | None,
    *,
    resumed: Resumable | None = None,
) -> Fit:
    """Trains as the settings say, and shows the run. Ctrl-C and a full disk end in the command that continues it.

    `pixels` per class are what the label check counted. `extra` is what the new checkpoints take over from the one
    that training starts from.
    """
    options, run = settings.options, settings.run
    # Rules for class weights need the labels' counts, which are known by now.
    options = replace(
        options, class_weights=compute_class_weights(options.class_weights, pixels)
    )

    # Later runs take a tenth of `lr`, the rate from scratch, or `finetuned_lr` as it is.
    # A run is known by the weights that it started from: names of files and folders are used again.
    if resumed is None:
        extra = {**extra, STARTED_FROM: fingerprint_of(model, prefix="")}
    if "lr" not in extra:
        extra = {**extra, "finetuned_lr" if settings.start.model_path else "lr": options.lr}

    folder = Path(run.save_dir)
    # A command to copy, hence quoted: the folder's name may hold blanks.
    command = f"python -m segprune train --resume --save_dir {shlex.quote(str(folder))}"
    saving = Saving(folder, settings.merged(), extra, run.keep, run.tensorboard)
    # The view closes before a message is printed, or it would be drawn over it.
    try:
        with training_view() as view:
            return fit(
                model,
                options,
                source,
                saving,
                device=choose_device(run.cuda),
                teacher=None if teacher is None else fold_decoder(checkpoint.build(teacher)),
                resumed=resumed,
                on_step=view.step,
                on_result=view.epoch,
            )
    except TrainingInterrupted as interrupted:
        raise KeyboardInterrupt(f"{interrupted} Go on with: {command}") from interrupted
    except RunStopped as stopped:
        said = str(stopped).removesuffix(".")
        raise OSError(f"{said} with {command}.") from stopped


def _start_network(
    settings: TrainSettings,
) -> tuple[SegFormer, tuple[str, ...], dict[str, Any], TrainSettings, str]:
    """Returns the network, notes, the extra to take over, the settings with what was read, and why that rate."""
    start, options = settings.start, settings.options
    torch.manual_seed(options.seed)

    # From scratch; the seed that was set above decides the weights.
    if not start.model_path:
        spec = standard_spec(
            start.phi or "b2", 8 if options.num_classes is None else options.num_classes
        )
        model = SegFormer(settings.inputs.apply_to(_with_drop_path(spec, start.drop_path)))
        notes: tuple[str, ...] = ()
        extra: dict[str, Any] = {}
        options, reason = choose_rates(options, extra, from_scratch=True)
    else:
        opened = checkpoint.read(
            start.model_path,
            dialect=start.dialect,
            variant=start.phi,
            num_classes=options.num_classes,
        )
        # Stochastic depth is a setting of training, so files do not decide it alone.
        opened = replace(opened, spec=_with_drop_path(opened.spec, start.drop_path))
        opened = settings.inputs.apply(opened)
        model = checkpoint.build(opened).train()
        notes, extra = opened.notes, dict(opened.extra)
        options, reason = choose_rates(options, extra, backbone_only=opened.backbone_only)

    # State what the network is, so that resuming needs no second look at the file.
    start = replace(start, phi=model.spec.variant)
    options = replace(options, num_classes=model.spec.num_classes)
    return model, notes, extra, replace(settings, start=start, options=options), reason


def _with_drop_path(spec: Spec, rate: float | None) -> Spec:
    return (
        spec if rate is None else replace(spec, numerics=replace(spec.numerics, drop_path=rate))
    )


def _read_teacher(settings: TrainSettings, spec: Spec) -> Checkpoint | None:
    """Returns the dense network to learn from, if there is to be one; refused for other numbers of classes or channels."""
    path = settings.start.teacher
    if not path:
        return None

    try:
        teacher = checkpoint.read(
            path, dialect=settings.start.teacher_dialect
        )  # refuses a bare backbone
    except FileNotFoundError as error:
        # A resumed run remembers a path, and the file may have been moved since.
        if not settings.run.resume:
            raise
        raise FileNotFoundError(
            f"The run to resume learns from --teacher {path}, which is not there; put it back, or give its new place "
            "as --teacher."
        ) from error

    # Flags hold for both networks; without them each is read as its own file says.
    teacher = settings.inputs.apply(teacher)
    check_same_images(teacher.spec, spec)
    if teacher.spec.num_classes != spec.num_classes:
        raise ValueError(
            f"--teacher {path} has {teacher.spec.num_classes} classes and the network to train {spec.num_classes}; give a "
            "teacher that was trained for the same classes (another number often means another rule of which label "
            "is ignored)."
        )
    return teacher


def _note_other_labels(teacher: Checkpoint | None, spec: Spec) -> tuple[str, ...]:
    """Returns a note if the teacher was trained with labels that are shifted against the network's."""
    theirs = None if teacher is None else teacher.spec.preprocessing.label_offset
    if theirs in (None, spec.preprocessing.label_offset):
        return ()
    return (
        f"The teacher was trained with `label_offset` {theirs} and the network is with "
        f"{spec.preprocessing.label_offset}: make sure that both number the classes alike.",
    )


def check_teacher_names(
    flag: str, teacher: Checkpoint | None, names: tuple[str, ...], remedy: str
) -> None:
    """Raises ValueError if the teacher, which `flag` gave, and the data name a class differently, as far as both do.

    Another tool's file may have other words for the same classes; there the name must be that of another class.
    """
    if teacher is None:
        return

    # Our own files have the words of their data, so there any difference counts.
    own_words = teacher.dialect != "segprune"
    theirs = teacher.extra.get("class_names", ())
    for number, (their, our) in enumerate(zip(theirs, names, strict=False)):
        if their != our and (not own_words or their in names):
            raise ValueError(
                f"{flag} calls class {number} {their!r} and the data {our!r}; {remedy}."
            )


def _restore_settings(
    settings: TrainSettings, given: frozenset[str], resumed: Resumable
) -> TrainSettings:
    """Returns the settings of the run to resume, and beside them the flags that were given now.

    Those that cannot change are refused here, and by the loop. Data and teacher may lie elsewhere now; the loop knows
    whether they are the same.
    """
    # The file holds lists where the flags hold tuples.
    old = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in resumed.settings.items()
    }
    now = {name: value for name, value in settings.merged().items() if name in given}

    # These decide which network it is, how fast it learns and on what it is scored.
    fixed = ["model_path", "phi", "num_classes", "dialect", "drop_path", "lr", "lr_rule"]
    fixed += [*asdict(settings.inputs), "val_split", "val_share"]
    if old.get("val_share") is not None:
        fixed.append("seed")  # which chose the images that are scored
    wrong = [name for name in fixed if name in now and now[name] != old.get(name)]
    # The teacher may lie elsewhere now, but none can be added or left out.
    if bool(now.get("teacher", old["teacher"])) != bool(old["teacher"]):
        wrong.append("teacher")
    if wrong:
        name = wrong[0]
        before, after = _word(old.get(name)), _word(now[name])
        raise ValueError(
            f"The run to resume had `{name}` {before}, now it is {after}; leave the flag out."
        )

    merged = (
        {"tf32": False} | old | now | {"resume": True}
    )  # what earlier versions did without saying

    def restore(record: Any) -> Any:
        # Each record takes the settings that are its own.
        known = {field.name for field in fields(record)}
        return replace(
            record, **{name: value for name, value in merged.items() if name in known}
        )

    restored = TrainSettings(
        restore(settings.start),
        restore(settings.options),
        restore(settings.run),
        restore(settings.inputs),
    )
    check_effects(restored, given)
    return restored


def _note_complete(settings: TrainSettings, resumed: Resumable) -> tuple[str, ...]:
    """Returns a note if the run to resume had come to its end."""
    epochs = settings.options.epochs
    if resumed.state.epoch < epochs:
        return ()
    last = Path(settings.run.save_dir) / LAST
    return (
        f"This run is complete ({resumed.state.epoch} of {epochs} epochs), so nothing is trained; to train on, "
        f"start a new one with --model_path {last} and another --save_dir.",
    )


def _word(value: Any) -> str:
    return "none" if value in (None, "") else str(value)
