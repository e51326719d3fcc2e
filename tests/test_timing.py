"""Turns, what is counted of them, percentiles against NumPy's, and what a latency says of itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from segprune.model import PARTS, SegFormer
from segprune.timing import (
    CPU,
    REPLAYS,
    Call,
    Pass,
    Turn,
    get_tf32,
    matrix_product,
    measure_latency,
    measure_parts,
    set_tf32,
    summarise,
    tf32_products,
    time_in_turns,
    time_passes,
)


def run_turns(number: int, seen: list[str], **how: object) -> list[list[float]]:
    def turn(i: int) -> Turn:
        def prepare() -> Call:
            seen.append(f"prepare {i}")
            return lambda: seen.append(f"call {i}")

        return Turn(prepare)

    return time_in_turns([turn(i) for i in range(number)], **how)  # type: ignore[arg-type]


def test_every_round_gives_each_its_turn_in_order() -> None:
    seen: list[str] = []
    times = run_turns(2, seen, max_rounds=4, max_seconds=60.0)
    assert seen == ["prepare 0", "call 0", "prepare 1", "call 1"] * 4
    assert [len(row) for row in times] == [4, 4]


def test_settling_puts_a_call_before_each_that_counts() -> None:
    seen: list[str] = []
    times = run_turns(1, seen, max_rounds=3, max_seconds=60.0, settle=True)
    assert seen == ["prepare 0", "call 0", "call 0"] * 3
    assert len(times[0]) == 3


@pytest.mark.parametrize("least", [3, 5])
def test_no_new_round_begins_once_time_is_up_but_the_least_number_is_run(least: int) -> None:
    told: list[tuple[int, int]] = []
    times = run_turns(
        2,
        [],
        min_rounds=least,
        max_rounds=50,
        max_seconds=0.0,
        progress=lambda done, most: told.append((done, most)),
    )
    assert [len(row) for row in times] == [least, least]
    assert told == [*((i, 100) for i in range(1, 2 * least + 1)), (100, 100)]


def test_a_turn_of_several_passes_is_told_by_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(
        "segprune.timing.time.perf_counter", lambda: float(next(clock))
    )  # a second later each time
    turn = Turn(lambda: list, passes=4)
    assert time_in_turns([turn], max_rounds=3, max_seconds=60.0) == [[250.0] * 3]


def test_a_pass_gets_ready_before_each_turn_and_warms_up_once() -> None:
    seen: list[str] = []
    passes = [Pass(lambda: seen.append("run"), lambda: seen.append("ready"))]
    (times,) = time_passes(passes, CPU, max_rounds=3, max_seconds=0.0)
    assert seen == ["ready", "run"] * 4
    assert (len(times.times_ms), times.eager_times_ms) == (3, [])


def test_on_a_gpu_graphs_are_replayed_in_turns_with_calls_from_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a stand-in for the recorder and the clock: what is recorded and what is counted."""
    seen: list[str] = []

    class Recorder:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "cuda"

        def record(self, call: Call) -> Call:
            seen.append("record")
            return lambda: seen.append("replay")

    def time_ms(call: Call, device: torch.device) -> float:
        before = len(seen)
        call()
        return float(len(seen) - before)  # a millisecond for every replay or call

    monkeypatch.setattr("segprune.timing.GraphRecorder", Recorder)
    monkeypatch.setattr("segprune.timing._time_ms", time_ms)
    passes = [Pass(lambda: seen.append("call"), lambda: seen.append("ready"))]
    (times,) = time_passes(passes, torch.device("cuda"), max_rounds=3, max_seconds=60.0)
    assert seen == ["ready", "record"] + (["replay"] * REPLAYS + ["ready", "call"]) * 3
    assert (times.times_ms, times.eager_times_ms) == ([1.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("number", [2, 3, 100, 257])
def test_percentiles_are_numpys(number: int) -> None:
    times = np.random.default_rng(number).lognormal(size=number)
    latency = summarise(times.tolist(), batch=1, precision="fp32", threads=1)
    measured = [
        latency.low_ms,
        latency.median_ms,
        latency.high_ms,
        latency.p90_ms,
        latency.p99_ms,
    ]
    assert measured == pytest.approx(np.percentile(times, [25, 50, 75, 90, 99]).tolist())
    assert latency.runs == number


def test_the_product_is_one_of_square_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segprune.timing.CPU_SIDE", 8)
    run, macs = matrix_product(CPU)
    result = run()
    assert isinstance(result, torch.Tensor)
    assert (result.shape, macs) == ((8, 8), 512)


def test_latency_names_what_it_was_measured_on_and_leaves_the_networks(
    small_model: SegFormer,
) -> None:
    model = small_model.float().train()
    other, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    seen: list[tuple[int, int]] = []
    rows = measure_latency(
        [model, other],
        (64, 96),
        batch=2,
        max_runs=7,
        progress=lambda done, most: seen.append((done, most)),
    )
    assert len(rows) == 2
    for row in rows:
        assert 0 < row.low_ms <= row.median_ms <= row.high_ms <= row.p90_ms <= row.p99_ms
        assert (row.runs, row.batch, row.precision, row.device, row.threads) == (
            7,
            2,
            "fp32",
            "cpu",
            1,
        )
        assert (row.method, row.eager_ms) == ("eager", None)
    assert seen[-1] == (14, 14)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_latency_takes_at_least_three_runs_when_time_is_up(small_model: SegFormer) -> None:
    (row,) = measure_latency([small_model.float()], (32, 32), max_seconds=0.0)
    assert row.runs == 3


def test_half_precision_casts_weights_and_images_of_a_copy(small_model: SegFormer) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    class Watched(SegFormer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((x.dtype, next(self.parameters()).dtype))
            return super().forward(x)

    model = Watched(small_model.spec)
    (row,) = measure_latency([model], (32, 32), precision="bf16", max_seconds=0.0)
    assert row.precision == "bf16"
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert next(model.parameters()).dtype == torch.float32


def test_tf32_is_refused_where_there_is_none(small_model: SegFormer) -> None:
    with pytest.raises(ValueError, match=r"tf32 on cpu.*give fp32, bf16 or fp16"):
        measure_latency([small_model], (32, 32), precision="tf32")


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_switched_for_products_and_convolutions_and_put_back(allowed: bool) -> None:
    before = get_tf32()
    try:
        set_tf32(True, False)
        with tf32_products(allowed):
            assert get_tf32() == (allowed, allowed)
        assert get_tf32() == (True, False)
    finally:
        set_tf32(*before)


def test_each_part_is_timed_alone_on_what_it_reads(small_model: SegFormer) -> None:
    model, read = small_model.float(), []
    model.encoder.stages[1].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    first, second = measure_parts([model, copy.deepcopy(model)], PARTS, (64, 96), max_runs=3)
    assert list(first) == list(second) == list(PARTS)
    assert all(ms > 0.0 for ms in first.values())
    assert len(read) == 2 * (1 + 1 + 3)  # watched, warmed up, and in three rounds; of both
    assert {tuple(x.shape[2:]) for x in read} == {(16, 24)}
