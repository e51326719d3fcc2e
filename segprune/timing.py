"""Latency: forward passes timed in turns, so that a machine that slows down slows all of them alike.

On a CPU a pass is timed as Python calls it. On a GPU it is recorded once as a CUDA graph, and the graph is replayed:
the time is the GPU's. Called from Python, a small network keeps a large GPU waiting for its next kernel, and what is
measured is how fast Python launches kernels, whatever was pruned. That time is kept beside the other as `eager_ms`.

In half precision weights and images are cast, as a deployed network has them; autocast would cast them anew in every
pass. "fp32" computes products exactly, "tf32" lets the GPU round their factors to 10 bits.
Units: milliseconds for one batch, MACs per second in thousands of millions.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Method = Literal["eager", "cuda graph"]
Call = Callable[[], object]
Progress = Callable[[int, int], None]

DTYPE_OF: dict[str, torch.dtype] = {  # by Precision
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
CPU = torch.device("cpu")

MIN_ROUNDS = 3  # so that a median is none of the extremes
WARM_UP = 3  # passes before a graph is recorded: libraries choose their kernels and allocate in the first ones
REPLAYS = 10  # of a graph in one turn: while one runs, the next is launched
CPU_SIDE, GPU_SIDE = (
    2048,
    8192,
)  # of the square matrices whose product shows what the machine can do


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass: its spread over the runs, and how and on what it was measured."""

    median_ms: float
    low_ms: float  # 25th percentile
    high_ms: float  # 75th percentile
    p90_ms: float
    p99_ms: float  # of fewer than a hundred runs, close to the longest
    runs: int
    batch: int
    precision: str  # a Precision, or int8 of an exported file
    method: Method
    device: str  # the name of the GPU, or "cpu"
    threads: int | None  # of the CPU; None for a GPU
    eager_ms: float | None  # on a GPU, the median of the same pass called from Python


def summarise(
    times_ms: Sequence[float],
    *,
    batch: int,
    precision: str,
    threads: int,
    device: torch.device = CPU,
    eager_times_ms: Sequence[float] = (),
) -> Latency:
    """Returns the percentiles of at least two times, by linear interpolation, with what they were measured on.

    `threads` are the CPU's, and are left out of what a GPU did.
    """
    # 99 cuts: cuts[p - 1] is the p-th percentile.
    cuts = statistics.quantiles(times_ms, n=100, method="inclusive")
    on_gpu = device.type == "cuda"

    return Latency(
        median_ms=cuts[49],
        low_ms=cuts[24],
        high_ms=cuts[74],
        p90_ms=cuts[89],
        p99_ms=cuts[98],
        runs=len(times_ms),
        batch=batch,
        precision=precision,
        method="cuda graph" if on_gpu else "eager",
        device=torch.cuda.get_device_name(device) if on_gpu else device.type,
        threads=None if on_gpu else threads,
        eager_ms=statistics.median(eager_times_ms) if eager_times_ms else None,
    )


def measure_latency(
    networks: Sequence[nn.Module],
    input_shape: tuple[int, int],
    *,
    device: torch.device | str = CPU,
    precision: Precision = "fp32",
    batch: int = 1,
    max_runs: int = 30,
    max_seconds: float = 3.0,
    progress: Progress | None = None,
) -> list[Latency]:
    """Returns the latency of each network on images of (H, W) pixels, all measured in turns.

    The networks are moved to `device` and put into evaluation mode. They keep their precision: another one than
    float32 is measured on copies. Raises ValueError for TF32 where there is none.
    """
    device, dtype = torch.device(device), DTYPE_OF[precision]
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(
            f"The precision is tf32 on {device.type}, and only GPUs have it; give fp32, bf16 or fp16."
        )

    # Times depend on shapes and types, not on what is in the images.
    images = _draw_noise(networks[0], batch, input_shape).to(device, dtype)

    passes = []
    for network in networks:
        network.to(device).eval()

        # A copy is cast, so that the caller's network keeps its precision.
        if dtype != torch.float32:
            network = copy.deepcopy(network).to(dtype)
        passes.append(Pass(partial(network, images)))

    with tf32_products(precision == "tf32"), torch.inference_mode():
        times = time_passes(
            passes, device, max_rounds=max_runs, max_seconds=max_seconds, progress=progress
        )

    return [
        summarise(
            row.times_ms,
            batch=batch,
            precision=precision,
            threads=torch.get_num_threads(),
            device=device,
            eager_times_ms=row.eager_times_ms,
        )
        for row in times
    ]


def _draw_noise(network: nn.Module, batch: int, input_shape: tuple[int, int]) -> torch.Tensor:
    """Returns as many channels as the network's spec has; a network without one takes 3."""
    channels = getattr(getattr(network, "spec", None), "in_channels", 3)
    return torch.randn(batch, channels, *input_shape)


def measure_parts(
    networks: Sequence[nn.Module],
    parts: Sequence[str],
    input_shape: tuple[int, int],
    *,
    device: torch.device | str = CPU,
    precision: Precision = "fp32",
    max_runs: int = 15,
    max_seconds: float = 2.0,
) -> list[dict[str, float]]:
    """Returns the median milliseconds of each part of each network by its name, all measured in turns.

    A part is a submodule that a pass calls once. It is timed alone, on what it reads in a pass over an image of (H, W)
    pixels, so the parts' times do not add up to the pass's to the last bit.
    """
    device, dtype = torch.device(device), DTYPE_OF[precision]
    image = _draw_noise(networks[0], 1, input_shape).to(device, dtype)

    passes = []
    with tf32_products(precision == "tf32"), torch.inference_mode():
        for network in networks:
            network.to(device).eval()
            if dtype != torch.float32:
                network = copy.deepcopy(network).to(dtype)
            inputs = _watch_inputs(network, parts, image)
            passes += [
                Pass(partial(network.get_submodule(name), *inputs[name])) for name in parts
            ]
        times = time_passes(passes, device, max_rounds=max_runs, max_seconds=max_seconds)

    medians = [statistics.median(row.times_ms) for row in times]
    return [
        dict(zip(parts, medians[start : start + len(parts)], strict=True))
        for start in range(0, len(medians), len(parts))
    ]


def _watch_inputs(
    network: nn.Module, parts: Sequence[str], image: Tensor
) -> dict[str, tuple[object, ...]]:
    """Returns what each part reads in a pass."""
    seen: dict[str, tuple[object, ...]] = {}
    hooks = []
    for name in parts:

        def keep(_: nn.Module, inputs: tuple[object, ...], name: str = name) -> None:
            seen[name] = inputs

        hooks.append(network.get_submodule(name).register_forward_pre_hook(keep))
    try:
        network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@dataclass(frozen=True)
class Pass:
    """A forward pass to be timed. `get_ready` is called before each turn and is not timed."""

    run: Call
    get_ready: Call = lambda: None

    def prepare(self) -> Call:
        self.get_ready()
        return self.run


@dataclass(frozen=True)
class Times:
    """All times of one pass: of the replayed graph and, beside it, of calls from Python; on a CPU of these alone."""

    times_ms: list[float]
    eager_times_ms: list[float]


def time_passes(
    passes: Sequence[Pass],
    device: torch.device,
    *,
    max_rounds: int,
    max_seconds: float,
    settle: bool = False,
    progress: Progress | None = None,
) -> list[Times]:
    """Returns the times of each pass on `device`, after a warm-up of each; for the rest see `time_in_turns`."""
    on_gpu = device.type == "cuda"
    recorder = GraphRecorder(device) if on_gpu else None

    # Each pass runs before it is timed. On a GPU that is a part of recording its graph.
    calls, replays = [], []
    for each in passes:
        run = each.prepare()
        if recorder is None:
            run()
        else:
            replay = Pass(partial(_repeat, recorder.record(run), REPLAYS))
            replays.append(Turn(replay.prepare, device, REPLAYS))
        calls.append(Turn(each.prepare, device))

    # Graphs take turns with calls from Python, so that both see the machine in the same state.
    rows = time_in_turns(
        [*replays, *calls],
        max_rounds=max_rounds,
        max_seconds=max_seconds,
        settle=settle,
        progress=progress,
    )

    # Rows are in the order of the turns: on a GPU first all replays, then all calls.
    if not on_gpu:
        return [Times(row, []) for row in rows]
    return [Times(*pair) for pair in zip(rows[: len(passes)], rows[len(passes) :], strict=True)]


def _repeat(call: Call, times: int) -> None:
    for _ in range(times):
        call()


@dataclass(frozen=True)
class Turn:
    """One of those that take turns. `prepare` is not timed; it returns the call that is, of so many passes."""

    prepare: Callable[[], Call]
    device: torch.device = CPU
    passes: int = 1


def time_in_turns(
    turns: Sequence[Turn],
    *,
    max_rounds: int,
    max_seconds: float,
    min_rounds: int = MIN_ROUNDS,
    settle: bool = False,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Returns the milliseconds of a pass in every round, one list for each turn.

    In a round each has its turn once. There are at least `min_rounds`, at most `max_rounds`, and no new one begins
    once `max_seconds` have passed. `settle` puts a call that is not counted before the one that is: it finds the
    caches filled by another network, and the cores taken by threads of another runtime that still wait for work.
    `progress` is given how many turns are done, and how many there are at most.
    """
    times: list[list[float]] = [[] for _ in turns]
    total = max_rounds * len(turns)
    start = time.perf_counter()

    for round_index in range(max_rounds):
        if round_index >= min_rounds and time.perf_counter() - start > max_seconds:
            break
        for i, turn in enumerate(turns):
            call = turn.prepare()
            if settle:
                call()
            times[i].append(_time_ms(call, turn.device) / turn.passes)
            del call  # before the next one is prepared: together they may not fit into memory
            if progress is not None:
                progress(round_index * len(turns) + i + 1, total)

    if progress is not None:
        # Time may run out before the last round: the bar is filled nevertheless.
        progress(total, total)
    return times


def _time_ms(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start_s = time.perf_counter()
        call()
        return (time.perf_counter() - start_s) * 1e3

    # The GPU's own clock, from an idle GPU to the end of the last kernel.
    torch.cuda.synchronize(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class GraphRecorder:
    """Records calls as CUDA graphs. No two may be replayed at once: they share one stretch of memory.

    Inputs and weights that a call reads must stay where they are; what it returns is overwritten by other graphs.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.empty_cache()  # what earlier graphs left behind cannot be freed while another is recorded
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

        # Shared memory ends with the last graph in it,
        # and cannot be shared again; so one graph stays.
        number = torch.zeros(1, device=device)
        self._anchor = self.record(number.zero_)

    def record(self, call: Call, times: int = 1) -> Call:
        """Returns the replay of `call`, made so many times. It is first run outside the graph, as a warm-up."""
        # What the call reads may still be on its way on the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            _repeat(call, WARM_UP)
            torch.cuda.synchronize(self._stream.device)

            # Not by torch.cuda.graph, which collects garbage
            # each time: that takes longer than recording a step.
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                _repeat(call, times)
            except BaseException:
                with suppress(
                    RuntimeError
                ):  # of a recording that is broken; why it broke is told by the first error
                    graph.capture_end()
                raise
            graph.capture_end()

        def replay(_inputs_of: Call = call) -> None:  # keeps what the call reads in memory
            graph.replay()

        return replay


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Lets a GPU take TF32 for products and convolutions of float32, or forbids it, and puts back what was set."""
    # The switches are global, so what the caller had set is put back in any case.
    before = get_tf32()
    set_tf32(allowed, allowed)
    try:
        yield
    finally:
        set_tf32(*before)


def get_tf32() -> tuple[bool, bool]:
    """Returns whether products, and whether convolutions, of float32 may be taken in TF32."""
    with _no_advice_on_tf32():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def set_tf32(products: bool, convolutions: bool) -> None:
    """Sets PyTorch's two global switches.

    They are the old ones on purpose: torch.compile reads them, and fails where only the new ones were set.
    """
    with _no_advice_on_tf32():
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def _no_advice_on_tf32() -> Iterator[None]:
    """Silences what PyTorch 2.9 and later say where the old switches are read or set."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Please use the new API settings", category=UserWarning
        )
        yield


def matrix_product(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Call, int]:
    """Returns a large product of square matrices, which no network outruns by much, and its MACs."""
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    a, b = torch.randn(2, side, side, device=device).to(dtype)

    # Every product is written to the same place, so that no allocation is timed.
    out = torch.empty_like(a)

    def multiply() -> Tensor:
        return torch.mm(a, b, out=out)

    return multiply, side**3
