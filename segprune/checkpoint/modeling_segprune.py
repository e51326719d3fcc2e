"""SegFormers of any widths for transformers' Auto classes: the classes that go with a Hugging Face folder.

Imported only by who asks for them, since transformers is not needed elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from segprune.model import SegFormer
from segprune.spec import spec_from_dict


class SegpruneConfig(PretrainedConfig):
    """`spec` is segprune's, as plain data: every width of every block, and the numerics."""

    model_type = "segprune"

    def __init__(
        self,
        spec: dict[str, Any] | None = None,
        semantic_loss_ignore_index: int = 255,
        **others: Any,
    ) -> None:
        self.spec = spec
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**others)


class SegpruneForSemanticSegmentation(PreTrainedModel):
    """Normalised images B 3 H W in; logits B K H/4 W/4 out, as SegformerForSemanticSegmentation gives them."""

    config_class = SegpruneConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"

    def __init__(self, config: SegpruneConfig) -> None:
        super().__init__(config)
        if config.spec is None:
            raise ValueError(
                "This config has no spec, which says how wide the network is; load one with from_pretrained."
            )
        self.network = SegFormer(spec_from_dict(config.spec))

        # Transformers asks for this call at the end of every constructor.
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: the network does that itself."""

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> SemanticSegmenterOutput | tuple[Tensor, ...]:
        """`labels` B H W: classes per pixel, for the loss at their size."""
        logits = self.network.parts(pixel_values)[1]
        loss = None
        if labels is not None:
            # The loss is taken at the labels' size, while the
            # logits returned are a quarter of the image's.
            whole = self.network.resize(logits, labels.shape[-2:])
            loss = F.cross_entropy(
                whole, labels, ignore_index=self.config.semantic_loss_ignore_index
            )

        # Transformers' convention: a tuple, the loss first.
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SemanticSegmenterOutput(loss=loss, logits=logits)
