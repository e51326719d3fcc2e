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
from segprune.cli.common import (
    check_data,
    choose_device,
    class_names,
    console,
    show_notes,
    show_score,
    show_settings,
    switch,
)
from segprune.cli.fitting import BEST, LAST, Fit, Resumable, fit, load_resumable
from segprune.model import SegFormer, check_input
from segprune.spec import Spec, standard_spec
from segprune.training.loop import TrainConfig

SCRATCH_LR, PRETRAINED_LR = 1e-3, 6e-5  # the first as measured on the generated data, the second the paper's


@dataclass(frozen=True)
class TrainSettings:
    data: Annotated[str, Option("--data", help="Folder in VOC layout, as `segprune shapes` writes one.")] = "VOCdevkit"
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
    batch_size: Annotated[int, Option("--batch_size", help="Pictures per step and process.")] = 8
    lr: Annotated[
        float | None,
        Option(
            "--lr",
            help="Highest learning rate. If not given: 1e-3 from scratch, 6e-5 from a checkpoint, "
            "and a tenth of the rate that a file of ours was trained with.",
        ),
    ] = None
    weight_decay: Annotated[float, Option("--weight_decay", help="Of AdamW; biases and norms have none.")] = 0.01
    decay: Annotated[str, Option("--decay", help="How the learning rate falls: poly or cosine.")] = "poly"
    warmup: Annotated[float, Option("--warmup", help="Share of all steps in which the learning rate rises.")] = 0.05
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
    eval_every: Annotated[int, Option("--eval_every", help="Epochs between two scores on the val list.")] = 1
    num_workers: Annotated[int, Option("--num_workers", min=0, help="Processes that load pictures.")] = 2
    amp: Annotated[str, Option("--amp", help="Mixed precision: no, fp16 or bf16.")] = "no"
    cuda: Annotated[bool, switch("--cuda", "Use the GPU; several GPUs by torchrun train.py …")] = False
    seed: Annotated[int, Option("--seed", help="Of weights, order and augmentation.")] = 11
    save_dir: Annotated[str, Option("--save_dir", help="Folder for checkpoints and results.")] = "logs"
    dialect: Annotated[str | None, Option("--dialect", help="Overrules the dialect that is recognised.")] = None
    resume: Annotated[
        bool, switch("--resume", "Go on with the run in --save_dir, with the settings it was started with.")
    ] = False


def run(config: TrainSettings, given: frozenset[str]) -> None:
    """Train or fine-tune a SegFormer on a VOC folder, and score it after every epoch.

    Fine-tuning a pruned network, as a rule: a tenth of the original learning rate, 50 to 100 epochs, optionally
    with --freeze_epochs first. Several GPUs: torchrun --nproc_per_node N train.py --cuda …
    """
    folder = Path(config.save_dir)
    resumed = None
    notes: tuple[str, ...] = ()
    if config.resume:
        resumed, extra = load_resumable(folder)
        config = _resumed_config(config, given, resumed)
        model = SegFormer(resumed.spec)
    else:
        model, notes, extra = _start(config)
    check_input((1, 3, *config.input_shape))
    choose_device(config.cuda)
    config = replace(config, phi=model.spec.variant, num_classes=model.spec.num_classes)
    config = replace(config, lr=learning_rate(config.lr, config.model_path, extra))
    show_settings("Resumed training" if config.resume else "Training", asdict(config))
    show_notes(notes)
    check_data(config.data, model.spec.num_classes, ("train", "val"))
    check_writable(folder)
    done = fit_with(config, model, extra, resumed)
    show_score(f"Best epoch {done.epoch} on val", done.score, class_names(config.data))
    console.print(f"Saved: {folder / BEST}\n       {folder / LAST}", soft_wrap=True)


def fit_with(config: TrainSettings, model: SegFormer, extra: dict[str, Any], resumed: Resumable | None = None) -> Fit:
    """One run as the settings say; `extra` is what the checkpoint carries on from the one it started from."""
    lr = learning_rate(config.lr, config.model_path, extra)
    from_scratch = lr if not config.model_path else 10 * lr  # the rate whose tenth suits what comes next
    return fit(
        model,
        _train_config(config, model.spec.num_classes, lr),
        Path(config.save_dir),
        cuda=config.cuda,
        settings=asdict(replace(config, lr=lr)),
        extra={"lr": from_scratch} | extra,
        resumed=resumed,
    )


def _start(config: TrainSettings) -> tuple[SegFormer, tuple[str, ...], dict[str, Any]]:
    """Network, notes to show, and the extra to carry on."""
    torch.manual_seed(config.seed)
    if not config.model_path:
        if config.dialect is not None:
            raise ValueError("--dialect was given without --model_path; it says who wrote a checkpoint.")
        spec = standard_spec(config.phi or "b2", 8 if config.num_classes is None else config.num_classes)
        return SegFormer(_with_drop_path(spec, config.drop_path)), (), {}
    found = checkpoint.read(
        config.model_path, dialect=config.dialect, variant=config.phi, num_classes=config.num_classes
    )
    found = replace(found, spec=_with_drop_path(found.spec, config.drop_path))
    return checkpoint.build(found).train(), found.notes, dict(found.extra)


def _with_drop_path(spec: Spec, rate: float | None) -> Spec:
    return spec if rate is None else replace(spec, numerics=replace(spec.numerics, drop_path=rate))


def _resumed_config(config: TrainSettings, given: frozenset[str], resumed: Resumable) -> TrainSettings:
    """The old run's settings; flags given now are kept beside them, and refused by the loop if they contradict."""
    old = {name: tuple(v) if isinstance(v, list) else v for name, v in resumed.settings.items()}
    flags = {name: getattr(config, name) for name in given}
    fixed = ("model_path", "phi", "num_classes", "dialect", "drop_path")
    wrong = [name for name in fixed if name in flags and flags[name] != old[name]]
    if wrong:
        raise ValueError(
            f"The run to resume had --{wrong[0]} {old[wrong[0]]}, now it is {flags[wrong[0]]}; leave the flag out."
        )
    return replace(config, **{**old, **flags, "resume": True})


def check_settings(config: TrainSettings) -> None:
    """ValueError for settings that no run can have, before anything long begins."""
    assert config.num_classes is not None
    assert config.lr is not None
    _train_config(config, config.num_classes, config.lr)


def learning_rate(lr: float | None, model_path: str, extra: Mapping[str, Any]) -> float:
    """The rate asked for, else what suits where the network comes from; `extra` is its checkpoint's."""
    if lr is not None:
        return lr
    if not model_path:
        return SCRATCH_LR
    return float(extra["lr"]) / 10 if "lr" in extra else PRETRAINED_LR


def _train_config(config: TrainSettings, num_classes: int, lr: float) -> TrainConfig:
    return TrainConfig(
        data=config.data,
        num_classes=num_classes,
        input_shape=config.input_shape,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=lr,
        weight_decay=config.weight_decay,
        decay=config.decay,  # type: ignore[arg-type]
        warmup=config.warmup,
        freeze_epochs=config.freeze_epochs,
        scale=config.scale,
        eval_every=config.eval_every,
        num_workers=config.num_workers,
        seed=config.seed,
        mixed_precision=config.amp,
    )
