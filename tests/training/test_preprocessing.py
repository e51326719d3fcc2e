"""What a student and its teacher get to see where they were trained on other pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from segprune.data.transforms import IMAGENET, normalise_pixels, restore_pixels
from segprune.spec import Preprocessing
from segprune.training.loop import train
from tests.training.tiny import config_of, tiny_model

OTHER = Preprocessing((120.0, 110.0, 90.0), (60.0, 50.0, 40.0), channels="bgr")


def seen_by(data: Path, own: Preprocessing) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the images that a student with this preprocessing, and a teacher with ImageNet's, get in training."""
    model, teacher = tiny_model(), tiny_model(1)
    model.spec = replace(model.spec, preprocessing=own)
    student_saw: list[Tensor] = []
    teacher_saw: list[Tensor] = []
    model.encoder.register_forward_pre_hook(
        lambda module, inputs: student_saw.append(inputs[0].detach().clone())
    )
    teacher.encoder.register_forward_pre_hook(
        lambda module, inputs: teacher_saw.append(inputs[0].detach().clone())
    )
    accelerator = Accelerator(cpu=True)
    train(model, *config_of(data, epochs=1), accelerator=accelerator, teacher=teacher)
    return student_saw, teacher_saw


def test_both_see_the_same_pixels_each_as_it_was_trained(data: Path) -> None:
    plain, taught = seen_by(data, IMAGENET), seen_by(data, OTHER)
    assert len(plain[0]) == len(taught[0]) > len(taught[1]) > 0
    for before, after in zip(plain[0], taught[0], strict=True):
        pixels = restore_pixels(before, IMAGENET)
        torch.testing.assert_close(after, normalise_pixels(pixels, OTHER), rtol=0, atol=1e-4)
    for before, after in zip(plain[1], taught[1], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
