import dataclasses

import pytest
import torch
from torch import Tensor, nn

from segprune.compare import Difference, Limits, compare
from segprune.data import draw_shapes
from segprune.data.transforms import Bytes
from segprune.export import run_both
from segprune.export.job import Job
from segprune.export.manifest import Manifest
from segprune.export.network import Deployed
from segprune.export.runtimes import Runtime
from segprune.model import SegFormer

MANIFEST = Manifest("b0", 5, "onnx", "fp32", (2, 32, 64), preprocess=False, argmax=False)


def job_of(
    network: SegFormer, manifest: Manifest = MANIFEST, images: tuple[Bytes, ...] = ()
) -> Job:
    manifest = dataclasses.replace(manifest, spec=network.spec)
    return Job(Deployed(network, argmax=manifest.argmax), manifest, (32, 64), images)


@pytest.fixture
def network(small_model: SegFormer) -> SegFormer:
    return small_model.float()


def found(network: nn.Module, job: Job, change) -> Difference:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return change(network(x))

    return compare(run_both(network, Runtime("it", job.manifest, run), job))


def test_the_network_itself_is_not_off(network: SegFormer) -> None:
    assert found(network, job_of(network), lambda y: y) == Difference(0.0, 1.0, 2)


def test_the_difference_is_a_share_of_the_largest_logit(network: SegFormer) -> None:
    difference = found(network, job_of(network), lambda y: y * 1.01)
    assert difference.relative == pytest.approx(0.01, rel=1e-4)
    assert difference.agreement == 1.0


def test_agreement_is_the_share_of_pixels_with_equal_class(network: SegFormer) -> None:
    def spoil(y: Tensor) -> Tensor:
        y[:, :, :8] *= -1  # a quarter of the rows, where lowest becomes highest
        return y

    assert found(network, job_of(network), spoil).agreement == pytest.approx(0.75)


def test_of_class_maps_only_the_agreement_is_known(network: SegFormer) -> None:
    job = job_of(network, dataclasses.replace(MANIFEST, argmax=True))
    difference = found(network, job, lambda y: y.argmax(1).to(torch.uint8))
    assert difference == Difference(None, 1.0, 2)
    assert difference.text == "equal class on 100.000 % of pixels"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_never_pass(network: SegFormer, value: float) -> None:
    def spoil(y: Tensor) -> Tensor:
        y[0, 0, 0, 0] = value
        return y

    assert not found(network, job_of(network), spoil).within(Limits(1e6, 0.0))


def test_images_that_are_given_are_what_is_compared(network: SegFormer) -> None:
    images = tuple(draw_shapes(1, "train", i, (32, 64))[0] for i in range(3))
    assert found(network, job_of(network, images=images), lambda y: y).num_images == 3


def test_a_batch_for_calibration_is_filled_up_with_the_first_images(network: SegFormer) -> None:
    images = tuple(draw_shapes(1, "train", i, (32, 64))[0] for i in range(3))
    first, last = job_of(network, images=images).make_batches()
    assert torch.equal(last[1], first[0])


@pytest.mark.parametrize(
    ("relative", "agreement", "limits", "passes"),
    [
        (1e-5, 1.0, Limits(1e-4, 1.0), True),
        (2e-4, 1.0, Limits(1e-4, 0.0), False),
        (1e-5, 0.98, Limits(1e-4, 0.99), False),
        (0.5, 0.95, Limits(None, 0.9), True),
        (None, 0.95, Limits(1e-4, 0.9), True),
    ],
)
def test_both_limits_count(
    relative: float | None, agreement: float, limits: Limits, passes: bool
) -> None:
    assert Difference(relative, agreement, 1).within(limits) == passes
