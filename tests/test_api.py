"""The whole job in Python: what prune_train.py does, in ten lines; and each verb by itself."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import segprune
from segprune import SegFormer
from segprune.data import open_source, write_shapes
from segprune.export import Limits, open_exported
from segprune.inference.evaluate import EvalMode
from segprune.inference.evaluate import evaluate as score_samples
from segprune.spec import standard_spec

SIZE = (32, 32)
TINY: dict[str, Any] = {"input_shape": SIZE, "num_workers": 0, "batch_size": 4}


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(
        tmp_path_factory.mktemp("shapes"), num_train=8, num_val=3, size=SIZE, seed=5
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A b0 with hidden layers of half the width, for speed."""
    path = tmp_path_factory.mktemp("dense") / "b0.pth"
    spec = standard_spec("b0", 8)
    stages = []
    for stage in spec.stages:
        blocks = tuple(replace(block, ffn_dim=2 * stage.width) for block in stage.blocks)
        stages.append(replace(stage, blocks=blocks))
    torch.manual_seed(3)
    segprune.save(SegFormer(replace(spec, stages=tuple(stages))), path)
    return path


def test_a_criterion_sees_the_datas_images_where_nothing_is_repaired(
    dense: Path, data: Path
) -> None:
    options = {"pruning_method": "taylor", "repair": False, "input_shape": SIZE}
    pruned = segprune.prune(segprune.load(dense), 0.5, data=data, **options)
    assert pruned.notes == ()  # else: that synthetic ones stood in for them


def test_ten_lines_do_what_prune_train_does(
    dense: Path, data: Path, tmp_path: Path, capfd: Any
) -> None:
    steps: list[tuple[int, int]] = []

    model = segprune.load(dense)
    before = segprune.evaluate(model, data, **TINY)
    images = segprune.load_images(data, 8, SIZE)
    pruned = segprune.prune(model, 0.5, images=images, input_shape=SIZE)
    cut = segprune.evaluate(pruned.network, data, **TINY)
    tuned = segprune.finetune(
        pruned.network,
        data,
        teacher=model,
        epochs=2,
        lr=1e-3,
        progress=lambda *done: steps.append(done),
        **TINY,
    )
    segprune.save(tuned.network, tmp_path / "pruned.pth")
    after = segprune.evaluate(segprune.load(tmp_path / "pruned.pth"), data, **TINY)

    assert before.num_images == cut.num_images == 3
    assert pruned.after.parameters == pytest.approx(0.5 * pruned.before.parameters, rel=0.02)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert after == tuned.score
    assert tuned.network.spec == pruned.network.spec
    assert tuned.path is None
    assert capfd.readouterr() == ("", "")


def test_images_are_a_data_set_s_train_part_or_all_of_a_folder(data: Path) -> None:
    images = torch.cat(segprune.load_images(data, 99, SIZE))
    assert torch.equal(images, torch.cat(segprune.load_images(open_source(data), 99, SIZE)))
    assert len(images) == 8  # no masks, and none of val
    assert len(torch.cat(segprune.load_images(data / "JPEGImages", 99, SIZE))) == 11
    with pytest.raises(FileNotFoundError, match="holds no image"):
        segprune.load_images(data / "nowhere", 8, SIZE)


def test_a_score_is_the_same_of_a_folder_an_open_data_set_and_its_samples(
    dense: Path, data: Path
) -> None:
    model, source = segprune.load(dense), open_source(data)
    expected = score_samples(model, source.split("val"), 8, EvalMode(input_shape=SIZE))
    for given in (data, str(data), source, source.split("val")):
        assert segprune.evaluate(model, given, **TINY) == expected
    train = segprune.evaluate(model, data, split="train", **TINY)
    assert train.num_images == 8


def test_a_data_set_without_splits_is_scored_whole(dense: Path, tmp_path: Path) -> None:
    samples = write_shapes(tmp_path / "shapes", num_train=1, num_val=2, size=SIZE)
    for name, folder in (("images", "JPEGImages"), ("masks", "SegmentationClass")):
        (samples / folder).rename(tmp_path / name)
    shutil.rmtree(samples)
    model = segprune.load(dense)
    for given in (tmp_path, open_source(tmp_path)):
        assert segprune.evaluate(model, given, **TINY).num_images == 3


def test_what_does_not_say_its_classes_needs_their_number(data: Path) -> None:
    def predict(pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), 8, 4, 4)

    with pytest.raises(
        ValueError, match="A function does not say how many classes it has; give `num_classes`"
    ):
        segprune.evaluate(predict, data, **TINY)
    assert segprune.evaluate(predict, data, num_classes=8, **TINY).num_images == 3


def test_bad_labels_are_refused_before_anything_long(data: Path) -> None:
    five = SegFormer(standard_spec("b0", 5))
    for verb in (segprune.evaluate, segprune.finetune):
        with pytest.raises(ValueError, match="with 5 classes; relabel the masks"):
            verb(five, data, **TINY)


def test_fine_tuning_leaves_the_network_as_it_was_and_keeps_a_folder_if_asked(
    dense: Path, data: Path, tmp_path: Path
) -> None:
    model = segprune.load(dense)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = segprune.finetune(
        model, data, epochs=1, save_dir=tmp_path, extra={"lr": 1e-2}, seed=4, **TINY
    )
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items()
    )
    assert not model.training

    assert tuned.path == tmp_path / "best_epoch_weights.pth"
    saved = segprune.load(tuned.path).state_dict()
    assert all(
        torch.equal(saved[name], tensor) for name, tensor in tuned.network.state_dict().items()
    )

    again = segprune.finetune(
        model, data, epochs=1, lr=1e-3, seed=4, **TINY
    )  # a tenth of what extra says
    assert replace(again.score, confusion=()) == tuned.score  # files keep the ratios alone
    assert not again.network.training
    assert all(
        torch.equal(saved[name], tensor) for name, tensor in again.network.state_dict().items()
    )


def test_options_are_refused_by_the_argument_s_name(dense: Path, data: Path) -> None:
    model = segprune.load(dense)
    with pytest.raises(ValueError, match="`head_lr` is 0; it must be above 0"):
        segprune.finetune(model, data, head_lr=0, **TINY)
    with pytest.raises(ValueError, match="`distill_pixel` has no effect without `teacher`"):
        segprune.finetune(model, data, distill_pixel=1.0, **TINY)
    with pytest.raises(ValueError, match="`stride` has no effect in mode letterbox"):
        segprune.evaluate(model, data, stride=(8, 8), **TINY)


def test_an_exported_network_is_compared_with_images_and_scored(
    dense: Path, data: Path, tmp_path: Path
) -> None:
    model, path = segprune.load(dense), tmp_path / "b0.torchscript"
    manifest, difference = segprune.export_model(
        model,
        path,
        format="torchscript",
        input_shape=SIZE,
        images=open_source(data),
        num_images=3,
    )
    assert (manifest.num_classes, difference.num_images) == (8, 3)
    runtime = open_exported(path, trust=True)
    assert segprune.evaluate(runtime, data, **TINY) == segprune.evaluate(model, data, **TINY)


def test_an_exported_file_beyond_the_limits_is_not_kept(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "b0.torchscript"
    with pytest.raises(ValueError, match="at most -1 and at least 100 % were allowed"):
        segprune.export_model(
            segprune.load(dense),
            path,
            format="torchscript",
            input_shape=SIZE,
            limits=Limits(-1.0, 1.0),
        )
    assert not path.exists()
