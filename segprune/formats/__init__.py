"""A checkpoint in the formats of other tools: Hugging Face folders, and NVlabs', bubbliiiing's and mmseg's files.

Weights are rewritten so that the other tool's numerics give the same logits (uniform.py); what its classes cannot
hold is refused by name, or, in a Hugging Face folder, goes with code of its own. What was written is read again and
compared before it is kept (verify.py).
"""

from __future__ import annotations

from segprune.formats.huggingface import write_folder
from segprune.formats.names import write_file
from segprune.formats.verify import Written

FORMATS = ("hf", "nvlabs", "bubbliiiing", "mmseg")

__all__ = ["FORMATS", "Written", "register", "write_file", "write_folder"]


def register() -> None:
    """Make transformers' Auto classes load folders with networks of any widths in this process, without remote code."""
    from transformers import AutoConfig, AutoModelForSemanticSegmentation

    from segprune.formats.modeling_segprune import SegpruneConfig, SegpruneForSemanticSegmentation

    AutoConfig.register("segprune", SegpruneConfig, exist_ok=True)
    AutoModelForSemanticSegmentation.register(SegpruneConfig, SegpruneForSemanticSegmentation, exist_ok=True)
