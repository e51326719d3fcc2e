"""The options of one training run: every dial once, with its default, its help and its check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from segprune.machine import AMPS, Amp, fit_to_machine
from segprune.options import option
from segprune.training.distill import Distillation
from segprune.training.losses import LOSSES, SegmentationLoss, parse_class_weights, parse_loss
from segprune.training.optim import OPTIMIZERS, OptimizerName
from segprune.training.schedule import DECAYS, Decay, Schedule, voc_schedule

PRETRAINED_LR = 6e-5  # the paper's (arXiv 2105.15203)


@dataclass(frozen=True)
class TrainOptions:
    """One run. Sizes are H, W in pixels.

    None means "not given": `machine.fit_to_machine` chooses for the device, `rates.choose_rates` chooses the learning
    rates, and the rest takes the default that its help names. `batch_size` counts the images of one step, over all
    processes and over the `accumulate` pieces in which each process takes its share one after another.
    """

    num_classes: int | None = option(
        None,
        "Background included; read off the checkpoint if there is one, else 8.",
        panel="The network",
    )
    input_shape: tuple[int, int] = option(
        (512, 512), "Size of the crops trained on, and of scoring.", metavar="H W"
    )

    epochs: int = option(50, "Passes over the training images.", panel="How long")
    batch_size: int = option(8, "Images per step, over all processes.")
    accumulate: int = option(
        1, "Take each batch in this many pieces, one after another, to save memory."
    )

    distill_pixel: float | None = option(
        None,
        "Weight of the classes' probabilities at each pixel; 1 if not given, 0: off.",
        panel="Learning from a teacher",
    )
    distill_channel: float | None = option(
        None, "Weight of where each class is seen; 0.3 if not given, 0: off."
    )
    distill_feature: float | None = option(
        None, "Weight of the four stages' features; 1 if not given, 0: off."
    )

    loss: str = option(
        "ce", f"Sum of {', '.join(LOSSES)}, for example ce+0.5*dice.", panel="Loss"
    )
    class_weights: str | tuple[float, ...] = option(
        "",
        "One number per class, or computed from the data: enet (1/ln) or median (frequency).",
    )
    label_smoothing: float = option(0.0, "Share of each label that is spread over all classes.")

    optimizer: OptimizerName = option(
        "adamw", "adamw or sgd.", panel="Optimiser and learning rate"
    )
    lr: float | None = option(
        None,
        "Highest learning rate. If not given: 1e-3 from scratch, 6e-5 from a checkpoint, a tenth of the rate that a "
        "file of ours was trained with from scratch, or else what it was fine-tuned with.",
    )
    lr_rule: Literal["", "voc"] = option(
        "",
        "voc: as the VOC scripts do, `lr` (if not given 1e-4, for sgd 1e-2) times batch size / 16, clipped; cosine "
        "decay.",
    )
    head_lr: float | None = option(
        None,
        "Rate of the decode head, as a multiple of `lr`; 1 if not given, 10 on a bare backbone, as published.",
    )
    weight_decay: float = option(0.01, "Biases and normalisations have none.")
    momentum: float = option(0.9, "Of SGD; AdamW's first beta.")
    decay: Decay | None = option(
        None, "How the learning rate falls: poly (if not given), cosine or constant."
    )
    warmup: float | None = option(
        None, "Share of all steps in which the learning rate rises; 0.05 if not given."
    )
    clip_norm: float = option(0.0, "Clip the gradients' norm to it; 0: off.")
    ema: float = option(
        0.0, "Score and save a moving average of the weights with this decay; 0: off."
    )
    freeze_epochs: int = option(0, "Train only the decode head in this many first epochs.")

    scale: tuple[float, float] = option(
        (0.5, 2.0),
        "Random resizing before the crop.",
        metavar="LOW HIGH",
        panel="Augmentation and regularisation",
    )

    checkpointing: bool = option(
        False, "Compute the blocks twice to keep less in memory.", panel="Memory and speed"
    )
    compile: bool = option(False, "Compile the network first (torch.compile).")
    amp: Amp = option(
        "auto",
        "Mixed precision: no, fp16, bf16 or auto, which is what the GPU has, and on a CPU no.",
    )
    tf32: bool | None = option(
        None,
        "Take float32 products in TF32 while training on a GPU; if not given, where the GPU can.",
    )

    eval_every: int = option(
        1, "Epochs between two scores on the val list.", panel="What is saved, and when"
    )
    save_steps: int = option(
        0, "Also save the state for `resume` every this many steps; 0: after epochs only."
    )

    num_workers: int | None = option(
        None,
        "Processes that load images; if not given, as many as cores, 8 at most.",
        panel="The run",
    )
    seed: int = option(11, "Of weights, order and augmentation.")

    def __post_init__(self) -> None:
        # Words, each one of a few.
        for name, words in (
            ("optimizer", OPTIMIZERS),
            ("lr_rule", ("", "voc")),
            ("decay", (None, *DECAYS)),
            ("amp", AMPS),
        ):
            value = getattr(self, name)
            if value not in words:
                raise ValueError(
                    f"`{name}` is {value!r}; choose one of {', '.join(filter(None, words))}."
                )

        # None means "not given" and is settled later; NaN fails all comparisons below.
        for name in ("epochs", "batch_size", "accumulate", "lr", "head_lr", "eval_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` is {value}; it must be above 0.")
        for name in (
            "weight_decay",
            "clip_norm",
            "freeze_epochs",
            "save_steps",
            "num_workers",
            "seed",
        ):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` is {value}; it must be 0 or above.")
        for name in ("warmup", "ema", "momentum", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}` is {value}; it must be a share from 0 to below 1.")

        # The rule fixes the whole schedule, so a second setting of it would be ignored.
        if self.lr_rule:
            for name in ("decay", "warmup"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` has no effect with `lr_rule` {self.lr_rule}, which sets it; drop one."
                    )
        # Build what is built of these options later, so that its own checks speak now.
        self.distillation()
        weights = parse_class_weights(self.class_weights)
        if isinstance(weights, str):
            weights = (1.0,)  # for the check: the true ones are computed from the data
        SegmentationLoss(parse_loss(self.loss), weights, self.label_smoothing)

    def segmentation_loss(self) -> SegmentationLoss:
        """Returns the loss; class weights that come from the data must have been computed."""
        weights = parse_class_weights(self.class_weights)
        if isinstance(weights, str):
            raise ValueError(
                f"`class_weights` is {weights!r}, which needs the data's pixel counts; give the numbers."
            )
        return SegmentationLoss(parse_loss(self.loss), weights, self.label_smoothing)

    def distillation(self) -> Distillation:
        """Returns the weights of learning from a teacher."""
        given = {
            "pixel": self.distill_pixel,
            "channel": self.distill_channel,
            "feature": self.distill_feature,
        }
        return Distillation(
            **{name: weight for name, weight in given.items() if weight is not None}
        )

    def schedule(self) -> Schedule:
        """Returns how the learning rate moves over the run."""
        if self.lr_rule == "voc":
            return voc_schedule(self.epochs)
        return Schedule(
            "poly" if self.decay is None else self.decay,
            0.05 if self.warmup is None else self.warmup,
        )


def complete(options: TrainOptions, device: torch.device) -> TrainOptions:
    """Returns the options with a value for everything that a run needs and that was neither given nor chosen."""
    if options.num_classes is None:
        raise ValueError("`num_classes` is not given; say how many classes the network has.")

    # What depends on the machine is chosen here, once, and then saved with the run.
    options, _ = fit_to_machine(options, device)
    lr = PRETRAINED_LR if options.lr is None else options.lr
    return replace(options, lr=lr, head_lr=1.0 if options.head_lr is None else options.head_lr)
