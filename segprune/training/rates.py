"""The learning rates that a run takes if none were given, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from segprune.training.options import PRETRAINED_LR, TrainOptions
from segprune.training.schedule import voc_lr

SCRATCH_LR = 1e-3  # measured on the generated data
BACKBONE_HEAD_LR = 10.0  # the paper's, for a new decode head on a trained encoder
VOC_LR = {"adamw": 1e-4, "sgd": 1e-2}  # what the VOC scripts start from
MUCH_LOST = 0.9  # of the mIoU still there; see docs/log.md


def choose_rates(
    options: TrainOptions,
    extra: Mapping[str, Any],
    *,
    from_scratch: bool = False,
    backbone_only: bool = False,
) -> tuple[TrainOptions, str]:
    """Returns the options with `lr` and `head_lr` set, and one sentence that says why the rate is that.

    `extra` is what the checkpoint to start from says of its own training.
    """
    # A decode head that starts from random weights takes larger steps than its encoder.
    head_lr = options.head_lr
    if head_lr is None:
        head_lr = BACKBONE_HEAD_LR if backbone_only else 1.0

    lr, reason = _choose_lr(options, extra, from_scratch)
    return replace(options, lr=lr, head_lr=head_lr), f"Learning rate {lr:g}: {reason}"


def _choose_lr(
    options: TrainOptions, extra: Mapping[str, Any], from_scratch: bool
) -> tuple[float, str]:
    # The rule overrides all else: a given rate counts as one for 16 images.
    if options.lr_rule == "voc":
        wanted = VOC_LR[options.optimizer] if options.lr is None else options.lr
        lr = voc_lr(wanted, options.batch_size, options.optimizer)
        return lr, (
            f"{wanted:g} for 16 images a step, times {options.batch_size} / 16, within the limits of the VOC scripts "
            f"for {options.optimizer}."
        )

    # From the surest source to the weakest: the user, the start, the file, the paper.
    if options.lr is not None:
        return options.lr, "as given."
    if from_scratch:
        return SCRATCH_LR, "from scratch, no `lr` was given."
    # A network that is trained needs smaller steps than it was trained with.
    if "lr" in extra:
        return float(extra["lr"]) / 10, "a tenth of what the network was trained with."
    if "finetuned_lr" in extra:
        return float(extra["finetuned_lr"]), "what the network was fine-tuned with before."
    return PRETRAINED_LR, "the paper's, since the file does not say what it was trained with."


def advise_rate(before: float, after: float, lr: float) -> tuple[str, ...]:
    """Returns a note if pruning took more of the mIoU than `lr`, a tenth of the original rate, brings back."""
    if after >= MUCH_LOST * before:
        return ()
    kept = after / max(before, 1e-9)
    return (
        f"The cut network keeps {kept:.0%} of the dense mIoU. Where so much is lost, the original learning rate brings "
        f"more of it back than the tenth taken here; `lr` {10 * lr:g} is worth a try.",
    )
