"""The records of a run, against numbers worked out by hand."""

import json
import platform
from dataclasses import replace

import torch

import segprune
from segprune.inference.evaluate import Score
from segprune.runs.records import (
    environment,
    network_record,
    network_size,
    reduction_record,
    score_from_record,
    score_record,
)
from segprune.stats import Counts
from segprune.timing import Latency

COUNTS = Counts(parameters=1_234_567, macs=2_500_000_000, input_shape=(512, 512))
SIZE = {
    "parameters": 1_234_567,
    "parameters_M": 1.234567,
    "macs": 2_500_000_000,
    "macs_G": 2.5,
    "flops": 5_000_000_000,
    "flops_G": 5.0,
}
LATENCY = Latency(
    5.5, 5.0, 6.25, 7.0, 8.0, 30, 1, "fp16", "cuda graph", "NVIDIA H100", None, 9.5
)
SCORE = Score(
    0.25,
    0.5,
    0.75,
    (0.5, None, 0.0),
    (0.5, None, None),
    (1.0, None, 0.0),
    3,
    confusion=((1, 0), (0, 1)),
)
SCORE_RECORD = {
    "miou": 0.25,
    "mean_accuracy": 0.5,
    "pixel_accuracy": 0.75,
    "iou": [0.5, None, 0.0],
    "recall": [0.5, None, None],
    "precision": [1.0, None, 0.0],
    "num_images": 3,
}


def test_a_size_counts_flops_as_two_macs_and_says_the_units_in_its_keys() -> None:
    assert network_size(COUNTS) == SIZE


def test_small_counts_keep_six_digits_of_a_million_and_a_thousand_million() -> None:
    size = network_size(Counts(parameters=7, macs=1_234, input_shape=(32, 32)))
    assert (size["parameters_M"], size["macs_G"], size["flops_G"]) == (
        0.000007,
        0.000001,
        0.000002,
    )


def test_what_was_not_measured_is_not_in_the_record() -> None:
    assert network_record(COUNTS) == SIZE


def test_latency_and_score_stand_beside_the_size() -> None:
    latency = {
        "median_ms": 5.5,
        "low_ms": 5.0,
        "high_ms": 6.25,
        "p90_ms": 7.0,
        "p99_ms": 8.0,
        "runs": 30,
        "batch": 1,
    }
    latency |= {
        "precision": "fp16",
        "method": "cuda graph",
        "device": "NVIDIA H100",
        "threads": None,
        "eager_ms": 9.5,
    }
    assert (
        network_record(COUNTS, LATENCY, SCORE)
        == SIZE | {"latency_ms": 5.5, "latency": latency} | SCORE_RECORD
    )


def test_a_score_is_plain_data_with_null_for_an_absent_class() -> None:
    record = score_record(SCORE)
    assert record == SCORE_RECORD
    assert json.loads(json.dumps(record)) == record


def test_a_score_comes_back_from_its_record_but_for_the_matrix() -> None:
    with_boundary = replace(SCORE, boundary_miou=0.5, boundary_iou=(0.5, None, 0.5))
    for score in (SCORE, with_boundary):
        record = json.loads(json.dumps(score_record(score))) | {"epoch": 3}
        assert score_from_record(record) == replace(score, confusion=())


def test_reductions_are_percentages_of_the_original_and_folding_stands_apart() -> None:
    original, folded, pruned = (
        Counts(p, m, (32, 32)) for p, m in ((1000, 4000), (900, 3000), (500, 1000))
    )
    assert reduction_record(original, folded, pruned) == {
        "parameters_reduction_percent": 50.0,
        "flops_reduction_percent": 75.0,
        "parameters_by_folding_percent": 10.0,
        "parameters_by_pruning_percent": 40.0,
        "flops_by_folding_percent": 25.0,
        "flops_by_pruning_percent": 50.0,
    }


def test_reductions_are_rounded_to_four_digits() -> None:
    original, pruned = Counts(3, 7, (32, 32)), Counts(2, 6, (32, 32))
    record = reduction_record(original, original, pruned)
    assert (
        record["parameters_reduction_percent"]
        == record["parameters_by_pruning_percent"]
        == 33.3333
    )
    assert record["flops_reduction_percent"] == record["flops_by_pruning_percent"] == 14.2857
    assert record["parameters_by_folding_percent"] == record["flops_by_folding_percent"] == 0.0


def test_the_environment_names_versions_and_machine() -> None:
    assert environment() == {
        "segprune": segprune.__version__,
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()),
        "machine": f"{platform.uname().system} {platform.uname().machine}",
    }
    assert json.loads(json.dumps(environment())) == environment()
