"""What a run takes from the machine if nobody said otherwise: precision, and processes that load images.

What a device can do is told by plain functions of the device. Scores and the repair take products of float32 exactly;
only training steps take them in TF32.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

import torch

from segprune.timing import Precision, tf32_products

C = TypeVar("C")
AUTO = "auto"
Amp = Literal["auto", "no", "fp16", "bf16"]
AMPS: tuple[Amp, ...] = get_args(Amp)
MAX_WORKERS = 8  # each holds two batches ready


def has_bf16(device: torch.device) -> bool:
    """Returns whether the device multiplies bf16 numbers itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    # In a container this is less than the cores of the machine.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_amp(device: torch.device) -> str:
    if device.type != "cuda":
        return "no"
    # bf16 has the range of float32, so its loss needs no scaling.
    return "bf16" if has_bf16(device) else "fp16"


def choose_precision(amp: str, device: torch.device) -> Precision:
    """Returns the precision in which networks are timed on `device` by a run with this `amp`, which is chosen already.

    On a GPU it is that of the training steps: half precision, else products in TF32. A CPU is timed in float32, in
    which networks run there.
    """
    if device.type != "cuda":
        return "fp32"
    if amp == "fp16":
        return "fp16"
    if amp == "bf16":
        return "bf16"
    return "tf32" if has_tf32(device) else "fp32"


def choose_workers() -> int:
    """Returns this process's share of the cores, of which torchrun says how many processes divide them."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_WORKERS, num_cores() // processes))


def fit_to_machine(config: C, device: torch.device) -> tuple[C, tuple[str, ...]]:
    """Returns the config with a value for what was not given of `amp`, `tf32` and `num_workers`, and notes on them.

    A config need not have all three. Raises ValueError for a precision that is unknown, or that the device lacks.
    """
    # Read by name, since commands have different configs, each with some of the three.
    settings: dict[str, Any] = vars(config)
    amp = settings.get("amp", "no")
    check_amp(amp, device)

    # Choose what was not given, and say so in one note.
    chosen: dict[str, Any] = {}
    words = []
    if amp == AUTO:
        chosen["amp"] = choose_amp(device)
        words.append(f"`amp` {chosen['amp']}")
    # None means "not given"; a config without the field never has it chosen.
    if settings.get("tf32", False) is None:
        chosen["tf32"] = has_tf32(device)
        words += ["`tf32`"] if chosen["tf32"] else []
    if settings["num_workers"] is None:
        chosen["num_workers"] = choose_workers()
        words.append(f"`num_workers` {chosen['num_workers']}")

    notes = []
    if words:
        notes.append(
            f"Chosen for {name_of(device)} and {num_cores()} cores: {', '.join(words)}."
        )
    # The user's own choice is kept, but the cost would come as a surprise.
    if amp == "bf16" and device.type == "cpu" and not has_bf16(device):
        notes.append(
            "`amp` bf16 is more than 20 times slower than `amp` no on this CPU, which has no instructions for bf16; "
            "leave it out."
        )
    return replace(config, **chosen), tuple(notes)  # type: ignore[type-var]


def check_amp(amp: str, device: torch.device) -> None:
    """Raises ValueError for a precision that is unknown, and for fp16 on a CPU."""
    if amp not in AMPS:
        raise ValueError(f"`amp` is {amp!r}; choose {', '.join(AMPS)}.")
    if amp == "fp16" and device.type == "cpu":
        raise ValueError("`amp` fp16 trains on a GPU only; use one (`cuda`), or leave it out.")


@contextmanager
def exact_products() -> Iterator[None]:
    """Takes products of float32 exactly wherever nothing asks for TF32, and keeps torch.compile from advising TF32."""
    with tf32_products(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        yield
