"""Networks as other libraries hand them over: of transformers, compiled, wrapped for several GPUs."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import segprune
from segprune import L1Pruner, SegFormer
from segprune.checkpoint.hf_memory import read_huggingface
from segprune.spec import Spec

X = torch.randn(1, 3, 64, 64)


@pytest.fixture(scope="module")
def theirs() -> SegformerForSemanticSegmentation:
    """A b0 with names of its own, as training left it: in training mode, the first stage frozen."""
    torch.manual_seed(0)
    labels = {0: "sky", 1: "road", 2: "tree", 3: "car"}
    config = SegformerConfig(num_labels=4, id2label=labels, hidden_act="gelu")
    model = SegformerForSemanticSegmentation(config)
    for name, parameter in model.named_parameters():
        if "patch_embeddings.0." in name or "stages.0.patch_embeddings" in name:
            parameter.requires_grad_(False)
    return model.train()


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_it_is_read_as_the_same_network(theirs: nn.Module) -> None:
    ours = read_huggingface(theirs)
    assert ours is not None
    assert ours.training
    frozen = [name for name, p in ours.named_parameters() if not p.requires_grad]
    assert frozen == [
        f"encoder.stages.0.patch_embed.{layer}.{leaf}"
        for layer in ("proj", "norm")
        for leaf in ("weight", "bias")
    ]
    theirs.eval()
    with torch.inference_mode():
        expected = theirs(X).logits
        logits = ours.eval().parts(X)[1]
    theirs.train()
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_it_is_pruned_with_all_its_groups_and_trained_as_before(
    theirs: nn.Module, tmp_path: Path
) -> None:
    pruner = L1Pruner(theirs, pruning_rate=0.6, repair=False)
    pruned = pruner.prune({"pixel_values": X})
    assert 1 - num_parameters(pruned) / num_parameters(theirs) == pytest.approx(0.6, abs=0.01)
    assert pruned.training
    assert {"encoder.stages.0.blocks.0.attn.qk", "decode_head.width"} <= pruner.plan.keep.keys()

    # Code that trains theirs calls it with labels and reads a loss.
    out = pruned(pixel_values=X, labels=torch.zeros(1, 64, 64).long())
    out.loss.backward()
    assert out.logits.shape == (1, 4, 16, 16)
    assert pruned.config.id2label[2] == "tree"

    # Pruned again, and saved with segprune or with transformers.
    again = L1Pruner(pruned, pruning_rate=0.2, repair=False).prune(X)
    assert 1 - num_parameters(again) / num_parameters(pruned) == pytest.approx(0.2, abs=0.01)
    segprune.save(again.network, tmp_path / "again.pth")
    assert segprune.load(tmp_path / "again.pth").spec == again.network.spec
    again.save_pretrained(tmp_path / "again")
    assert segprune.load(tmp_path / "again").spec == again.network.spec


def test_prune_gives_our_network_and_theirs_on_demand(theirs: nn.Module) -> None:
    pruned = segprune.prune(theirs, 0.5, example_inputs=X, repair=False)
    assert type(pruned.network) is SegFormer
    removed = 1 - pruned.after.parameters / pruned.before.parameters
    assert removed == pytest.approx(0.5, abs=0.01)
    back = pruned.to_huggingface()
    assert back.config.id2label[3] == "car"
    assert back(pixel_values=X).logits.shape == (1, 4, 16, 16)


def test_layers_of_theirs_can_be_ignored(theirs: nn.Module) -> None:
    linear = [m for m in theirs.modules() if isinstance(m, nn.Linear)]
    hidden = next(m for m in linear if (m.in_features, m.out_features) == (32, 128))
    pruner = L1Pruner(theirs, 0.5, ignored_layers=[hidden], repair=False)
    pruner.prune(X)
    assert "encoder.stages.0.blocks.0.mlp.fc1" in pruner.protected_names()
    assert "encoder.stages.0.blocks.0.mlp.ffn" not in pruner.plan.keep


class Own(SegFormer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
@pytest.mark.parametrize("kind", [SegFormer, Own])
def test_wrappers_are_taken_off(wrap: object, kind: type[SegFormer], small_spec: Spec) -> None:
    torch.manual_seed(0)
    model = kind(small_spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, of what it needs to compile
        wrapped = wrap(model)
    pruned = L1Pruner(wrapped, 0.5, round_to=1, repair=False).prune(X)
    assert type(pruned) is kind
    assert 1 - num_parameters(pruned) / num_parameters(model) == pytest.approx(0.5, abs=0.01)
