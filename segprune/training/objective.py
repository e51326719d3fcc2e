"""What a step minimises: the loss on the labels and, with a teacher, how far the student is from it.

The student is wrapped in one module that returns all the loss needs, so that whatever distributes a module over
processes sees every parameter in its forward pass, the projections' too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from segprune.data.transforms import IMAGENET, renormalise
from segprune.spec import Preprocessing, Spec, preprocessing_of, stated_preprocessing
from segprune.training.distill import Distillation, Projections
from segprune.training.losses import SegmentationLoss
from segprune.training.options import TrainOptions

Parts = tuple[
    Tensor, Tensor | None, list[Tensor] | None
]  # logits; logits before the last upsampling; projected maps


class Student(nn.Module):
    """Pixels B 3 H W to logits B K H W, and to what distillation compares if there is a `projections`."""

    def __init__(
        self, model: nn.Module, projections: Projections | None, *, distilled: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.projections = projections
        self.distilled = distilled

    def forward(self, pixels: Tensor) -> Parts:
        if not self.distilled:
            return self.model(pixels), None, None
        maps, small = self.model.parts(pixels)  # type: ignore[operator]
        logits = self.model.resize(small, pixels.shape[2:])  # type: ignore[operator]
        return logits, small, None if self.projections is None else self.projections(maps)


class Objective:
    """The loss of one piece of a batch; `teacher` runs without gradients, in the same autocast as the student.

    Pixels are normalised for the student, by its `preprocessing`; the teacher gets them as it was trained.
    """

    def __init__(
        self,
        loss: SegmentationLoss,
        distillation: Distillation | None,
        teacher: nn.Module | None,
        autocast: Callable[[], AbstractContextManager[Any]],
        preprocessing: Preprocessing = IMAGENET,
    ) -> None:
        self.loss = loss
        self.distillation = distillation
        self.teacher = teacher
        self.autocast = autocast
        self.preprocessing = preprocessing

    def __call__(
        self, student: nn.Module, pixels: Tensor, labels: Tensor, num_labelled: Tensor
    ) -> Tensor:
        # `small` are the logits before upsampling, at a quarter of the image's size.
        logits, small, maps = student(pixels)
        value = self.loss(logits, labels, num_labelled)
        # Without a teacher the student returns neither small logits nor maps.
        if self.distillation is None:
            return value
        assert self.teacher is not None
        assert small is not None
        # The teacher runs in the student's precision, but keeps no graph in memory.
        theirs = renormalise(pixels, self.preprocessing, preprocessing_of(self.teacher))
        with torch.no_grad(), self.autocast():
            teacher_maps, teacher_small = self.teacher.parts(theirs)  # type: ignore[operator]
        return value + self.distillation(small, maps, teacher_small, teacher_maps)


def check_teacher(options: TrainOptions, teacher: nn.Module | None, student: nn.Module) -> None:
    """Raises ValueError for a teacher that the student cannot learn from, and for its weights without a teacher."""
    if teacher is None:
        check_distilled(options, False)
        return

    # The maps are taken with `parts`, which only our own networks have.
    for role, network in (("student", student), ("teacher", teacher)):
        if not hasattr(network, "parts"):
            name = type(network).__name__
            raise ValueError(
                f"The {role} is a {name}; distillation compares the maps of two SegFormers."
            )

    check_same_images(teacher.spec, student.spec)  # type: ignore[arg-type]
    # Distributions over unlike classes cannot be compared.
    theirs, ours = teacher.spec.num_classes, student.spec.num_classes  # type: ignore[union-attr]
    if theirs != ours:
        raise ValueError(
            f"The teacher has {theirs} classes and the student {ours}; give a teacher that was trained for the same "
            "classes."
        )


def check_same_images(teacher: Spec, student: Spec) -> None:
    """Raises ValueError for a teacher that takes images of other channels, or whose mean and deviation are unknown."""
    if teacher.in_channels != student.in_channels:
        raise ValueError(
            f"The teacher takes images of {teacher.in_channels} channels and the student of {student.in_channels}; "
            "give a teacher that was trained on the same images."
        )
    stated_preprocessing(teacher)


def check_distilled(options: TrainOptions, has_teacher: bool) -> None:
    """Raises ValueError for a weight of distillation without a teacher."""
    for name in ("distill_pixel", "distill_channel", "distill_feature"):
        if getattr(options, name) is not None and not has_teacher:
            raise ValueError(
                f"`{name}` has no effect without `teacher`; give the dense network to learn from."
            )
