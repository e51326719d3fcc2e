"""The network as it is exported: folded, with preprocessing and argmax built in on request."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segprune.data.transforms import order_channels
from segprune.fold import fold_for_inference
from segprune.model import SegFormer
from segprune.spec import preprocessing_of, preprocessing_of_drawn

MAX_CLASSES = 256  # that a uint8 class map can tell apart


class Deployed(nn.Module):
    """Computes what the file returns from what it takes; see `Manifest`. Logits have the input's size."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: SegFormer,
        *,
        preprocess: bool = False,
        argmax: bool = False,
        argmax_quarter: bool = False,
    ) -> None:
        super().__init__()
        # Class 256 would become 0 in a byte, without an error.
        if (argmax or argmax_quarter) and model.spec.num_classes > MAX_CLASSES:
            raise ValueError(
                f"The network has {model.spec.num_classes} classes, where a class map can hold {MAX_CLASSES}; "
                "leave argmax out of `bake`."
            )

        self.preprocess, self.argmax = preprocess, argmax
        self.argmax_quarter = argmax_quarter
        self.network = fold_for_inference(model).cpu()
        # As buffers they move with the network to its device.
        # Without it, what is done here is done to generated images alone.
        self.preprocessing = (
            preprocessing_of(model) if preprocess else preprocessing_of_drawn(model.spec)
        )
        mean, std = torch.tensor(self.preprocessing.mean), torch.tensor(self.preprocessing.std)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.preprocess:
            x = order_channels(x, self.preprocessing)
            x = ((x.float() - self.mean) / self.std).permute(
                0, 3, 1, 2
            )  # B H W C uint8 -> B C H W

        # Classes by way of float, since TensorRT makes uint8 of floats alone.
        if self.argmax_quarter:
            logits = self.network.parts(x)[1]  # B K H/4 W/4
            classes = logits.argmax(1, keepdim=True).float()
            size = x.shape[2:]
            return F.interpolate(classes, size=size, mode="nearest")[:, 0].to(torch.uint8)

        logits = self.network(x)  # B K H W
        if not self.argmax:
            return logits

        return logits.argmax(1).float().to(torch.uint8)
