"""Distillation: what a pruned network, the student, learns from the dense one, its teacher.

Three losses, each a mean over the images of the batch, so that equal shards of it average to the whole:

- per pixel, the divergence of the softened class probabilities (arXiv 1503.02531);
- per channel, the divergence of the softened distributions over the positions (arXiv 2011.13256);
- per stage, one minus the correlation of the two feature vectors at each position.

No labels are needed: pixels that the labels ignore, padding too, are learnt from the teacher like any other. Logits
are B K h w at the resolution that both networks give them, for this decode head a quarter of the image's; the pixel
loss hardly depends on it. All is computed in float32, under autocast too, and no gradient reaches the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pixel_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns KL(teacher, student) over the classes, mean over all pixels, times temperature²: gradients keep size."""
    pixels = student.numel() // student.shape[1]
    return _divergence(student, teacher, temperature, dim=1) / pixels


def channel_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns KL(teacher, student) over the positions of each class's map, mean over classes, times temperature²."""
    maps = student.shape[0] * student.shape[1]
    return _divergence(student.flatten(2), teacher.flatten(2), temperature, dim=2) / maps


def _divergence(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    # kl_div computes KL(target, input), hence the teacher, p, as the target.
    log_q, log_p = (F.log_softmax(x.float() / temperature, dim) for x in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean over positions of 1 − r, r being the correlation over the channels of two maps B C h w.

    It ranges from 0 to 2 and is half the squared distance of the vectors normalised without gain and bias, as arXiv
    2205.14141 does for the teacher's: so one weight suits teachers and stages of any magnitude. Correlation as the
    measure is that of arXiv 2207.02039.
    """
    # Channels last, so that each position is one vector of C numbers to normalise.
    one, other = (x.float().movedim(1, -1) for x in (student, teacher))  # B h w C
    one, other = (F.layer_norm(x, x.shape[-1:], eps=1e-8) for x in (one, other))
    # For vectors of mean 0 and variance 1, mean squared distance = 2 (1 − r).
    return F.mse_loss(one, other) / 2


class Projections(nn.Module):
    """Learned 1×1 convolutions from the student's stage widths to the teacher's; not kept after training.

    They start as the identity if the widths agree, else with orthogonal columns or rows.
    """

    def __init__(self, student_widths: Sequence[int], teacher_widths: Sequence[int]) -> None:
        super().__init__()
        # zip would say only that two sequences differ in length.
        if len(student_widths) != len(teacher_widths):
            ours, theirs = len(student_widths), len(teacher_widths)
            raise ValueError(
                f"The student has {ours} stages, the teacher {theirs}; their maps must come in pairs."
            )
        pairs = zip(student_widths, teacher_widths, strict=True)
        self.stages = nn.ModuleList(_projection(ours, theirs) for ours, theirs in pairs)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Returns the student's maps, B C_s h w each, in the teacher's widths."""
        return [convolution(x) for convolution, x in zip(self.stages, maps, strict=True)]


def _projection(student_width: int, teacher_width: int) -> nn.Conv2d:
    convolution = nn.Conv2d(student_width, teacher_width, 1)
    # The identity leaves the features as they were trained; between unlike widths
    # orthogonal columns or rows stretch no direction.
    start = nn.init.dirac_ if student_width == teacher_width else nn.init.orthogonal_
    start(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution


@dataclass(frozen=True)
class Distillation:
    """Weights and temperatures of the three losses; a loss of weight 0 is not computed.

    Defaults: the channels' temperature 4 is arXiv 2011.13256's; its weight 3 held short fine-tuning back and 0.3
    helped most (docs/log.md). Pixels at temperature 1 and weight 1 act as one more label of each pixel beside a
    cross-entropy of weight 1.
    """

    pixel: float = 1.0
    pixel_temperature: float = 1.0
    channel: float = 0.3
    channel_temperature: float = 4.0
    feature: float = 1.0  # of the mean over the stages

    def __post_init__(self) -> None:
        # `< inf` is False for NaN too, so NaN is refused with the infinite weights.
        for name in ("pixel", "channel", "feature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"The {name} weight is {getattr(self, name)}; it must be 0, to switch off, or above."
                )
        # Without any loss the teacher would run in every step for nothing.
        if not self.pixel and not self.channel and not self.feature:
            raise ValueError(
                "All weights of distillation are 0; raise one of pixel, channel, feature or drop the teacher."
            )
        for name in ("pixel_temperature", "channel_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")

    def __call__(
        self,
        student_logits: Tensor,
        student_maps: Sequence[Tensor] | None,
        teacher_logits: Tensor,
        teacher_maps: Sequence[Tensor] | None,
    ) -> Tensor:
        """Returns a scalar float32 from logits B K h w and the stages' maps, the student's in the teacher's widths.

        Maps may be None if the feature weight is 0. ValueError for logits or maps of different shapes.
        """
        # Shapes that differ but broadcast would give a wrong loss without an error.
        _check_alike("logits", student_logits, teacher_logits)
        loss = student_logits.new_zeros((), dtype=torch.float32)

        # Autocast off, so that nothing below is silently computed in half precision.
        with torch.autocast(student_logits.device.type, enabled=False):
            teacher = teacher_logits.detach()
            if self.pixel:
                loss = loss + self.pixel * pixel_divergence(
                    student_logits, teacher, self.pixel_temperature
                )
            if self.channel:
                loss = loss + self.channel * channel_divergence(
                    student_logits, teacher, self.channel_temperature
                )
            if self.feature:
                loss = loss + self.feature * _mean_distance(student_maps, teacher_maps)
        return loss


def _mean_distance(
    student_maps: Sequence[Tensor] | None, teacher_maps: Sequence[Tensor] | None
) -> Tensor:
    # The caller gives maps whenever the feature weight is above 0.
    assert student_maps is not None
    assert teacher_maps is not None
    distances = []
    for stage, (ours, theirs) in enumerate(
        zip(student_maps, teacher_maps, strict=True), start=1
    ):
        # The projections have made the widths equal, so only the strides can still differ.
        _check_alike(f"maps of stage {stage}", ours, theirs)
        distances.append(feature_distance(ours, theirs.detach()))
    return torch.stack(distances).mean()


def _check_alike(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        ours, theirs = tuple(student.shape), tuple(teacher.shape)
        remedy = "choose a teacher of the same classes and strides"
        raise ValueError(
            f"The student's {what} have shape {ours}, the teacher's {theirs}; {remedy}."
        )
