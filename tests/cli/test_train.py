"""`segprune train`: from scratch and from any file, and what its flags tell the loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from segprune.checkpoint import read
from segprune.checkpoint.dialects import NUMERICS
from segprune.data import load_mask
from segprune.spec import standard_spec
from segprune.training.losses import class_weights_from_counts
from tests.commands import BEST, LAST, done, results_in, same, told, training
from tests.dialects import Fill, reference


def test_training_from_scratch_starts_at_the_variant_asked_for(
    data: Path, tmp_path: Path
) -> None:
    done(*training(data, tmp_path, "--phi", "b0", "--num_classes", 8, "--epochs", 1))
    found = read(tmp_path / BEST, variant="b0", num_classes=8)
    assert found.spec == standard_spec("b0", 8)
    assert found.extra["lr"] == results_in(tmp_path)["settings"]["lr"] == 1e-3


def test_a_bubbliiiing_file_is_fine_tuned_with_its_own_numerics(
    data: Path, trained_like: Fill, tmp_path: Path
) -> None:
    torch.save(
        reference("bubbliiiing", trained_like, num_classes=8).state_dict(),
        tmp_path / "theirs.pth",
    )
    out = done(
        *training(
            data, tmp_path / "out", "--model_path", tmp_path / "theirs.pth", "--epochs", 1
        )
    )
    assert "bubbliiiing was assumed" in out
    found = read(tmp_path / "out" / LAST)
    assert found.dialect == "segprune"
    assert found.spec.numerics == NUMERICS["bubbliiiing"]
    assert results_in(tmp_path / "out")["settings"]["lr"] == 6e-5
    assert "lr" not in found.extra  # what it was trained with is not known
    seen = told(*training(data, tmp_path / "again", "--model_path", tmp_path / "out" / LAST))
    assert seen.config.lr == found.extra["finetuned_lr"] == 6e-5
    assert "Note: Learning rate 6e-05: what the network was fine-tuned with before." in seen.out


def test_a_pruned_file_is_fine_tuned_at_a_tenth_of_its_learning_rate(
    data: Path, small: Path, tmp_path: Path
) -> None:
    done(*training(data, tmp_path / "out", "--model_path", small, "--epochs", 1))
    before, after = read(small), read(tmp_path / "out" / LAST)
    assert after.spec == before.spec
    assert not same(after.state_dict, before.state_dict)
    assert results_in(tmp_path / "out")["settings"]["lr"] == pytest.approx(1e-3)
    assert after.extra["lr"] == 1e-2


def test_flags_overrule_what_is_read_off_the_file(
    data: Path, small: Path, tmp_path: Path
) -> None:
    flags = ("--lr", 5e-4, "--drop_path", 0.3, "--freeze_epochs", 1, "--epochs", 1)
    done(*training(data, tmp_path / "out", "--model_path", small, *flags))
    before, after = read(small), read(tmp_path / "out" / LAST)
    assert results_in(tmp_path / "out")["settings"]["lr"] == 5e-4
    assert after.spec.numerics == replace(before.spec.numerics, drop_path=0.3)
    encoder = {
        name: before.state_dict[name]
        for name in before.state_dict
        if name.startswith("encoder.")
    }
    assert all(torch.equal(after.state_dict[name], encoder[name]) for name in encoder)  # frozen
    assert not same(after.state_dict, before.state_dict)


ONE_EACH = ",".join(map(str, range(1, 9)))
REACHED: list[tuple[tuple[object, ...], dict[str, object]]] = [
    (("--epochs", 3), {"epochs": 3}),
    (("--batch_size", 2), {"batch_size": 2}),
    (("--accumulate", 2), {"accumulate": 2}),
    (("--optimizer", "sgd", "--momentum", 0.8), {"optimizer": "sgd", "momentum": 0.8}),
    (("--weight_decay", 0.1), {"weight_decay": 0.1}),
    (("--decay", "cosine", "--warmup", 0.2), {"decay": "cosine", "warmup": 0.2}),
    (("--head_lr", 4), {"head_lr": 4.0}),
    (("--clip_norm", 2), {"clip_norm": 2.0}),
    (("--ema", 0.9), {"ema": 0.9}),
    (("--freeze_epochs", 2), {"freeze_epochs": 2}),
    (("--scale", 1, 2), {"scale": (1.0, 2.0)}),
    (("--eval_every", 2, "--save_steps", 3), {"eval_every": 2, "save_steps": 3}),
    (("--seed", 7), {"seed": 7}),
    (("--amp", "bf16"), {"amp": "bf16"}),
    (("--compile",), {"compile": True}),
    (("--input_shape", 32, 64), {"input_shape": (32, 64)}),
    (
        ("--loss", "ce + 0.5*dice", "--label_smoothing", 0.1, "--class_weights", ONE_EACH),
        {
            "loss": "ce + 0.5*dice",
            "class_weights": tuple(map(float, range(1, 9))),
            "label_smoothing": 0.1,
        },
    ),
]


@pytest.mark.parametrize(
    ("flags", "expected"), REACHED, ids=[str(flags[0]) for flags, _ in REACHED]
)
def test_a_flag_reaches_the_loop(
    flags: tuple[object, ...],
    expected: dict[str, object],
    data: Path,
    small: Path,
    tmp_path: Path,
) -> None:
    plain = told(*training(data, tmp_path, "--model_path", small)).config
    config = told(*training(data, tmp_path, "--model_path", small, *flags)).config
    assert config == replace(plain, **expected)  # and nothing else changes
    assert any(getattr(plain, name) != value for name, value in expected.items())


def test_checkpointing_is_told_to_the_encoder(data: Path, small: Path, tmp_path: Path) -> None:
    for flags in ((), ("--checkpointing",)):
        seen = told(*training(data, tmp_path, "--model_path", small, *flags))
        assert seen.model.encoder.checkpointing is bool(flags)


@pytest.mark.parametrize("rule", ["enet", "median"])
def test_class_weights_come_from_the_pixels_of_the_data(
    rule: str, data: Path, small: Path, tmp_path: Path
) -> None:
    masks = (data / "VOCdevkit/VOC2007/SegmentationClass").glob("*.png")
    pixels = sum(np.bincount(load_mask(path).ravel(), minlength=8) for path in masks)
    seen = told(
        *training(data, tmp_path, "--model_path", small, "--class_weights", rule)
    ).config
    assert seen.class_weights == pytest.approx(class_weights_from_counts(list(pixels), rule))
