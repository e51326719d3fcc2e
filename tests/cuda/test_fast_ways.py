"""What makes a network fast on a GPU gives what the plain network gives: layouts, compiled programs, recorded graphs.

Networks are tiny, since each size takes seconds to compile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segprune import compiled, save
from segprune.data import load_mask, open_source
from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.timing import tf32_products
from tests.commands import HERE, done
from tests.training.tiny import tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore"),  # inductor warns of PyTorch's own code
]
GPU = torch.device("cuda")
SIZE = ("--input_shape", 64, 64)


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    with tf32_products(False):
        yield


@pytest.fixture(scope="module")
def tiny() -> SegFormer:
    model = tiny_model().eval()
    nn.init.normal_(
        model.decode_head.classifier.weight
    )  # so that no class is everywhere the highest
    return model.to(GPU)


@pytest.fixture(scope="module")
def tiny_file(tiny: SegFormer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    save(tiny, path)
    return path


@pytest.mark.parametrize("head", ["folded", "mlp", "conv"])
@torch.no_grad()
def test_logits_do_not_depend_on_the_layout_of_what_is_upsampled(
    small_model: SegFormer, conv_model: SegFormer, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, so that another order of sums hardly shows."""
    networks = {"mlp": small_model, "folded": fold_decoder(small_model), "conv": conv_model}
    network, x = networks[head], torch.randn(2, 3, 64, 96).double()
    on_cpu = network(x)
    on_gpu = network.to(GPU)(x.to(GPU))
    assert on_gpu.is_contiguous()
    torch.testing.assert_close(on_gpu.cpu(), on_cpu)

    def leave(maps: Tensor) -> Tensor:
        return maps

    monkeypatch.setattr("segprune.model.to_upsample", leave)
    torch.testing.assert_close(network(x.to(GPU)), on_gpu)


@torch.no_grad()
def test_classes_are_exactly_the_argmax_of_the_logits(tiny: SegFormer) -> None:
    for size in ((64, 96), (45, 133)):
        x = torch.randn(2, 3, *size, device=GPU)
        assert torch.equal(tiny.classes(x), tiny(x).argmax(1))


@torch.no_grad()
def test_compiled_classes_of_several_sizes_are_the_networks_and_replays_repeat_them(
    tiny: SegFormer,
) -> None:
    program = compiled(tiny, classes=True)
    small, large = torch.randn(3, 3, 64, 64, device=GPU), torch.randn(2, 3, 96, 133, device=GPU)
    first = program(small)
    for x in (small, large, small[:2]):
        classes = program(x)
        assert (classes == tiny(x).argmax(1)).float().mean() > 0.99
        assert torch.equal(program(x), classes)

    # What was returned stays as it was, whatever graph was replayed since.
    assert torch.equal(first, program(small))
    assert program.notes == []


@torch.no_grad()
def test_compiled_logits_in_half_precision_are_the_networks(tiny: SegFormer) -> None:
    program, x = compiled(tiny, (64, 64), torch.float16, batch=2), torch.randn(2, 3, 64, 64)
    logits, expected = program(x), tiny(x.to(GPU))
    assert logits.dtype == torch.float16
    assert (logits - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(program(x), logits)
    assert program.notes == []


def test_compiled_evaluation_scores_as_the_plain_one(
    data: Path, tiny_file: Path, tmp_path: Path
) -> None:
    scores = {}
    for name, flags in (("plain", ()), ("fast", ("--compile",))):
        path = tmp_path / f"{name}.json"
        out = done(
            "eval", tiny_file, "--data", data, *SIZE, *HERE, "--cuda", *flags, "--json", path
        )
        assert "Not compiled" not in out
        assert "Not recorded" not in out
        scores[name] = json.loads(path.read_text(encoding="utf-8"))["miou"]
    assert scores["fast"] == pytest.approx(scores["plain"], abs=0.005)


def test_compiled_prediction_gives_the_plain_masks(
    data: Path, tiny_file: Path, tmp_path: Path
) -> None:
    samples = open_source(data).split("val")
    images = Path(str(samples[0].image)).parent
    masks = {}
    for name, flags in (("plain", ()), ("fast", ("--compile",))):
        where = ("--kind", "mask", "--save_dir", tmp_path / name)
        out = done("predict", tiny_file, "--input", images, *SIZE, "--cuda", *flags, *where)
        assert "Not compiled" not in out
        assert "Not recorded" not in out
        masks[name] = [load_mask(tmp_path / name / "mask" / f"{s.name}.png") for s in samples]
    assert np.mean([a == b for a, b in zip(masks["fast"], masks["plain"], strict=True)]) > 0.99
