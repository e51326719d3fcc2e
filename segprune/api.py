"""The whole job in Python: prune a network, score it, fine-tune it, export it, and load images for its repair.

Nothing is printed and no file is written but those that are named. `progress` is called with (done, in all). A network
that is given is left as it was.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from segprune.checkpoint import load
from segprune.compare import Difference
from segprune.data import (
    DataChoices,
    LabelReport,
    Location,
    Sample,
    Source,
    check_labels,
    open_source,
    readable,
    score_whole_pool,
    unlabelled,
)
from segprune.export import Manifest, export
from segprune.fold import fold_decoder
from segprune.inference.drop import DropScorer
from segprune.inference.evaluate import Score
from segprune.inference.evaluate import evaluate as score_samples
from segprune.inference.label_maps import EvalMode, Predict
from segprune.machine import choose_workers, fit_to_machine
from segprune.model import SegFormer
from segprune.pruning.budget import Trial
from segprune.pruning.importance import NEED_IMAGES
from segprune.pruning.options import PruneOptions
from segprune.pruning.prune import Pruned, make_pruner, with_counts
from segprune.pruning.prune import prune as prune_network
from segprune.runs.fit import fit
from segprune.runs.folder import Saving
from segprune.spec import RGB, preprocessing_of
from segprune.training.loop import train
from segprune.training.losses import compute_class_weights
from segprune.training.objective import check_distilled
from segprune.training.options import TrainOptions
from segprune.training.rates import choose_rates
from segprune.training.state import EpochResult, Splits, TrainState

Data = str | os.PathLike[str] | Source
Progress = Callable[[int, int], None]
NUM_IMAGES = 64  # that the repair uses


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned network, with the weights and the score of its best epoch. `path`: where they are saved, if so."""

    network: SegFormer
    score: Score
    epoch: int
    path: Path | None


def load_images(
    data: Data,
    number: int = NUM_IMAGES,
    input_shape: tuple[int, int] = (512, 512),
    channels: int = RGB,
) -> list[Tensor]:
    """Returns batches B C H W of `number` images, uint8 RGB, from a data set's train part or a folder of images.

    They are what `segprune.prune` takes as `images`, which normalises them as the network was trained. Labels are not
    read. `channels` are those of a network that takes no RGB, `network.spec.in_channels`.
    """
    places = _find_images(data)
    return unlabelled.batch_pixels(
        unlabelled.load_images(places, number, input_shape, channels)
    )


def prune(
    model: nn.Module,
    pruning_rate: float | str | Mapping[str, float] | None = None,
    *,
    data: Data | None = None,
    images: Iterable[Tensor] = (),
    options: PruneOptions | None = None,
    progress: Progress | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    example_inputs: Any = None,
    ignored_layers: Iterable[nn.Module] = (),
    **changes: Any,
) -> Pruned:
    """Returns `model` pruned by the share `pruning_rate` of its parameters, or as far as `max_drop` allows.

    `images`: batches of images B 3 H W without labels, uint8 or normalised, which the repair and the plan use. If none
    are given: 64 images of the train part of `data`, and without `data` synthetic ones, which `notes` says. With
    `max_drop` networks of several rates are scored on the val part of `data`, the smallest within so many points of
    the dense mIoU is returned, and `on_trial` is given each of them when it was scored. The other arguments are those
    of `Pruner`, and `changes` single options of `PruneOptions`.

    >>> from segprune.spec import standard_spec
    >>> pruned = prune(SegFormer(standard_spec("b0", 8)), 0.5, repair=False)
    >>> round(1 - pruned.after.parameters / pruned.before.parameters, 1)
    0.5
    """
    if pruning_rate is not None:
        changes["pruning_rate"] = pruning_rate
    options = replace(options or PruneOptions(), **changes)
    if options.max_drop is not None:
        if data is None:
            raise ValueError(
                "`max_drop` needs `data`, a data set on whose val part networks are scored."
            )
        if not isinstance(model, SegFormer):
            raise ValueError(
                f"`max_drop` needs a SegFormer, whose classes can be scored, and this is a {type(model).__name__}; "
                "prune it by a rate."
            )

    images = list(images)
    needed = options.repair is not False or options.pruning_method in NEED_IMAGES
    if data is not None and not images and needed:
        channels = preprocessing_of(model).num_channels
        images = load_images(data, NUM_IMAGES, options.input_shape, channels)
    if options.max_drop is None:
        return prune_network(
            model,
            images=images,
            options=options,
            progress=progress,
            example_inputs=example_inputs,
            ignored_layers=ignored_layers,
        )

    # Open the data, and check its labels, before anything long begins.
    assert data is not None
    num_classes, num_workers = _count_classes(model), choose_workers()
    source, _ = _open(data, model, num_classes, ("val",), num_workers=num_workers)
    pruner = make_pruner(
        model,
        ignored_layers=ignored_layers,
        images=images,
        options=options,
        progress=progress,
    )
    scorer = DropScorer(
        model,
        source.split("val"),
        num_classes,
        EvalMode(input_shape=options.input_shape),
        device=_device_of(model),
        num_workers=num_workers,
        seed=options.seed,
        progress=progress,
    )
    search = pruner.search(scorer.drop, on_trial, example_inputs)
    return with_counts(pruner, search.chosen.network, search)


def evaluate(
    model: Predict,
    data: Data | Sequence[Sample],
    *,
    split: str = "val",
    num_classes: int | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
    **mode: Any,
) -> Score:
    """Returns the score of a network, or of any function from pixels to logits, on a data set.

    `data` is a folder in one of the layouts, an open data set, or its samples. Labels are read as the network was
    trained, but those of samples are classes already. The labels of a folder are checked first; of a set without
    splits all of it is scored as val. `mode` are fields of `EvalMode`, such as `input_shape`. `device` is the network's
    own if None.
    """
    # A plain function says nothing of its classes, so they have to be given for it.
    if num_classes is None:
        num_classes = _count_classes(model)
    num_workers = choose_workers() if num_workers is None else num_workers
    how = EvalMode(**mode)

    # A folder is opened and checked; a data set or samples are taken as they are.
    if isinstance(data, str | os.PathLike):
        source, _ = _open(
            data, model, num_classes, (split,), skip_bad=skip_bad, num_workers=num_workers
        )
        samples: Sequence[Sample] = source.split(split)
    elif isinstance(data, Source):
        samples = _read_labels(score_whole_pool(data), model).split(split)
    else:
        samples = data

    return score_samples(
        model,
        samples,
        num_classes,
        how,
        device=_device_of(model) if device is None else device,
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress,
    )


def finetune(
    model: SegFormer,
    data: Data,
    *,
    teacher: SegFormer | None = None,
    save_dir: str | os.PathLike[str] | None = None,
    extra: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
    options: TrainOptions | None = None,
    **changes: Any,
) -> FineTuned:
    """Returns the network trained further on a data set's train part, with the weights that scored best on val.

    `teacher` is the dense network, whose answers are learnt beside the labels. `changes` are single options of
    `TrainOptions`, such as `epochs` or `lr`. Without `lr`, `extra` (what the dense checkpoint says of its training)
    decides: a tenth of its `lr`, else 6e-5. With `save_dir` the run's files are written there, among them the
    checkpoints, which also carry `extra`.
    """
    device = torch.device(_device_of(model) if device is None else device)
    extra = dict(extra or {})

    # Choose what was not given, and check the labels, before anything long begins.
    chosen = replace(options or TrainOptions(), num_classes=model.spec.num_classes, **changes)
    check_distilled(chosen, teacher is not None)
    chosen, _ = choose_rates(chosen, extra)
    chosen, _ = fit_to_machine(chosen, device)
    assert chosen.num_workers is not None
    source, labels = _open(
        data,
        model,
        model.spec.num_classes,
        ("train", "val"),
        num_workers=chosen.num_workers,
    )
    chosen = replace(
        chosen, class_weights=compute_class_weights(chosen.class_weights, labels.pixels)
    )

    # A copy, since training works in place. A folded teacher gives the same for less.
    network = copy.deepcopy(model).train()
    taught_by = None if teacher is None else fold_decoder(teacher)

    def on_step(done: int, total: int, loss: float, lr: float) -> None:
        if progress is not None:
            progress(done, total)

    if save_dir is not None:
        # Later runs take this rate as it is: it was chosen for fine-tuning already.
        if "lr" not in extra:
            extra["finetuned_lr"] = chosen.lr
        # No command started this run, so there is none that could resume it.
        saving = Saving(Path(save_dir), asdict(chosen), extra, resumable=False)
        run = fit(
            network,
            chosen,
            source,
            saving,
            device=device,
            teacher=taught_by,
            on_step=on_step,
            on_result=on_epoch,
        )
        return FineTuned(load(run.path, device=device), run.score, run.epoch, run.path)

    # Without a folder the best weights stay in memory.
    splits = Splits(source.split("train"), source.split("val"))
    return _train_in_memory(network, chosen, splits, device, taught_by, on_step, on_epoch)


def _train_in_memory(
    network: SegFormer,
    options: TrainOptions,
    splits: Splits,
    device: torch.device,
    teacher: SegFormer | None,
    on_step: Callable[[int, int, float, float], None],
    on_epoch: Callable[[EpochResult], None] | None,
) -> FineTuned:
    """Trains in place, and returns the network with the weights of its best epoch."""
    network.encoder.checkpointing = options.checkpointing
    best: dict[str, Any] = {}

    def keep_best(result: EpochResult, state: TrainState) -> None:
        # Training goes on with these tensors, so the best ones must be copied now.
        if result.best:
            weights = {
                name: tensor.detach().clone() for name, tensor in network.state_dict().items()
            }
            best.update(weights=weights, result=result)
        if on_epoch is not None:
            on_epoch(result)

    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=options.amp)
    try:
        train(
            network,
            options,
            splits,
            accelerator=accelerator,
            teacher=teacher,
            on_step=on_step,
            on_epoch=keep_best,
        )
    finally:
        accelerator.end_training()

    # The last epoch is always scored, and a first score is the best, so there is one.
    network.load_state_dict(best["weights"])
    result = best["result"]
    return FineTuned(network.eval(), result.score, result.epoch, None)


def export_model(
    model: SegFormer,
    path: str | os.PathLike[str],
    *,
    input_shape: tuple[int, int] = (512, 512),
    batch_size: int = 1,
    images: Data | None = None,
    num_images: int = 100,
    **options: Any,
) -> tuple[Manifest, Difference]:
    """Writes the network for another runtime, runs the file, and keeps it if it agrees with the network.

    `images` are a folder or a data set whose images calibrate int8, show fp16's ranges and are compared. `options` are
    those of `segprune.export.ExportOptions`, such as `format` and `precision`. Returns what the file takes and returns,
    and how far it is from the network.
    """
    # The same letterboxed images calibrate int8 and are compared.
    loaded: Sequence[Any] = ()
    if images is not None:
        channels = preprocessing_of(model).num_channels
        places = _find_images(images)
        loaded = unlabelled.load_images(places, num_images, input_shape, channels)
    return export(model, path, size=input_shape, batch=batch_size, images=loaded, **options)


def _find_images(data: Data) -> Sequence[Location]:
    """Returns where the images lie: those of the train part if `data` is a data set, else all below the folder."""
    if not isinstance(data, Source) and Path(data).exists():
        with suppress(
            FileNotFoundError
        ):  # raised for a folder in no known layout, which holds images alone
            data = open_source(data)
    return unlabelled.list_images(data)


def _open(
    data: Data,
    model: Predict,
    num_classes: int,
    splits: tuple[str, ...],
    *,
    num_workers: int,
    skip_bad: bool = False,
) -> tuple[Source, LabelReport]:
    """Opens a data set and checks its labels; with `skip_bad` images that cannot be read are left out first."""
    source = data if isinstance(data, Source) else open_source(data)
    if "train" not in splits:
        source = score_whole_pool(source)
    source = _read_labels(source, model)

    # Before the label check, which would stop at the first image that cannot be read.
    if skip_bad:
        for split in splits:
            good, _ = readable(source.split(split), num_workers)
            source = source.with_split(split, good)
    return source, check_labels(source, num_classes, splits, trained=True)


def _read_labels(source: Source, model: Predict) -> Source:
    """Returns the data set with its labels read as the network was trained."""
    return DataChoices(expected=preprocessing_of(model)).apply(source)


def _count_classes(model: Predict) -> int:
    """Returns the number of classes of a SegFormer or of an exported file."""
    described = getattr(model, "spec", None) or getattr(model, "manifest", None)
    if described is None:
        raise ValueError(
            f"A {type(model).__name__} does not say how many classes it has; give `num_classes`."
        )
    return int(described.num_classes)


def _device_of(model: Predict) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))
