"""What a network is trained against: losses on logits B K H W and labels B H W, and weights of the classes.

| name | loss | source |
|---|---|---|
| ce | cross-entropy | |
| focal | cross-entropy times (1 − p)², p being the label's probability | arXiv 1708.02002 |
| ohem | cross-entropy of each image's hard pixels | arXiv 1604.03540 |
| dice | 1 − Dice coefficient, soft | arXiv 1707.03237 |
| lovasz | Lovász extension of 1 − IoU | arXiv 1705.08790 |

Labels of 255 are ignored by all. Class weights enter ce, focal and ohem; label smoothing (arXiv 1512.00567) ce and
ohem. Dice and lovasz are taken per image over the classes that its labels hold, then averaged over the images.

Shards, the processes or micro-batches of one step, are exact: with equal numbers of images in each and `num_labelled`
the labelled pixels of all shards divided by the number of shards, the mean of the shards' losses is the loss of the
whole batch. ce, focal and ohem need `num_labelled` for that; dice and lovasz, being means over images, do not.

Memory: one float32 copy of the logits (their log-softmax) serves all terms and the backward pass; dice keeps a second,
lovasz two of those rows whose class the image holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from segprune.data import IGNORE_INDEX

LOSSES: tuple[str, ...] = ("ce", "dice", "focal", "lovasz", "ohem")
WeightRule = Literal["enet", "median"]
WEIGHT_RULES: tuple[WeightRule, ...] = ("enet", "median")

_WEIGHED, _SMOOTHED = {"ce", "focal", "ohem"}, {"ce", "ohem"}
_OHEM_PROBABILITY, _OHEM_SHARE = (
    0.7,
    1 / 16,
)  # as is usual for segmentation, for example with BiSeNet


def parse_loss(text: str) -> tuple[tuple[str, float], ...]:
    """Terms and their weights.

    >>> parse_loss("ohem + 0.5*lovasz")
    (('ohem', 1.0), ('lovasz', 0.5))
    """
    terms: dict[str, float] = {}
    # A term is NAME or NUMBER*NAME; without a star rpartition leaves the number empty.
    for part in text.split("+"):
        number, star, name = part.rpartition("*")
        name = name.strip()
        if name not in LOSSES:
            allowed = ", ".join(LOSSES)
            raise ValueError(
                f"Loss {name!r} in {text!r} is unknown; add up {allowed}, as in ce+0.5*lovasz."
            )
        if name in terms:
            raise ValueError(
                f"Loss {text!r} names {name} twice; name each once, with its weight, as in 2*{name}."
            )
        terms[name] = _weight(number.strip(), text) if star else 1.0
    return tuple(terms.items())


def _weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(
            f"Weight {number!r} in loss {text!r} is no number above 0; write it as in ce+0.5*lovasz."
        )
    return weight


@dataclass(frozen=True)
class SegmentationLoss:
    """The weighted sum of `terms`, as `parse_loss` gives them; `class_weights` are one per class, at least 0.

    Pixel means divide by the number of labelled pixels, not by the sum of their weights as torch does: so shards add
    up, and a weight means the same in every batch. ValueError for settings that none of the terms would heed.
    """

    terms: tuple[tuple[str, float], ...] = (("ce", 1.0),)
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        # An option that no term uses would be ignored in silence, so it is refused.
        names = {name for name, _ in self.terms}
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"`label_smoothing` is {self.label_smoothing}; it is a share, from 0 to below 1."
            )
        if self.label_smoothing and not names & _SMOOTHED:
            raise ValueError(
                f"`label_smoothing` has no effect on {' + '.join(sorted(names))}; set it to 0 or add ce."
            )
        if self.class_weights is None:
            return

        if not names & _WEIGHED:
            raise ValueError(
                f"`class_weights` has no effect on {' + '.join(sorted(names))}; drop them or add ce."
            )
        # With all weights 0 the loss would be 0 and nothing would be learnt.
        if not all(0 <= weight < math.inf for weight in self.class_weights) or not any(
            self.class_weights
        ):
            given = ", ".join(f"{weight:g}" for weight in self.class_weights)
            raise ValueError(
                f"`class_weights` is {given}; each must be 0 or above, and not all 0."
            )

    def __call__(
        self, logits: Tensor, labels: Tensor, num_labelled: Tensor | None = None
    ) -> Tensor:
        """Returns a scalar float32 (float64 for float64 logits), under autocast too; 0 if no pixel is labelled.

        Pixel means divide by `num_labelled` instead of this batch's own count, if it is given: see the module.
        """
        # Surplus weights would pass unseen, missing ones end in an index error.
        if self.class_weights is not None and len(self.class_weights) != logits.shape[1]:
            given, classes = len(self.class_weights), logits.shape[1]
            raise ValueError(
                f"{given} class weights came for {classes} classes; give one per class."
            )

        # With `num_labelled` the sums of all shards are divided by one common number.
        labelled = labels != IGNORE_INDEX
        num = labelled.sum() if num_labelled is None else num_labelled
        num = torch.where(num > 0, num, 1)  # without labels the sums are 0 already

        # Autocast off: all that follows keeps the dtype that log_softmax is given here.
        with torch.autocast(logits.device.type, enabled=False):
            log_p = F.log_softmax(
                logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32)
            )
            # All terms share the log-softmax, B K H W, and the labels' own −log p, B H W, which is 0 if ignored.
            nll = F.nll_loss(log_p, labels, ignore_index=IGNORE_INDEX, reduction="none")
            weights = (
                None if self.class_weights is None else log_p.new_tensor(self.class_weights)
            )

            # Overlap losses are means over images already; the others are sums over pixels.
            values: list[Tensor] = []
            for name, factor in self.terms:
                if name == "dice":
                    value = dice(log_p, nll, labels)
                elif name == "lovasz":
                    value = lovasz(log_p, labels)
                elif name == "focal":
                    value = _weighted(focal(nll), labels, weights).sum() / num
                else:
                    losses = cross_entropy(log_p, nll, labels, weights, self.label_smoothing)
                    value = (losses.sum() if name == "ce" else ohem(losses, nll, labels)) / num
                values.append(factor * value)

            return torch.stack(values).sum()


def _weighted(losses: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return losses
    return (
        losses * weights[labels.masked_fill(labels == IGNORE_INDEX, 0)]
    )  # ignored pixels have no loss anyway


def cross_entropy(
    log_p: Tensor, nll: Tensor, labels: Tensor, weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """Returns −log p of the label per pixel, B H W, with a share of it spread over all classes; 0 where ignored."""
    # Smoothed: (1 − s) · loss of the label + s · mean loss over all K classes.
    losses = _weighted(nll, labels, weights)
    if label_smoothing == 0:
        return losses

    # Each class keeps its weight when it is part of the smoothed target.
    spread = log_p if weights is None else log_p * weights[:, None, None]
    uniform = -spread.mean(1).masked_fill(labels == IGNORE_INDEX, 0)
    return (1 - label_smoothing) * losses + label_smoothing * uniform


def focal(nll: Tensor) -> Tensor:
    """Returns (1 − p)² · −log p per pixel, shaped as `nll`; the power 2 is the paper's choice."""
    return (-torch.expm1(-nll)) ** 2 * nll


def ohem(losses: Tensor, nll: Tensor, labels: Tensor) -> Tensor:
    """Returns the sum over the images of (labelled pixels × mean loss of the hard ones).

    Divided by all labelled pixels it is a mean. A pixel is hard if its label has a probability below
    `_OHEM_PROBABILITY`; at least the hardest `_OHEM_SHARE` of an image's labelled pixels are taken. Hard pixels are
    chosen image by image, so shards choose what the whole batch would.
    """
    nll = (
        nll.detach().masked_fill(labels == IGNORE_INDEX, -1).flatten(1)
    )  # B P; ignored pixels are the easiest
    num_labelled = (nll >= 0).sum(1)

    # The loss that the easiest of the hardest few has.
    num_least = (num_labelled * _OHEM_SHARE).ceil().long()
    hardest_first = nll.sort(dim=1, descending=True).values
    at_least = hardest_first.gather(1, (num_least - 1).clamp(min=0)[:, None])

    # Hard: the label's probability below the threshold, or among the hardest few. With ties
    # a few more are taken, which keeps the choice independent of the order of the pixels.
    hard = (nll >= 0) & ((nll > -math.log(_OHEM_PROBABILITY)) | (nll >= at_least))
    # Each image counts by all its labelled pixels, however few of them are hard.
    mean = (losses.flatten(1) * hard).sum(1) / hard.sum(1).clamp(min=1)
    return (mean * num_labelled).sum()


def dice(log_p: Tensor, nll: Tensor, labels: Tensor) -> Tensor:
    """Returns 1 − 2 Σ p·t / (Σ p + Σ t), mean over an image's own classes, then over images; unlabelled ones as 0."""
    batch, classes = log_p.shape[:2]
    labelled = labels != IGNORE_INDEX

    # Count pixels and probabilities by class; ignored pixels go into one bin more, which is dropped.
    index = torch.where(labelled, labels, classes).flatten(1)  # B P
    empty = log_p.new_zeros(batch, classes + 1)
    truth = empty.scatter_add(1, index, torch.ones_like(nll).flatten(1))[:, :classes]  # B K
    common = empty.scatter_add(1, index, torch.exp(-nll).flatten(1))[:, :classes]
    predicted = (log_p.exp() * labelled[:, None]).sum((2, 3))  # B K

    # An absent class has loss 1 whatever is predicted, so only present ones are averaged.
    present = truth > 0
    loss = torch.where(present, 1 - 2 * common / (predicted + truth).clamp(min=1), 0)
    return (loss.sum(1) / present.sum(1).clamp(min=1)).mean()


def lovasz(log_p: Tensor, labels: Tensor) -> Tensor:
    """Returns the Lovász-softmax, mean over an image's own classes, then over all images, unlabelled ones as 0."""
    pairs = zip(log_p.flatten(2).unbind(), labels.flatten(1).unbind(), strict=True)
    return torch.stack([_lovasz_of_image(one, truth) for one, truth in pairs]).mean()


def _lovasz_of_image(log_p: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of `log_p` K P and `labels` P; 0, with a gradient of 0, if all labels are ignored."""
    present = labels.unique()
    present = present[present != IGNORE_INDEX]  # C of the K classes
    # Rows of absent classes are left out: they have no intersection to lose.
    p = log_p[present].exp()  # C P
    truth = labels == present[:, None]
    errors = torch.where(truth, 1 - p, p)
    # The order of the errors is a constant for the gradient, as in the paper.
    steps = _jaccard_steps(errors.detach(), truth, labels == IGNORE_INDEX)
    return (errors * steps).sum() / max(len(present), 1)


def _jaccard_steps(errors: Tensor, truth: Tensor, ignored: Tensor) -> Tensor:
    """Returns by how much the Jaccard loss of each row rises when, worst pixel first, this pixel is also wrong; C P.

    The paper takes differences of the cumulated loss; in closed form they lose no digits: a pixel of the class
    lowers the intersection by 1, any other raises the union by 1.
    """
    # Worst pixel first, since the Lovász extension is linear within one order.
    order = errors.masked_fill(ignored, -1).argsort(
        dim=1, descending=True
    )  # ignored pixels last
    positive = truth.gather(1, order)

    # What is left of the intersection, and what the union has become, once the pixels so far are wrong.
    total = positive.sum(1, keepdim=True)
    intersection = (total - positive.cumsum(1)).to(errors.dtype)
    union = (total + (~positive).cumsum(1)).to(errors.dtype)

    # Each step is J(with this pixel wrong) − J(before), for J = 1 − intersection / union.
    steps = torch.where(positive, 1, intersection / (union - 1)) / union
    # Bring the steps back into the order of the pixels, and keep ignored ones out.
    return torch.empty_like(errors).scatter_(1, order, steps).masked_fill_(ignored, 0)


def parse_class_weights(value: str | Sequence[float]) -> WeightRule | tuple[float, ...] | None:
    """Returns None for none, a rule's name, or the numbers, one per class.

    >>> parse_class_weights("1, 2 0.5")
    (1.0, 2.0, 0.5)
    """
    # Numbers from Python are taken as they are; `or None` says that none were given.
    if not isinstance(value, str):
        return tuple(value) or None
    for rule in WEIGHT_RULES:
        if value == rule:
            return rule
    try:
        return tuple(float(word) for word in value.replace(",", " ").split()) or None
    except ValueError as error:
        rules = ", ".join(WEIGHT_RULES)
        raise ValueError(
            f"`class_weights` is {value!r}; give {rules}, or one number per class: 1,2,0.5."
        ) from error


def compute_class_weights(
    value: str | Sequence[float], pixels: Sequence[int]
) -> tuple[float, ...]:
    """Returns the weights, those of a rule computed from each class's number of pixels; () for none.

    ValueError unless there is one per class.
    """
    weights = parse_class_weights(value)
    if isinstance(weights, str):
        return class_weights_from_counts(pixels, weights)
    if weights and len(weights) != len(pixels):
        raise ValueError(
            f"`class_weights` has {len(weights)} numbers for {len(pixels)} classes; give one per class."
        )
    return weights or ()


def class_weights_from_counts(pixels: Sequence[int], rule: WeightRule) -> tuple[float, ...]:
    """Returns weights that raise rare classes, from each class's number of pixels, as the label check counts them.

    With p a class's share of all pixels, "enet" is 1 / ln(1.02 + p) (arXiv 1606.02147), which bounds the ratio of two
    weights by 36; "median" is median(p) / p (arXiv 1411.4734, there with shares of the images that hold the class),
    which gives every class the same say. Both are scaled so that the mean weight of a pixel is 1, and with it
    learning rates keep their meaning. A class without pixels gets 0: it is in no label, and smoothed labels should
    not pull towards it. ValueError for another rule, and if no class has a pixel.

    >>> [round(w, 3) for w in class_weights_from_counts([750, 250, 0], "median")]
    [0.667, 2.0, 0.0]
    """
    if rule not in WEIGHT_RULES:
        raise ValueError(
            f"Rule {rule!r} for class weights is unknown; choose one of {', '.join(WEIGHT_RULES)}."
        )
    total = sum(pixels)
    if total == 0:
        raise ValueError(
            "No class has a labelled pixel, so classes cannot be weighed; check the masks' values."
        )

    # Rare classes weigh more; the factor that all of a rule's weights share falls out below.
    shares = [count / total for count in pixels]
    raw = []
    for p in shares:
        if p == 0:
            raw.append(0.0)
        else:
            raw.append(
                1 / math.log(1.02 + p) if rule == "enet" else 1 / p
            )  # the median falls out with the mean

    # A pixel is of a class with probability p, so Σ p · weight is a pixel's mean weight.
    mean = sum(p * weight for p, weight in zip(shares, raw, strict=True))
    return tuple(weight / mean for weight in raw)
