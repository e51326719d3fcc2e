"""A run of `segprune prune`, in the order in which things happen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segprune import checkpoint
from segprune.checkpoint import Checkpoint
from segprune.cli.console import (
    choose_device,
    console,
    open_data,
    progress_bar,
    show_notes,
    show_settings,
    show_table,
)
from segprune.cli.flags import InputFlags
from segprune.cli.prune.closing import (
    RESULTS,
    add_finetuned,
    finetuned_folder,
    pruning_config,
    results_record,
    show_closing,
)
from segprune.cli.prune.flags import (
    ImageFlags,
    NetworkFlags,
    RunFlags,
    TuneFlags,
    check_flags,
    may_draw_images,
    merge_settings,
    needs_images,
)
from segprune.cli.prune.search import save_neighbours, search_rate, search_record
from segprune.cli.report import make_page
from segprune.cli.train import flags as train
from segprune.cli.train.command import check_teacher_names, fit_with
from segprune.cli.train.flags import TrainSettings
from segprune.data import DataChoices, Source
from segprune.data.unlabelled import batch_images, list_images, load_images
from segprune.files import check_writable, write_json
from segprune.inference.evaluate import EvalMode, Score, evaluate
from segprune.machine import choose_precision, fit_to_machine
from segprune.model import PARTS, SegFormer
from segprune.pruning.budget.latency import LatencyTable, default_folder
from segprune.pruning.importance import NEED_IMAGES
from segprune.pruning.options import PruneOptions
from segprune.pruning.plan import widths_of, write_plan
from segprune.pruning.prepare import check_published
from segprune.pruning.prune import make_pruner
from segprune.pruning.pruner import Pruner
from segprune.pruning.synthetic import synthetic_images
from segprune.runs.folder import check_kept, check_not_overwritten, classes_of
from segprune.spec import Spec, preprocessing_of, standard_spec, stated_preprocessing
from segprune.timing import Latency, Precision, measure_latency, measure_parts
from segprune.training.options import TrainOptions
from segprune.training.rates import advise_rate, choose_rates

PLAN = "plan.json"


def run(
    network: NetworkFlags,
    options: PruneOptions,
    images: ImageFlags,
    tune: TuneFlags,
    flags: RunFlags,
    inputs: InputFlags,
    given: frozenset[str],
) -> None:
    """Prune a trained SegFormer; with --data, score it before and after; with --epochs, fine-tune and score again.

    Writes SAVE_DIR/METHOD/PHI/PHI_pruned_RATE.pth, which `segprune train`, `segprune eval` and
    `segprune.load` read, and pruning_results.json beside it.
    """
    # Flags that contradict each other are refused before anything is opened.
    check_flags(given, network, options, images, tune, flags)
    device = choose_device(flags.cuda)

    # Open the checkpoint.
    opened = inputs.apply(_read_network(network, options.seed))
    check_published(opened.spec, options)
    variant = opened.spec.variant
    folder = Path(flags.save_dir) / options.pruning_method / variant
    path = folder / f"{variant}_pruned_{_label(options)}.pth"
    check_kept(path, network.model_path, save_dir=Path(flags.save_dir))

    # Settle the fine-tuning, so that nothing long begins with settings that it cannot have.
    training, notes = _settle_training(network, options, tune, flags, inputs, opened, path)
    # What was chosen is put back into the flags, since these are printed and saved.
    chosen = training.options
    tune = replace(tune, amp=chosen.amp, num_workers=chosen.num_workers)
    if tune.epochs:
        tune = replace(tune, lr=chosen.lr)
    settings = merge_settings(network, options, images, tune, inputs, flags)
    read = {"phi": variant, "num_classes": opened.spec.num_classes}
    settings |= read
    show_settings("Pruning", settings, given, read | {"dialect": opened.dialect})
    show_notes((*opened.notes, *notes))

    # Open the data, and check its labels.
    source, class_pixels = (
        _open_data(network, tune, inputs, opened, options.seed) if tune.data else (None, ())
    )
    check_writable(folder)
    # The dense network is never changed: it is scored and timed beside the pruned one.
    dense = checkpoint.build(opened).to(device)

    # Images that were given, those of the data, or synthetic ones made from the network.
    batches: list[Tensor] = []
    synthetic = False
    if needs_images(options, flags):
        batches = _load_images(options, images, source, opened.spec)
        if not batches and network.model_path and may_draw_images(options, images, tune):
            batches, synthetic = _draw_images(dense, options, images.num_images), True
        # Random weights, or data without images: nothing is repaired.
        if not batches:
            options = replace(options, repair=False)
    batches = [batch.to(device) for batch in batches]
    # A latency is estimated from the times of single steps, which are measured once.
    precision = choose_precision(tune.amp, device)
    table = None
    if "latency" in options.budgets:
        table = LatencyTable(device, precision, default_folder())

    # Nothing is cut, scored or timed for a plan alone.
    if flags.plan_only:
        pruner = make_pruner(dense, images=batches, options=options, latency_table=table)
        _show_plan(pruner, settings, folder / PLAN)
        return

    # Rank, decide, cut and repair: before any scoring, so that what cannot be met is said at once.
    # With a budget of accuracy networks are scored on the way, and a rate is what comes out.
    search = None
    scores: dict[str, Score] = {}
    if options.max_drop is None:
        pruned, plan = _cut(dense, options, batches, table)
    else:
        assert source is not None
        search, scores, plan = search_rate(dense, source, batches, options, tune, table, device)
        options = replace(options, max_drop=None, pruning_rate=search.chosen.rate)
        assert isinstance(search.chosen.network, SegFormer)
        pruned = search.chosen.network

    # Save before scoring, which takes long and can be interrupted.
    classes = {} if source is None else classes_of(source, opened.spec.num_classes)
    config = pruning_config(options, batches, synthetic=synthetic)
    config["max_drop"] = None if search is None else search.max_drop
    # The checkpoint's own class names win over those of the data set.
    extra = classes | opened.extra | {"pruning": config}
    checkpoint.save(pruned, path, extra=extra)

    # Score and time the two networks.
    if source is not None and not scores:
        for name, model in (("dense", dense), ("pruned", pruned)):
            scores[name] = _score(model, source, options, tune, device, f"scoring {name}")
    times = _time([dense, pruned], options.input_shape, device, precision)

    # Written before fine-tuning too, which may not come to its end.
    record = results_record(opened, pruned, *times, scores, config, settings) | {
        "model_save_path": str(path),
        "class_names": extra.get("class_names", []),
        "plan": plan,
    }
    if search is not None:
        paths = save_neighbours(search, path, extra, config)
        record["search"] = search_record(search, options, paths)
    write_json(record, folder / RESULTS)

    # Fine-tune, and report.
    if source is not None and tune.epochs:
        if "lr" not in given and "lr" in opened.extra and chosen.lr is not None:
            show_notes(advise_rate(scores["dense"].miou, scores["pruned"].miou, chosen.lr))
        # A network with random weights has nothing to teach.
        teacher = None if tune.no_distill or not network.model_path else opened
        # Neither dense network nor images are needed any more, and training needs their memory.
        del dense, batches
        console.print("\nFine-tuning the pruned network", style="bold")
        fit = fit_with(training, pruned, source, class_pixels, extra, teacher)
        add_finetuned(record, fit, folder)
    show_closing(record, folder)
    make_page(folder, device)


def _cut(
    dense: SegFormer,
    options: PruneOptions,
    images: Sequence[Tensor],
    table: LatencyTable | None,
) -> tuple[SegFormer, dict[str, Any] | None]:
    """Returns the pruned network, repaired, and the record of its plan."""
    with progress_bar("pruning") as advance:
        pruner = make_pruner(
            dense, images=images, options=options, latency_table=table, progress=advance
        )
        pruned = pruner.prune()
    assert isinstance(pruned, SegFormer)
    return pruned, pruner.record


def _label(options: PruneOptions) -> str:
    """Returns what was asked, for the name of the file: the rate, or what says it otherwise."""
    words = []
    if options.max_drop is not None:
        words.append(f"drop{options.max_drop:g}")
    elif options.plan is not None:
        words.append("plan")

    # A share of the parameters alone is the plain rate; other units and groups are named, so that no two share a file.
    if not words:
        for unit, share in options.budgets.items():
            words.append(f"{share:g}" if unit == "params" else f"{unit}{share:g}")
        for pattern, share in sorted(options.shares_by_name.items()):
            words.append(f"{pattern}-{share:g}")

    for pattern, factor in sorted(options.kv_factors.items()):
        words.append(f"kv{factor}" if not pattern else f"kv{factor}-{pattern}")

    # Patterns may hold what no file name can.
    text = "_".join(words)
    if re.fullmatch(r"[\w.-]{1,60}", text):
        return text
    return f"rates_{sha256(text.encode()).hexdigest()[:8]}"


def _read_network(network: NetworkFlags, seed: int) -> Checkpoint:
    """Returns the checkpoint, or a random network with a note that says so loudly."""
    if network.model_path:
        opened = checkpoint.read(
            network.model_path,
            dialect=network.dialect,
            variant=network.phi,
            num_classes=network.num_classes,
        )
        # A backbone has no decode head, so there is no whole network to prune.
        if opened.backbone_only:
            raise ValueError(
                f"{network.model_path} holds only a backbone; train it first: "
                f"segprune train --model_path {network.model_path} --num_classes {opened.spec.num_classes}."
            )
        return opened

    if network.dialect is not None:
        raise ValueError(
            "`dialect` was given without `model_path`; it says who wrote a checkpoint."
        )
    # Sizes and speed do not depend on weights, so random ones do for a dry run.
    torch.manual_seed(seed)
    model = SegFormer(
        standard_spec(
            network.phi or "b2", 8 if network.num_classes is None else network.num_classes
        )
    )
    note = (
        "NO --model_path: THE WEIGHTS ARE RANDOM. This is a dry run: sizes and speed are true, "
        "but the pruned network has learnt nothing."
    )
    return Checkpoint(
        model.spec, model.state_dict(), "segprune", (note,), backbone_only=False, extra={}
    )


def _open_data(
    network: NetworkFlags, tune: TuneFlags, inputs: InputFlags, opened: Checkpoint, seed: int
) -> tuple[Source, tuple[int, ...]]:
    """Returns the data set, its labels checked, and the labelled pixels of each class."""
    assert tune.num_workers is not None
    # Labels and teacher must mean the same classes; without a teacher nothing can clash.
    learns = bool(tune.epochs) and not tune.no_distill and bool(network.model_path)

    def check_names(names: tuple[str, ...]) -> None:
        check_teacher_names(
            f"--model_path {network.model_path}",
            opened if learns else None,
            names,
            "give data of the same classes, or leave the teacher out with --no_distill",
        )

    # Without fine-tuning the training images are not read, so they need not exist.
    source, labels = open_data(
        tune.data,
        tune.layout,
        opened.spec.num_classes,
        ("train", "val") if tune.epochs else ("val",),
        choices=DataChoices(
            inputs.label_offset,
            tune.val_split,
            tune.val_share,
            seed,
            preprocessing_of(opened),
        ),
        skip_bad=tune.skip_bad,
        num_workers=tune.num_workers,
        trained=bool(network.model_path),
        classes=check_names,
    )
    return source, labels.pixels


def _load_images(
    options: PruneOptions,
    images: ImageFlags,
    source: Source | None,
    spec: Spec,
) -> list[Tensor]:
    """Returns images for the plan, the method and the repair: none where none were given, or the data has none."""
    # Images that were given come before those of the data set.
    origin = images.images or source
    if not origin:
        return []
    try:
        places = list_images(origin)
    except FileNotFoundError as error:
        # Pruning works without images; only for those who asked for them it is an error.
        wanted = options.repair or options.plan_by == "curves"
        if images.images or wanted or options.pruning_method in NEED_IMAGES:
            raise
        show_notes((f"No repair, since there are no images for it: {error}",))
        return []
    own = stated_preprocessing(spec)
    loaded = load_images(places, images.num_images, options.input_shape, own.num_channels)
    return batch_images(loaded, own)


def _draw_images(dense: SegFormer, options: PruneOptions, number: int) -> list[Tensor]:
    with progress_bar("drawing images") as advance:
        batches = synthetic_images(
            dense, options.input_shape, count=number, seed=options.seed, progress=advance
        )
    show_notes(
        (
            f"No images were given: {number} synthetic ones stand in for them, for the plan and the repair. Real ones "
            "are better: --images DIR, without labels. --no_repair: neither.",
        )
    )
    return batches


def _show_plan(pruner: Pruner, settings: dict[str, Any], path: Path) -> None:
    """Prints what would be removed, and saves it as a file to look at and to edit."""
    # The first steps of `Pruner.prune`, up to the cut.
    prepared = pruner.prepare()
    plan = pruner.decide(prepared, pruner.score(prepared))

    rows = []
    widths = zip(prepared.groups, widths_of(plan, prepared.groups).tolist(), strict=True)
    for group, width in sorted(widths, key=lambda row: row[0].name):
        # Groups of several parts, such as heads, are told as parts × channels.
        times = f"{group.parts} × " if group.parts > 1 else ""
        name = group.name.removeprefix("encoder.")
        rows.append(
            [name, f"{times}{group.slots}", f"{times}{width}", f"{1 - width / group.slots:.0%}"]
        )
    show_table("Plan", ["group", "channels", "kept", "removed"], rows)

    left_alone = sorted(name.removeprefix("encoder.") for name in pruner.left_alone(prepared))
    if left_alone:
        console.print(f"Left alone by --ignore: {', '.join(left_alone)}.", soft_wrap=True)
    write_plan(pruner.describe(prepared, plan), settings, path)
    removed = ", ".join(f"{share:.1%} of the {unit}" for unit, share in plan.removed.items())
    console.print(
        f"Removes {removed}. Nothing was cut; --plan carries this file out: {path}",
        soft_wrap=True,
    )


def _time(
    networks: list[SegFormer],
    input_shape: tuple[int, int],
    device: torch.device,
    precision: Precision,
) -> tuple[list[Latency], list[dict[str, float]]]:
    """Returns the latency of each network, and the milliseconds of its parts."""
    with progress_bar("timing dense and pruned") as advance:
        latencies = measure_latency(
            networks, input_shape, device=device, precision=precision, progress=advance
        )
    parts = measure_parts(networks, PARTS, input_shape, device=device, precision=precision)
    return latencies, parts


def _score(
    model: SegFormer,
    source: Source,
    options: PruneOptions,
    tune: TuneFlags,
    device: torch.device,
    text: str,
) -> Score:
    assert tune.num_workers is not None
    with progress_bar(text) as advance:
        return evaluate(
            model,
            source.split("val"),
            model.spec.num_classes,
            EvalMode(input_shape=options.input_shape),
            device=device,
            batch_size=tune.batch_size,
            num_workers=tune.num_workers,
            progress=advance,
        )


def _settle_training(
    network: NetworkFlags,
    options: PruneOptions,
    tune: TuneFlags,
    out: RunFlags,
    inputs: InputFlags,
    opened: Checkpoint,
    path: Path,
) -> tuple[TrainSettings, list[str]]:
    """Returns the settings of `segprune train` that fine-tune the network in `path`, and what was chosen among them.

    The dense network is the teacher. Raises ValueError for settings that training cannot have.
    """
    # The dense checkpoint teaches; its dialect was perhaps given, and it is read again.
    teacher = "" if tune.no_distill else network.model_path
    start = train.StartFlags(
        data=tune.data,
        layout=tune.layout,
        val_split=tune.val_split,
        val_share=tune.val_share,
        skip_bad=tune.skip_bad,
        model_path=str(path),
        phi=opened.spec.variant,
        teacher=teacher,
        teacher_dialect=network.dialect if teacher else None,
    )
    train_options = TrainOptions(
        num_classes=opened.spec.num_classes,
        input_shape=options.input_shape,
        epochs=tune.epochs
        or 1,  # without fine-tuning, only what is chosen for the machine is used
        batch_size=tune.batch_size,
        lr=tune.lr,
        amp=tune.amp,  # type: ignore[arg-type]
        num_workers=tune.num_workers,
        seed=options.seed,
    )
    train_options, fitted = fit_to_machine(train_options, choose_device(out.cuda))
    train_options, reason = choose_rates(train_options, opened.extra)
    notes = [*fitted] if tune.data else []
    if tune.epochs:
        check_not_overwritten(finetuned_folder(path), network.model_path)
        notes.append(reason)

    run = train.RunFlags(cuda=out.cuda, save_dir=str(finetuned_folder(path)))
    return TrainSettings(start, train_options, run, inputs), notes
