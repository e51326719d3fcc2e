"""transformers' Auto classes taught to load what `segprune.checkpoint.convert` writes."""

from __future__ import annotations


def register() -> None:
    """Make transformers' Auto classes load folders with networks of any widths in this process, without remote code."""
    from transformers import AutoConfig, AutoModelForSemanticSegmentation

    from segprune.checkpoint.modeling_segprune import (
        SegpruneConfig,
        SegpruneForSemanticSegmentation,
    )

    AutoConfig.register("segprune", SegpruneConfig, exist_ok=True)
    AutoModelForSemanticSegmentation.register(
        SegpruneConfig, SegpruneForSemanticSegmentation, exist_ok=True
    )
