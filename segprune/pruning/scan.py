"""Sensitivity: what a network loses when one kind of group, in one stage, is cut and nothing else.

Scans layer by layer as in "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710), here for sets of groups that a
plan treats alike. Nothing is repaired, so that what is measured is what the channels were worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from segprune.model import SegFormer
from segprune.pruning.groups import Group
from segprune.pruning.plan import keep_best
from segprune.pruning.pruner import Pruner
from segprune.pruning.surgery import cut
from segprune.pruning.trace import eval_mode

LOWEST, HIGHEST = (
    0.1,
    10.0,
)  # of a sensitivity: a scan is coarse, and one set must not decide everything


@dataclass(frozen=True)
class Finding:
    """The loss when every group of `names` gives the share `rate` of its channels."""

    part: str  # "stages.2 ffn", "head"
    names: tuple[str, ...]
    rate: float
    loss: float


def scan(
    model: SegFormer,
    measure: Callable[[SegFormer], float],
    rates: Sequence[float] = (0.25, 0.5, 0.75),
    *,
    pruner: Pruner | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """One finding per part and rate, `measure` of the cut network each; the model is left as it was.

    `pruner` says how channels are ranked and what is protected; by default an L1 pruner of the model.
    """
    pruner = pruner or Pruner(model)
    prepared = pruner.prepare()
    scores = pruner.score(prepared)
    parts = _parts(prepared.groups)

    findings = []
    for part, names in parts.items():
        for rate in rates:
            # Only this part's groups get narrower.
            widths = []
            for group in prepared.groups:
                narrower = max(1, round((1.0 - rate) * group.slots))
                widths.append(narrower if group.name in names else group.slots)

            # Cut, measured and thrown away; the prepared network is the same for every trial.
            network = cut(
                prepared, keep_best(prepared.groups, scores, np.array(widths, dtype=np.int64))
            )
            assert isinstance(network, SegFormer)
            findings.append(Finding(part, names, rate, measure(network)))
            if progress is not None:
                progress(len(findings), len(parts) * len(rates))
    return findings


def sensitivities(findings: Iterable[Finding]) -> dict[str, float]:
    """By group name: how much more than the average part the group's part loses, for `PruneOptions.sensitivity`.

    The mean loss over the rates, relative to the mean of all parts, within `LOWEST` and `HIGHEST`.
    """
    # A loss below zero is noise of the measure, and counts as none.
    by_part: dict[tuple[str, ...], list[float]] = {}
    for finding in findings:
        by_part.setdefault(finding.names, []).append(max(finding.loss, 0.0))

    means = {names: float(np.mean(losses)) for names, losses in by_part.items()}

    # If no part lost anything there is nothing to compare.
    average = float(np.mean(list(means.values())))
    if not average > 0.0:
        raise ValueError(
            "Nothing in the scan changed the network's output; scan higher rates or give other images."
        )

    factors: dict[str, float] = {}
    for names, loss in means.items():
        factors |= dict.fromkeys(names, min(max(loss / average, LOWEST), HIGHEST))
    return factors


def output_distance(dense: SegFormer, images: Sequence[Tensor]) -> Callable[[SegFormer], float]:
    """A measure without labels: the mean divergence (Kullback–Leibler, in nats per pixel) from the dense classes."""

    def logits(model: SegFormer, batch: Tensor) -> Tensor:
        with torch.inference_mode(), eval_mode(model):
            return F.log_softmax(model.parts(batch)[1], dim=1)  # B K H/4 W/4

    # The dense log-probabilities are the same for every trial, and are computed once.
    aims = [logits(dense, batch) for batch in images]
    total = sum(len(batch) for batch in images)

    def measure(model: SegFormer) -> float:
        distance = 0.0
        for batch, aim in zip(images, aims, strict=True):
            # KL(dense || cut) = sum over classes of p (log p − log q), averaged over
            # pixels; batches weigh by their number of images.
            divergence = (
                F.kl_div(logits(model, batch), aim, log_target=True, reduction="none")
                .sum(1)
                .mean()
            )
            distance += float(divergence) * len(batch) / total
        return distance

    return measure


def _parts(groups: Iterable[Group]) -> dict[str, tuple[str, ...]]:
    """Group names by stage and kind; the decode head is a part of its own."""
    parts: dict[str, tuple[str, ...]] = {}
    for group in groups:
        # "encoder.stages.2.blocks.0.mlp.ffn" is in part "stages.2 ffn".
        steps = group.name.removeprefix("encoder.").split(".")
        part = f"stages.{steps[1]} {group.kind}" if steps[0] == "stages" else "head"
        parts[part] = (*parts.get(part, ()), group.name)
    return dict(sorted(parts.items()))
