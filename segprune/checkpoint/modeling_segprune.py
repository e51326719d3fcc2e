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

        # Labels say how many classes there are; without any, the spec does.
        if spec is not None and not {"num_labels", "id2label"} & others.keys():
            others["num_labels"] = spec["num_classes"]
        super().__init__(**others)


class SegpruneForSemanticSegmentation(PreTrainedModel):
    """Normalised images B 3 H W in; logits B K H/4 W/4 out, as SegformerForSemanticSegmentation gives them."""

    config_class = SegpruneConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean per batch, which Trainer then averages

    def __init__(self, config: SegpruneConfig) -> None:
        super().__init__(config)
        if config.spec is None:
            raise ValueError(
                "This config has no spec, which says how wide the network is; load one with from_pretrained."
            )

        # `num_labels` given to from_pretrained asks for another number of classes.
        config.spec = {**config.spec, "num_classes": config.num_labels}
        self.network = SegFormer(spec_from_dict(config.spec))

        # Transformers asks for this call at the end of every constructor.
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Draws a new classifier where the file's has other classes; all else comes from the file."""
        classifier = self.network.decode_head.classifier
        if module is classifier and classifier.bias is not None:
            for tensor, std in ((classifier.weight, 0.01), (classifier.bias, 0.0)):
                if not getattr(tensor, "_is_hf_initialized", False):
                    torch.nn.init.normal_(tensor, std=std)

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **others: Any) -> None:
        self.network.encoder.checkpointing = enable
        self.gradient_checkpointing = enable  # what transformers asks for

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> SemanticSegmenterOutput | tuple[Tensor, ...]:
        """`labels` B H W: classes per pixel, for the loss at their size. Hidden states are the encoder's four maps."""
        maps, logits = self.network.parts(pixel_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden = tuple(maps) if output_hidden_states else None
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
            values: tuple[Any, ...] = (loss, logits, hidden)
            return tuple(value for value in values if value is not None)
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=hidden)
