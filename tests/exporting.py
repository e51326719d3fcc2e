"""A network that exports in seconds: one block a stage, of which two lack a part; keys from coarser maps.

No two widths are equal that need not be. Exporters take as long as a graph has nodes, whatever the widths.
"""

import torch

from benchmarks.trained_like import fill
from segprune.model import SegFormer
from segprune.spec import BlockSpec, Numerics, Spec, StageSpec

STAGES = (
    StageSpec(16, 7, 4, 8, (BlockSpec(1, 16, 12, 40, 14, 0.25, 2),)),
    StageSpec(24, 3, 2, 4, (BlockSpec(2, 12, 10, 64, 20, 0.2).without_ffn(),)),
    StageSpec(40, 3, 2, 2, (BlockSpec(4, 10, 8, 96, 36, 0.35).without_attention(),)),
    StageSpec(48, 3, 2, 1, (BlockSpec(4, 12, 14, 128, None, 0.3, 2),)),
)


def tiny_network(num_classes: int = 5) -> SegFormer:
    torch.manual_seed(17)  # with which several classes occur
    spec = Spec("b0", num_classes, STAGES, (32, 28, 36, 30), 44, Numerics())
    model = fill(SegFormer(spec).eval())
    assert isinstance(model, SegFormer)
    return model
