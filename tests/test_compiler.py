"""A compiled network gives what the network gives, at every size and batch, and says where it did not compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import segprune.compiler
from segprune import SegFormer, compiled
from segprune.compiler import CompiledParts, compile_for_one_shape
from segprune.data.transforms import IMAGENET
from segprune.inference.label_maps import EvalMode, label_maps, make_network, prepare
from segprune.spec import Preprocessing, preprocessing_of
from tests.training.tiny import tiny_model

Compiled = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def model() -> SegFormer:
    return tiny_model().eval()


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that something was compiled for; nothing is, since tracing a network takes seconds."""
    seen: list[tuple[int, ...]] = []

    def compile_nothing(function: Compiled, **options: Any) -> Compiled:
        def call(x: Tensor) -> Tensor:
            if x.shape not in shapes_of_this:
                shapes_of_this.append(x.shape)
                seen.append(tuple(x.shape))
            return function(x)

        shapes_of_this: list[torch.Size] = []
        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    return seen


@torch.no_grad()
def test_the_whole_network_is_one_graph_that_gives_its_classes(
    model: SegFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    program, images = compiled(model, classes=True), torch.randn(2, 3, 45, 64)
    assert torch.equal(program(images), model(images).argmax(1))
    assert program.notes == []


@torch.no_grad()
def test_it_gives_the_networks_logits_and_leaves_it_as_it_was(
    model: SegFormer, shapes: list[tuple[int, ...]]
) -> None:
    images = torch.randn(2, 3, 45, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(compiled(model)(images), model(images), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")  # inductor warns of PyTorch's own code
@torch.no_grad()
def test_inductor_upsamples_and_chooses_in_one_program() -> None:
    """Of the network only this part, since the whole takes a minute to compile."""
    logits = torch.randn(1, 5, 9, 9)

    def choose(logits: Tensor) -> Tensor:
        return F.interpolate(logits, size=(36, 36), mode="bilinear").argmax(1)

    assert torch.equal(compile_for_one_shape(choose)(logits), choose(logits))


def test_smaller_batches_take_the_program_of_a_larger_one(
    model: SegFormer, shapes: list[tuple[int, ...]]
) -> None:
    program, images = compiled(model, (32, 32), batch=3), torch.randn(3, 3, 32, 32)
    all_three = program(images)
    torch.testing.assert_close(program(images[:2]), all_three[:2])
    assert shapes == [(3, 3, 32, 32)]
    assert len(program(torch.randn(4, 3, 32, 32))) == 4
    assert shapes == [(3, 3, 32, 32), (4, 3, 32, 32)]


def test_the_least_recently_used_size_goes(
    model: SegFormer, shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segprune.compiler, "MAX_SHAPES", 2)
    program = compiled(model)
    for side in (32, 33, 32, 34, 32):  # 32 was used again, so 33 goes
        program(torch.randn(1, 3, 32, side))
    assert [shape[3] for shape in shapes] == [32, 33, 34]
    program(torch.randn(1, 3, 32, 33))
    assert [shape[3] for shape in shapes] == [32, 33, 34, 33]


def test_half_precision_rounds_the_weights_once(
    model: SegFormer, shapes: list[tuple[int, ...]]
) -> None:
    images = torch.randn(1, 3, 32, 32)
    half = compiled(model, dtype=torch.bfloat16)(images)
    assert half.dtype == torch.bfloat16
    full = compiled(model)(images)
    assert (half - full).norm() < 0.05 * full.norm()


@torch.no_grad()
def test_what_does_not_compile_runs_eagerly_and_says_why(
    model: SegFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        raise RuntimeError("there is no compiler.")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    program, images = compiled(model), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)
    assert "no compiler" in program.notes[0]


def test_scored_compiled_it_gives_the_same_label_maps(
    model: SegFormer, shapes: list[tuple[int, ...]]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 130, 3), dtype=np.uint8)
    how = EvalMode(input_shape=(96, 160))
    maps = []
    for predict in (model, CompiledParts(model)):
        network = make_network(predict, model.spec.num_classes, "cpu", 1, IMAGENET)
        assert network.upsampling is predict
        maps.append(label_maps(network, [prepare(image, how)], how)[0])
    assert torch.equal(*maps)
    assert shapes == [(1, 3, 96, 160)]


def test_images_of_a_wrong_shape_are_refused(model: SegFormer) -> None:
    with pytest.raises(ValueError, match="at least 32"):
        segprune.compiled(model, (16, 32))


def test_each_function_has_programs_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    ones = torch.ones(1, 3, 4, 4)
    with torch._dynamo.config.patch(recompile_limit=1):
        for factor in (1.0, 2.0, 3.0):
            program = compile_for_one_shape(partial(torch.mul, factor))
            assert torch.equal(program(ones), factor * ones)


def test_who_feeds_it_images_knows_how_they_are_normalised(
    model: SegFormer, shapes: list[tuple[int, ...]]
) -> None:
    own = Preprocessing(mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
    model = copy.deepcopy(model)
    model.spec = replace(model.spec, preprocessing=own)
    assert preprocessing_of(compiled(model)) == own


def test_too_little_memory_is_no_reason_to_run_eagerly(
    model: SegFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_in_vain(function: Compiled, **_: Any) -> Compiled:
        def call(x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return call

    monkeypatch.setattr(torch, "compile", compile_in_vain)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(model)(torch.randn(1, 3, 32, 32))
