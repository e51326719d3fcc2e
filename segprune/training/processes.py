"""What a run's settings must fit before it starts: the processes that were started, and their shares of a batch."""

from __future__ import annotations

import os

from accelerate import Accelerator

from segprune.training.options import TrainOptions


def fit_batch_size(options: TrainOptions, num_images: int, processes: int) -> int:
    """Returns the images per step: `batch_size`, or fewer if there are not as many; all processes and pieces alike."""
    # Each process cuts its share into pieces, so the batch must divide by both.
    parts = processes * options.accumulate
    if options.batch_size % parts:
        raise ValueError(
            f"`batch_size` is {options.batch_size}, which {processes} processes and {options.accumulate} pieces do not "
            f"share evenly; make it a multiple of {parts}."
        )
    if num_images < parts:
        raise ValueError(
            f"{num_images} training images came for {processes} processes and {options.accumulate} pieces; "
            "start fewer, so that each gets one."
        )
    # A small data set gets a smaller batch, still a multiple of the parts.
    return min(options.batch_size, num_images // parts * parts)


def check_processes(options: TrainOptions, accelerator: Accelerator) -> None:
    """Raises ValueError if the processes or the precision are not those that the options expect."""
    # Processes that did not join would each train on all images and write the same files.
    processes, started = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    if started > processes:
        raise ValueError(
            f"{started} processes were started but only {processes} joined; start them with torchrun."
        )

    # Accelerate sets this variable, but on CPUs it silently ignores FSDP.
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes"):
        raise ValueError(
            "FSDP was asked for, but scores and saved states need the whole network in every process; leave it out and "
            "start with torchrun, which gives DDP."
        )

    # Accelerate decides the precision when it is built, so it cannot be changed here.
    used = accelerator.mixed_precision
    if options.amp != used:
        raise ValueError(
            f"`amp` is {options.amp}, the accelerator's mixed_precision {used}; give both the same."
        )
