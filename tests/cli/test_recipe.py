"""docs/ade20k.md: its very commands, on a small network and a small folder of the same shape."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segprune import load
from tests.commands import HERE, done
from tests.data.test_ade20k import write_ade

DOCS = Path(__file__).resolve().parents[2] / "docs"
NETWORK, DATA = "nvidia/segformer-b2-finetuned-ade-512-512", "ADEChallengeData2016"
VERBS = {"prune_train.py": ["prune"], "train.py": ["train"]}


def recipe(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"(?m)^ +(python .*)$", text)


def write_network(folder: Path) -> None:
    """A b2 of narrow stages, saved as on the hub."""
    config = SegformerConfig(
        depths=[3, 4, 6, 3],
        hidden_sizes=[16, 32, 40, 64],
        num_attention_heads=[1, 2, 5, 8],
        decoder_hidden_size=32,
        num_labels=150,
    )
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "SegformerImageProcessor",
        "do_normalize": True,
        "do_reduce_labels": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "size": {"height": 512, "width": 512},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def test_the_commands_of_the_recipe_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = recipe("ade20k.md")
    assert commands == recipe("ade20k.zh-CN.md")
    assert len(commands) == 4
    write_network(tmp_path / NETWORK)
    write_ade(tmp_path / DATA)
    monkeypatch.chdir(tmp_path)

    variant = load(NETWORK).spec.variant
    for command in commands:
        # Only sizes, the device and what the variant is called are those of a test.
        small = command.replace("512 512 ", "32 32 ").replace("--epochs 10", "--epochs 1")
        small = small.replace("--batch_size 8", "--batch_size 1")
        small = small.replace("/b2/b2_", f"/{variant}/{variant}_")
        words = small.replace(" --cuda", "").split()[1:]
        verb = words[2:] if words[:2] == ["-m", "segprune"] else VERBS[words[0]] + words[1:]
        done(*verb, *HERE)

    def size(network: str) -> int:
        return sum(p.numel() for p in load(network).parameters())

    assert size("logs_ade/best_epoch_weights.pth") / size(NETWORK) == pytest.approx(
        0.5, abs=0.01
    )
