"""What a run's settings must fit before it starts: the processes that were started, and their shares of a batch."""

from __future__ import annotations

import os

from accelerate import Accelerator

from segprune.training.config import TrainConfig


def fitting_batch(config: TrainConfig, num_images: int, processes: int) -> int:
    """Pictures per step: as asked for, or fewer where there are not as many; all processes and pieces alike."""
    parts = processes * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size is {config.batch_size}, which {processes} processes and {config.accumulate} pieces do not "
            f"share evenly; make it a multiple of {parts}."
        )
    if num_images < parts:
        raise ValueError(
            f"{num_images} training pictures came for {processes} processes and {config.accumulate} pieces; "
            "start fewer, so that each gets a picture."
        )
    return min(config.batch_size, num_images // parts * parts)


def check_processes(config: TrainConfig, accelerator: Accelerator) -> None:
    processes, started = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    if started > processes:
        raise ValueError(f"{started} processes were started but only {processes} joined; start them with torchrun.")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes"):  # set by accelerate, which on CPUs
        raise ValueError(  # would do without it and say nothing
            "FSDP was asked for, but scores and saved states need the whole network in every process; leave it out and "
            "start with torchrun, which gives DDP."
        )
    used = accelerator.mixed_precision
    if config.mixed_precision != used:
        raise ValueError(f"mixed_precision is {config.mixed_precision}, the accelerator's {used}; give both the same.")
