"""`segprune prune`, and prune_train.py: prune a checkpoint; with data, score it before and after, and fine-tune it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Option

from segprune import checkpoint
from segprune.checkpoint import Checkpoint
from segprune.cli.closing import RESULTS, add_finetuned, finetuned_folder, show_closing
from segprune.cli.common import (
    Layout,
    SkipBad,
    choose_device,
    console,
    open_data,
    progress_bar,
    show_notes,
    show_settings,
    switch,
)
from segprune.cli.journal import check_kept
from segprune.cli.settings import TrainSettings, check_settings, with_rates
from segprune.cli.train import check_teacher_names, fit_with
from segprune.data import Source
from segprune.model import SegFormer, check_input
from segprune.report import environment, network_record, network_size, reduction_record
from segprune.spec import spec_to_dict, standard_spec
from segprune.stats import Latency, count, measure_latency
from segprune.training.evaluate import EvalMode, Score, evaluate

METHODS = ("l1",)


@dataclass(frozen=True)
class PruneConfig:
    model_path: Annotated[
        str,
        Option(
            "--model_path",
            help="Trained checkpoint: .pth, .pt, .safetensors, a Hugging Face folder or hub name. "
            "Empty: random weights, which is only a dry run.",
        ),
    ] = ""
    num_classes: Annotated[
        int | None,
        Option("--num_classes", help="Channels of the logits, background included; read off the checkpoint, else 8."),
    ] = None
    phi: Annotated[str | None, Option("--phi", help="MiT variant b0 … b5; read off the checkpoint, else b2.")] = None
    input_shape: Annotated[
        tuple[int, int],
        Option("--input_shape", metavar="H W", help="Size for MACs, latency, scoring and fine-tuning."),
    ] = (512, 512)
    pruning_method: Annotated[str, Option("--pruning_method", help="l1: weakest channels by absolute weight.")] = "l1"
    pruning_rate: Annotated[
        float, Option("--pruning_rate", help="Share to remove, in [0, 1), of what --rate_of says; met within 0.01.")
    ] = 0.5
    rate_of: Annotated[str, Option("--rate_of", help="What the rate is a share of: params, macs or channels.")] = (
        "params"
    )
    scope: Annotated[
        str, Option("--scope", help="global: rank all channels together; local: every group loses the same share.")
    ] = "global"
    round_to: Annotated[int, Option("--round_to", help="Widths stay multiples of it; 1: any width.")] = 8
    heads: Annotated[bool, switch("--heads", "Whole attention heads may go too.")] = False
    keep_decoder: Annotated[bool, switch("--keep_decoder", "Do not fold the decode head.")] = False
    data: Annotated[
        str, Option("--data", help="Data set, in any layout of docs/data.md: score on its val part before and after.")
    ] = ""
    layout: Layout = None
    skip_bad: SkipBad = False
    epochs: Annotated[int, Option("--epochs", min=0, help="Fine-tune so many epochs on --data; 0: do not.")] = 0
    batch_size: Annotated[int, Option("--batch_size", min=1, help="Pictures per step, of fine-tuning and scoring.")] = 8
    lr: Annotated[
        float | None,
        Option(
            "--lr", help="Of fine-tuning. If not given: a tenth of what a file of ours was trained with, else 6e-5."
        ),
    ] = None
    no_distill: Annotated[
        bool, switch("--no_distill", "Fine-tune on the labels alone; else the dense network is the teacher.")
    ] = False
    freeze_epochs: Annotated[
        int, Option("--freeze_epochs", help="Fine-tune only the decode head in the first so many epochs.")
    ] = 0
    scale: Annotated[
        tuple[float, float], Option("--scale", metavar="LOW HIGH", help="Random resizing while fine-tuning.")
    ] = (0.5, 2.0)
    num_workers: Annotated[int, Option("--num_workers", min=0, help="Processes that load pictures.")] = 2
    amp: Annotated[str, Option("--amp", help="Mixed precision of fine-tuning: no, fp16 or bf16.")] = "no"
    cuda: Annotated[bool, switch("--cuda", "Use the GPU; without it the CPU.")] = False
    seed: Annotated[int, Option("--seed", help="Of random weights and of fine-tuning.")] = 11
    save_dir: Annotated[str, Option("--save_dir", help="Files go to SAVE_DIR/METHOD/PHI.")] = "logs_pruning"
    dialect: Annotated[str | None, Option("--dialect", help="Overrules the dialect that is recognised.")] = None


TRAINING_FLAGS = ("lr", "no_distill", "freeze_epochs", "scale", "amp")
DATA_FLAGS = ("layout", "skip_bad", "batch_size", "num_workers")


def run(config: PruneConfig, given: frozenset[str]) -> None:
    """Prune a trained SegFormer; with --data, score it before and after; with --epochs, fine-tune and score again.

    Writes SAVE_DIR/METHOD/PHI/PHI_pruned_RATE.pth, which `segprune train`, `segprune eval` and
    `segprune.load` read, and pruning_results.json beside it.
    """
    _check_flags(config, given)
    check_input((1, 3, *config.input_shape))
    device = choose_device(config.cuda)
    found = _read(config)
    config = replace(config, phi=found.spec.variant, num_classes=found.spec.num_classes)
    folder = Path(config.save_dir) / config.pruning_method / found.spec.variant
    path = folder / f"{found.spec.variant}_pruned_{config.pruning_rate:g}.pth"
    check_kept(path, config.model_path, save_dir=Path(config.save_dir))
    fine_tuning, reason = with_rates(_fine_tuning(config, path), found.extra)
    if config.epochs:
        config = replace(config, lr=fine_tuning.lr)
        check_settings(fine_tuning)
    show_settings("Pruning", asdict(config) | {"dialect": found.dialect})
    show_notes((*found.notes, reason) if config.epochs else found.notes)
    teacher = found if config.epochs and fine_tuning.teacher else None
    source, pixels = _open(config, teacher) if config.data else (None, ())
    checkpoint.check_writable(folder)

    dense = checkpoint.build(found).to(device)
    scores = {} if source is None else {"dense": _score(dense, source, config, device, "scoring dense")}
    pruned = _prune(dense, config)
    extra = dict(found.extra) | {"pruning": _pruning_config(config)}
    checkpoint.save(pruned, path, extra=extra)
    if source is not None:
        scores["pruned"] = _score(pruned, source, config, device, "scoring pruned")
    with progress_bar("timing dense and pruned") as advance:
        latencies = measure_latency([dense, pruned], config.input_shape, device=device, progress=advance)
    record = _record(config, found, pruned, latencies, scores) | {"model_save_path": str(path)}
    checkpoint.write_json(record, folder / RESULTS)
    if config.epochs and source is not None:
        del dense
        done = fit_with(fine_tuning, pruned, source, pixels, extra, teacher)
        add_finetuned(record, done, folder)
    show_closing(record, folder)


def _check_flags(config: PruneConfig, given: frozenset[str]) -> None:
    if config.pruning_method not in METHODS:
        raise ValueError(f"Unknown method {config.pruning_method!r}; --pruning_method knows {', '.join(METHODS)}.")
    if not 0.0 <= config.pruning_rate < 1.0:
        raise ValueError(f"--pruning_rate is {config.pruning_rate:g}; it must be at least 0 and below 1.")
    if config.epochs and not config.data:
        raise ValueError("--epochs was given without --data; say what to fine-tune on.")
    for name in TRAINING_FLAGS:
        if name in given and not config.epochs:
            raise ValueError(f"--{name} has no effect without --epochs; give the epochs to fine-tune.")
    for name in DATA_FLAGS:
        if name in given and not config.data:
            raise ValueError(f"--{name} has no effect without --data; give the data set to score on.")


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
    splits = ("train", "val") if config.epochs else ("val",)
    source, labels = open_data(
        config.data,
        config.layout,
        config.num_classes,
        splits,
        skip_bad=config.skip_bad,
        num_workers=config.num_workers,
        classes=lambda names: check_teacher_names(
            f"--model_path {config.model_path}",
            teacher,
            names,
            "give data of the same classes, or leave the teacher out with --no_distill",
        ),
    )
    return source, labels.pixels


def _score(model: SegFormer, source: Source, config: PruneConfig, device: torch.device, text: str) -> Score:
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


def _prune(dense: SegFormer, config: PruneConfig) -> SegFormer:
    from segprune.pruning.pruner_l1 import L1Pruner  # here, since all other commands work without torch-pruning

    pruner = L1Pruner(
        dense,
        config.pruning_rate,
        rate_of=config.rate_of,  # type: ignore[arg-type]
        scope=config.scope,  # type: ignore[arg-type]
        round_to=config.round_to,
        heads=config.heads,
        keep_decoder=config.keep_decoder,
    )
    with console.status("pruning"):
        pruned = pruner.prune(torch.empty(1, 3, *config.input_shape, device="meta"))
    assert isinstance(pruned, SegFormer)
    return pruned


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


def _pruning_config(config: PruneConfig) -> dict[str, Any]:
    names = ("pruning_rate", "rate_of", "scope", "round_to", "heads", "keep_decoder", "seed")
    return {"method": config.pruning_method} | {name: getattr(config, name) for name in names}


def _record(
    config: PruneConfig, found: Checkpoint, pruned: SegFormer, latencies: list[Latency], scores: dict[str, Score]
) -> dict[str, Any]:
    """What pruning_results.json holds, fine-tuning apart."""
    shape = config.input_shape
    original, after = count(found.spec, shape), count(pruned.spec, shape)
    folded = count(replace(found.spec, branch_dims=None), shape) if pruned.spec.folded else original
    return {
        "model_config": {
            "phi": found.spec.variant,
            "num_classes": found.spec.num_classes,
            "input_shape": list(shape),
            "dialect": found.dialect,
            "model_path": config.model_path,
            "random_weights": not config.model_path,
        },
        "pruning_config": _pruning_config(config),
        "original_model": network_record(original, latencies[0], scores.get("dense")),
        "folded_model": network_size(folded),
        "pruned_model": network_record(after, latencies[1], scores.get("pruned")) | {"spec": spec_to_dict(pruned.spec)},
        "reduction": reduction_record(original, folded, after)
        | {"speedup": latencies[0].median_ms / latencies[1].median_ms},
        "settings": asdict(config),
        "environment": environment(),
    }
