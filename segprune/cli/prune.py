"""`segprune prune`, and prune_train.py: prune a checkpoint; with data, score it before and after, and fine-tune it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segprune import checkpoint
from segprune.checkpoint import Checkpoint
from segprune.cli.calibration import images_for
from segprune.cli.closing import RESULTS, add_finetuned, finetuned_folder, show_closing
from segprune.cli.console import (
    choose_device,
    classes_of,
    console,
    open_data,
    progress_bar,
    show_notes,
    show_settings,
)
from segprune.cli.cutting import cut_network, pruner_of
from segprune.cli.machine import choose_precision, fit_to_machine
from segprune.cli.plans import PLAN, show_plan, write_plan
from segprune.cli.pruning import PruneConfig, asked_rates, check_flags, label
from segprune.cli.settings import TrainSettings, advice, check_settings, with_rates
from segprune.cli.train import check_teacher_names, fit_with
from segprune.data import Source
from segprune.files import check_writable, write_json
from segprune.inference.evaluate import EvalMode, Score, evaluate
from segprune.model import SegFormer, check_input
from segprune.pruning.prepare import check_head
from segprune.runs.folder import check_kept
from segprune.runs.records import environment, network_record, network_size, reduction_record
from segprune.spec import spec_to_dict, standard_spec, with_folded_head
from segprune.stats import count
from segprune.timing import Latency, measure_latency


def run(config: PruneConfig, given: frozenset[str]) -> None:
    """Prune a trained SegFormer; with --data, score it before and after; with --epochs, fine-tune and score again.

    Writes SAVE_DIR/METHOD/PHI/PHI_pruned_RATE.pth, which `segprune train`, `segprune eval` and
    `segprune.load` read, and pruning_results.json beside it.
    """
    check_flags(config, given)
    check_input((1, 3, *config.input_shape))
    device = choose_device(config.cuda)
    found = _read(config)
    check_head(found.spec, {"--keep_decoder": config.keep_decoder, "--uniform": config.uniform})
    config = replace(config, phi=found.spec.variant, num_classes=found.spec.num_classes)
    folder = Path(config.save_dir) / config.pruning_method / found.spec.variant
    path = folder / f"{found.spec.variant}_pruned_{label(config, given)}.pth"
    check_kept(path, config.model_path, save_dir=Path(config.save_dir))
    fine_tuning, chosen = fit_to_machine(_fine_tuning(config, path), device)
    config = replace(config, amp=fine_tuning.amp, num_workers=fine_tuning.num_workers)
    fine_tuning, reason = with_rates(fine_tuning, found.extra)
    a_tenth = config.lr is None and "lr" in found.extra
    if config.epochs:
        config = replace(config, lr=fine_tuning.lr)
        check_settings(fine_tuning)
    show_settings("Pruning", _resolved(config, given) | {"dialect": found.dialect})
    show_notes((*found.notes, reason) if config.epochs else found.notes)
    show_notes(chosen if config.data else ())
    teacher = found if config.epochs and fine_tuning.teacher else None
    source, pixels = _open(config, teacher) if config.data else (None, ())
    check_writable(folder)

    dense = checkpoint.build(found).to(device)
    images = images_for(config, source)
    if config.plan_only:
        _show_plan(dense, config, given, images, folder / PLAN)
        return
    classes = {} if source is None else classes_of(source, found.spec.num_classes)
    extra = classes | found.extra | {"pruning": _pruning_config(config, given, images)}

    def trained(model: SegFormer, name: str) -> SegFormer:
        """Between two steps of pruning."""
        assert source is not None
        console.print(f"\nFine-tuning after {name.replace('step', 'step ')}", style="bold")
        start = path.with_name(f"{path.stem}_{name}.pth")
        checkpoint.save(model, start, extra=extra)
        folder = str(finetuned_folder(start))
        settings = replace(fine_tuning, model_path=str(start), epochs=config.step_epochs, save_dir=folder)
        done = fit_with(settings, model, source, pixels, extra, teacher, partial=True)
        return checkpoint.load(done.path).to(device)

    # before any scoring: what cannot be met is said at once
    pruned = cut_network(dense, config, given, images, trained)
    checkpoint.save(pruned, path, extra=extra)
    scores = {}
    if source is not None:
        for name, model in (("dense", dense), ("pruned", pruned)):
            scores[name] = _score(model, source, config, device, f"scoring {name}")
    with progress_bar("timing dense and pruned") as advance:
        latencies = measure_latency(
            [dense, pruned],
            config.input_shape,
            device=device,
            precision=choose_precision(config.amp, device),
            progress=advance,
        )
    record = _record(config, given, found, pruned, latencies, scores, images) | {"model_save_path": str(path)}
    write_json(record, folder / RESULTS)
    if config.epochs and source is not None:
        if a_tenth and fine_tuning.lr is not None:
            show_notes(advice(scores["dense"].miou, scores["pruned"].miou, fine_tuning.lr))
        del dense
        console.print("\nFine-tuning the pruned network", style="bold")
        done = fit_with(fine_tuning, pruned, source, pixels, extra, teacher)
        add_finetuned(record, done, folder)
    show_closing(record, folder)


def _resolved(config: PruneConfig, given: frozenset[str]) -> dict[str, Any]:
    """The flags with what is taken where one was left out, and without a rate that nothing asks for."""
    known: dict[str, Any] = {"repair": config.repair is not False and bool(config.data or config.images)}
    if config.budgets or config.rate_of not in asked_rates(config, given):
        known |= {"pruning_rate": None, "rate_of": None}
    return asdict(config) | known


def _read(config: PruneConfig) -> Checkpoint:
    """The checkpoint, or a random network, loudly."""
    if config.model_path:
        found = checkpoint.read(
            config.model_path, dialect=config.dialect, variant=config.phi, num_classes=config.num_classes
        )
        if found.backbone_only:
            raise ValueError(
                f"{config.model_path} holds only a backbone; train it first: "
                f"segprune train --model_path {config.model_path} --num_classes {found.spec.num_classes}."
            )
        return found
    if config.dialect is not None:
        raise ValueError("--dialect was given without --model_path; it says who wrote a checkpoint.")
    torch.manual_seed(config.seed)
    model = SegFormer(standard_spec(config.phi or "b2", 8 if config.num_classes is None else config.num_classes))
    note = (
        "NO --model_path: THE WEIGHTS ARE RANDOM. This is a dry run: sizes and speed are true, "
        "but the pruned network has learnt nothing."
    )
    return Checkpoint(model.spec, model.state_dict(), "segprune", (note,), backbone_only=False, extra={})


def _open(config: PruneConfig, teacher: Checkpoint | None) -> tuple[Source, tuple[int, ...]]:
    """The data set, its labels checked, and the labelled pixels of each class."""
    assert config.num_classes is not None
    assert config.num_workers is not None
    splits = ("train", "val") if config.epochs else ("val",)
    source, labels = open_data(
        config.data,
        config.layout,
        config.num_classes,
        splits,
        skip_bad=config.skip_bad,
        num_workers=config.num_workers,
        trained=bool(config.model_path),
        classes=lambda names: check_teacher_names(
            f"--model_path {config.model_path}",
            teacher,
            names,
            "give data of the same classes, or leave the teacher out with --no_distill",
        ),
    )
    return source, labels.pixels


def _score(model: SegFormer, source: Source, config: PruneConfig, device: torch.device, text: str) -> Score:
    assert config.num_workers is not None
    with progress_bar(text) as advance:
        return evaluate(
            model,
            source.split("val"),
            model.spec.num_classes,
            EvalMode(input_shape=config.input_shape),
            device=device,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            progress=advance,
        )


def _show_plan(dense: SegFormer, config: PruneConfig, given: frozenset[str], images: list[Tensor], path: Path) -> None:
    pruner = pruner_of(config, given, dense, images, None)
    plan, groups = pruner.decide(torch.empty(1, 3, *config.input_shape, device="meta"))
    show_plan(plan, groups, pruner.left_alone)
    write_plan(plan, groups, asdict(config), path)
    removed = ", ".join(f"{share:.1%} of the {unit}" for unit, share in plan.removed.items())
    goes = f"What goes: {removed}. " if removed else ""
    console.print(f"{goes}Nothing was cut; --plan carries this file out: {path}", soft_wrap=True)


def _fine_tuning(config: PruneConfig, path: Path) -> TrainSettings:
    return TrainSettings(
        data=config.data,
        layout=config.layout,
        skip_bad=config.skip_bad,
        teacher="" if config.no_distill else config.model_path,
        teacher_dialect=None if config.no_distill else config.dialect,
        model_path=str(path),
        phi=config.phi,
        num_classes=config.num_classes,
        input_shape=config.input_shape,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        freeze_epochs=config.freeze_epochs,
        scale=config.scale,
        num_workers=config.num_workers,
        amp=config.amp,
        cuda=config.cuda,
        seed=config.seed,
        save_dir=str(finetuned_folder(path)),
    )


NOTED = (
    *("budgets", "scope", "round_to", "max_rate", "rates", "ignore", "plan", "steps"),
    *("depth", "heads", "keep_decoder", "uniform", "seed"),
)  # flags that say what was removed


def _pruning_config(config: PruneConfig, given: frozenset[str], images: list[Tensor]) -> dict[str, Any]:
    """What was asked; `pruning_rate` is None where another flag than it said so."""
    rate = None if config.budgets else asked_rates(config, given).get(config.rate_of)
    repaired = bool(images) and config.repair is not False
    known = {"method": config.pruning_method, "pruning_rate": rate, "rate_of": config.rate_of}
    known |= {"repaired": repaired, "num_images": sum(map(len, images))}
    noted = {name: getattr(config, name) for name in NOTED}
    return known | noted


def _record(
    config: PruneConfig,
    given: frozenset[str],
    found: Checkpoint,
    pruned: SegFormer,
    latencies: list[Latency],
    scores: dict[str, Score],
    images: list[Tensor],
) -> dict[str, Any]:
    """What pruning_results.json holds, fine-tuning apart."""
    shape = config.input_shape
    original, after = count(found.spec, shape), count(pruned.spec, shape)
    folded = count(with_folded_head(found.spec), shape) if pruned.spec.folded else original
    return {
        "model_config": {
            "phi": found.spec.variant,
            "num_classes": found.spec.num_classes,
            "input_shape": list(shape),
            "dialect": found.dialect,
            "model_path": config.model_path,
            "random_weights": not config.model_path,
        },
        "pruning_config": _pruning_config(config, given, images),
        "original_model": network_record(original, latencies[0], scores.get("dense")),
        "folded_model": network_size(folded),
        "pruned_model": network_record(after, latencies[1], scores.get("pruned")) | {"spec": spec_to_dict(pruned.spec)},
        "reduction": reduction_record(original, folded, after)
        | {"speedup": latencies[0].median_ms / latencies[1].median_ms},
        "settings": asdict(config),
        "environment": environment(),
    }
