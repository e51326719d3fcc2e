"""Every runtime runs the same network, and the numbers of a row follow from its times."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo

from segprune import load, save
from segprune.benchmark import Case, Opened, export_cases, grid, measure, open_case, peak_memory
from segprune.benchmark import memory as memory_module
from segprune.data.transforms import IMAGENET
from segprune.model import SegFormer
from segprune.timing import Times
from tests.exporting import tiny_network

SIZE = (64, 96)


@pytest.fixture
def weights(tmp_path: Path) -> str:
    save(tiny_network(), tmp_path / "small.pth")
    return str(tmp_path / "small.pth")


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_every_runtime_gives_the_network_s_logits(runtime: str, tmp_path: Path) -> None:
    weights = str(tmp_path / "tiny.pth")
    save(tiny_network(), weights)
    (case,) = export_cases(grid([weights], runtimes=(runtime,), sizes=(SIZE,)), tmp_path)
    opened, x = open_case(case), torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        expected = load(weights)(x)
    torch.testing.assert_close(opened.predict(x), expected, rtol=1e-3, atol=1e-4)
    kept = opened.run()
    first = kept.clone()
    opened.predict(x)
    assert torch.equal(kept, first)  # what a pass gave is not written over by the next


def test_a_pass_may_end_with_classes_which_are_the_logits_argmax(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    runtimes = ("torch", "compile", "torchscript")
    cases = grid([weights], runtimes=runtimes, sizes=(SIZE,), output="classes")
    x = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        expected = load(weights)(x).argmax(1)
    for case in export_cases(cases, tmp_path):
        opened = open_case(case)
        assert opened.run().shape == (1, *SIZE)
        same = opened.predict(x).argmax(1) == expected
        assert float(same.float().mean()) > 0.999  # exported ones are folded


def test_bf16_computes_in_it_and_folding_keeps_the_logits(weights: str) -> None:
    plain, half, folded = (
        open_case(grid([weights], sizes=(SIZE,), dtypes=(dtype,), fold=fold)[0])
        for dtype, fold in (("fp32", False), ("bf16", False), ("fp32", True))
    )
    assert (plain.run().dtype, half.run().dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(folded.run(), plain.run(), rtol=1e-3, atol=1e-4)
    assert folded.macs < plain.macs  # type: ignore[operator]


def test_what_does_not_run_says_so_in_one_sentence(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: SegFormer, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this.\nStack")

    (case,) = grid([weights], sizes=(SIZE,))
    monkeypatch.setattr(SegFormer, "forward", broken)
    with pytest.raises(
        ValueError,
        match=r"small.pth in torch, fp32, 64×96, batch 1 did not run \(no kernel for this\)",
    ):
        open_case(case)


def opened(threads: int, batch: int, macs: int | None) -> Opened:
    case = Case("a.pth", "torch", "fp32", SIZE, batch, threads)
    return Opened(case, "PyTorch", 2, IMAGENET, macs, torch.relu, lambda: torch.zeros(1))


def test_the_numbers_of_a_row_follow_from_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    products = [4.0, 8.0, 8.0]  # ms, of 2**33 MACs
    times = [[10.0, 20.0, 30.0], [5.0, 5.0, 8.0], [40.0, 40.0, 50.0], products]
    monkeypatch.setattr(
        "segprune.benchmark.rounds.time_passes",
        lambda *_, **how: [Times(row, []) for row in times],
    )
    rows, peaks = measure(
        [opened(1, 1, 2 * 10**9), opened(1, 8, None), opened(1, 1, 10**9)],
        max_rounds=3,
        max_seconds=1,
    )
    assert peaks == {1: pytest.approx(2**33 / 8e-3 / 1e9)}
    assert [row.latency.median_ms for row in rows] == [20.0, 5.0, 40.0]
    assert [row.images_per_second for row in rows] == pytest.approx([50.0, 1600.0, 25.0])
    assert [row.faster for row in rows] == pytest.approx([1.0, 32.0, 0.5])
    assert [row.gmacs_per_second for row in rows] == [
        pytest.approx(100.0),
        None,
        pytest.approx(25.0),
    ]
    assert rows[0].peak_share == pytest.approx(100.0 / peaks[1])
    assert rows[1].peak_share is None


def test_every_number_of_threads_has_a_peak_of_its_own_and_runs_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("segprune.timing.CPU_SIDE", 8)
    seen: list[int] = []
    cases = [Case("a.pth", "torch", "fp32", SIZE, 1, number) for number in (2, 1)]
    ready = [
        Opened(
            case,
            "PyTorch",
            2,
            IMAGENET,
            1,
            torch.relu,
            lambda: (seen.append(torch.get_num_threads()), torch.zeros(1))[1],
        )
        for case in cases
    ]
    rows, peaks = measure(ready, max_rounds=3, max_seconds=0.0)
    assert (
        seen == [2, 1] + [2, 2, 1, 1] * 3
    )  # a warm-up; then one pass to settle, one that counts
    assert list(peaks) == [1, 2]
    assert [row.latency.runs for row in rows] == [3, 3]


@pytest.mark.skipif(not memory_module.STATUS.exists(), reason="the system does not tell")
def test_a_larger_batch_takes_more_memory_and_weights_are_in_it(weights: str) -> None:
    one, many = (
        peak_memory(case) for case in grid([weights], sizes=((128, 128),), batch_sizes=(1, 16))
    )
    assert one is not None
    assert many is not None
    assert many - one > 15 * 5 * 128 * 128 * 4  # at the least the logits of 15 pictures more


def test_where_the_system_does_not_tell_memory_is_not_known(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "STATUS", Path("/nowhere"))
    assert peak_memory(grid([weights], sizes=(SIZE,))[0]) is None
