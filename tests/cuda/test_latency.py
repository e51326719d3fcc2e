"""Latency where the GPU is measured: replayed graphs against the arithmetic, the cut network and the card's name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from segprune import save
from segprune.benchmark import grid, measure, open_case
from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.budget.latency import LatencyTable, Place, Shape, measure_shapes
from segprune.pruning.pruner import Pruner
from segprune.spec import standard_spec
from segprune.timing import GraphRecorder, Precision, get_tf32, measure_latency
from tests.commands import done, refused

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda")


class Products(nn.Module):
    """So many products of large matrices, one after the other: the GPU's work, whatever Python does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2048, 2048) / 2048**0.5)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight
        for _ in range(self.number):
            y = y @ self.weight
        return y + x.mean()


def test_a_replay_computes_what_the_call_does_on_what_lies_in_its_input() -> None:
    model, x = (
        SegFormer(standard_spec("b0", 8)).to(DEVICE).eval(),
        torch.randn(1, 3, 64, 96, device=DEVICE),
    )
    kept: list[Tensor] = []
    recorder = GraphRecorder(DEVICE)
    with torch.inference_mode():
        replay = recorder.record(lambda: kept.append(model(x)))
        x.normal_()
        replay()
        torch.testing.assert_close(kept[-1], model(x), rtol=1e-3, atol=1e-4)


def test_latency_is_proportional_to_the_gpu_s_work_and_names_the_card() -> None:
    one, four = measure_latency(
        [Products(8), Products(32)], (32, 32), device=DEVICE, precision="fp16"
    )
    assert four.median_ms / one.median_ms == pytest.approx(4.0, rel=0.25)
    assert (one.method, one.device, one.threads) == (
        "cuda graph",
        torch.cuda.get_device_name(DEVICE),
        None,
    )
    assert one.eager_ms is not None
    assert one.eager_ms > 0.0


def test_a_small_network_waits_for_python_when_it_is_called_and_not_when_it_is_replayed() -> (
    None
):
    (latency,) = measure_latency(
        [SegFormer(standard_spec("b0", 8))], (64, 64), device=DEVICE, precision="fp16"
    )
    assert latency.eager_ms is not None
    assert latency.eager_ms > 1.3 * latency.median_ms


def test_tf32_is_faster_than_exact_products_and_its_switches_are_put_back() -> None:
    before = get_tf32()
    (exact,) = measure_latency([Products(32)], (32, 32), device=DEVICE, precision="fp32")
    (tf32,) = measure_latency([Products(32)], (32, 32), device=DEVICE, precision="tf32")
    if torch.cuda.get_device_capability(DEVICE) >= (8, 0):
        assert tf32.median_ms < 0.7 * exact.median_ms
    assert get_tf32() == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_networks_keep_their_own_precision_and_logits(precision: Precision) -> None:
    model = SegFormer(standard_spec("b0", 8)).to(DEVICE).eval()
    before = copy.deepcopy(model.state_dict())
    measure_latency([model], (64, 64), device=DEVICE, precision=precision, max_seconds=0.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_step_s_time_is_the_gpu_s_and_not_that_of_its_launch() -> None:
    small, large = (
        Shape("linear", (1, 4096), (512, 512)),
        Shape("linear", (1, 4096), (512, 2048)),
    )
    times = measure_shapes([small, large], Place(DEVICE, "fp16"))
    assert 0.0 < times[0] < times[1] < 1.0


def test_a_plan_meets_a_latency_on_the_gpu() -> None:
    dense = SegFormer(standard_spec("b2", 150)).to(DEVICE).eval()
    table = LatencyTable(DEVICE, "fp16")
    pruned = Pruner(dense, 0.2, rate_of="latency", latency_table=table, repair=False).prune(
        torch.empty(1, 3, 512, 512, device="meta")
    )
    before, after = measure_latency(
        [dense, pruned], (512, 512), device=DEVICE, precision="fp16"
    )
    assert after.median_ms / before.median_ms == pytest.approx(0.8, abs=0.06)


def test_benchmark_replays_graphs_of_eager_and_folded_networks(tmp_path: Path) -> None:
    save(SegFormer(standard_spec("b0", 8)), tmp_path / "b0.pth")
    path, sizes = str(tmp_path / "b0.pth"), ((256, 256),)
    cases = grid([path], dtypes=("fp32", "tf32", "fp16"), sizes=sizes, device="cuda")
    cases += grid([path], dtypes=("fp16",), sizes=sizes, device="cuda", fold=True)
    rows, peaks = measure([open_case(case) for case in cases], max_rounds=20, max_seconds=2.0)

    assert set(peaks) == {"fp32", "tf32", "fp16"}
    assert peaks["fp16"] > peaks["fp32"]
    for row in rows:
        assert (row.latency.method, row.latency.threads) == ("cuda graph", None)
        assert row.latency.eager_ms is not None
    assert rows[3].macs < rows[2].macs  # type: ignore[operator]


def test_prune_s_table_names_the_card_and_no_threads(tmp_path: Path) -> None:
    said = done(
        "prune",
        "--phi",
        "b0",
        "--num_classes",
        8,
        "--input_shape",
        64,
        64,
        "--cuda",
        "--save_dir",
        tmp_path,
    )
    assert "CUDA graph" in said
    assert "thread" not in said.partition("Latency:")[2]

    record = json.loads((tmp_path / "l1/b0/pruning_results.json").read_text(encoding="utf-8"))
    for name in ("original_model", "pruned_model"):
        latency = record[name]["latency"]
        assert (latency["method"], latency["threads"]) == ("cuda graph", None)
        assert latency["precision"] in ("tf32", "bf16", "fp16")
        assert latency["device"] == torch.cuda.get_device_name(DEVICE)


def test_a_latency_out_of_reach_names_no_rate_below_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = (
        "--phi",
        "b0",
        "--num_classes",
        8,
        "--input_shape",
        64,
        64,
        "--cuda",
        "--save_dir",
        tmp_path / "out",
    )
    said = refused("prune", *flags, "--rate_of", "latency", "--pruning_rate", 0.8)
    assert "rate of -" not in said


def test_folding_is_faster_on_the_gpu_by_the_graph() -> None:
    dense = SegFormer(standard_spec("b2", 150))
    before, after = measure_latency(
        [dense, fold_decoder(dense)],
        (512, 512),
        device=DEVICE,
        precision="tf32",
        batch=8,
        max_runs=10,
    )
    assert after.median_ms < before.median_ms
