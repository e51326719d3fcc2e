"""The decode head folded: each stage's branch and its slice of the fuse convolution become one product.

Branch, bilinear upsampling and fuse convolution are linear, and a product over channels commutes with an
upsampling over space; so the product is taken at the stage's own, smaller resolution. The branches' biases pass
through upsampling unchanged and end, summed, before the BatchNorm, which subtracts them again: they move into its
running mean, exactly, in training as in evaluation. BatchNorm itself stays apart, so a folded head trains.

For deployment, where nothing is trained any more, the BatchNorm goes into the products as well, and the scale of
attention into the queries.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from segprune.model import Attention, DecodeHead, SegFormer


def fold_decoder(model: SegFormer) -> SegFormer:
    """A new network with the same logits (to rounding) and a folded head; `model` is left as it was."""
    if model.spec.folded:
        return copy.deepcopy(model)
    spec = replace(model.spec, branch_dims=None)
    return _with_head(model, DecodeHead(spec), spec.branch_dims, _folded_state(model.decode_head))


def unfold_decoder(model: SegFormer) -> SegFormer:
    """The inverse for files that other tools read: linear_c are the products, fuse adds them up."""
    if not model.spec.folded:
        return copy.deepcopy(model)
    dims = (model.spec.decoder_dim,) * len(model.spec.stages)
    spec = replace(model.spec, branch_dims=dims)
    return _with_head(model, DecodeHead(spec), dims, _unfolded_state(model.decode_head))


def fold_for_inference(model: SegFormer) -> SegFormer:
    """A new network with the same logits (to rounding) in evaluation: head folded, no BatchNorm, no attention scale.

    It has parameters that its spec knows nothing of, so it can be run and exported, not saved or trained.
    """
    new = fold_decoder(model).eval().requires_grad_(False)
    _fold_batchnorm(new.decode_head)
    for module in new.modules():
        if isinstance(module, Attention):
            for tensor in module.q.parameters():
                tensor.mul_(module.qk_scale)
            module.qk_scale = 1.0
    return new


def _fold_batchnorm(head: DecodeHead) -> None:
    """BatchNorm's factors into the rows of the products; what it adds becomes a bias, which upsampling leaves alone."""
    norm = head.norm
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    factor = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    for branch in head.branches:
        assert isinstance(branch, nn.Linear)
        branch.weight.copy_(factor[:, None] * branch.weight.double())  # D C
    bias = norm.bias.double() - mean.double() * factor
    head.branches[-1].bias = nn.Parameter(bias.to(norm.bias.dtype), requires_grad=False)  # where the map is smallest
    head.norm = nn.Identity().eval()  # type: ignore[assignment]


def _with_head(
    model: SegFormer, head: DecodeHead, branch_dims: tuple[int, ...] | None, state: dict[str, Tensor]
) -> SegFormer:
    old = model.decode_head
    memo = {id(old): head}  # deepcopy then takes the new head where the old one stood
    head.to(old.classifier.weight).train(old.training)
    head.load_state_dict(state)
    frozen = {name for name, parameter in old.named_parameters() if not parameter.requires_grad}
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name not in frozen)
    new = copy.deepcopy(model, memo)
    new.spec = replace(model.spec, branch_dims=branch_dims)
    return new


def _folded_state(head: DecodeHead) -> dict[str, Tensor]:
    whole = head.state_dict()
    state = {k: v for k, v in whole.items() if not k.startswith(("branches.", "fuse."))}
    weights = [whole[f"branches.{i}.weight"].double() for i in range(len(head.branches))]  # each E C
    sizes = [len(weight) for weight in reversed(weights)]
    slices = whole["fuse.weight"].double().flatten(1).split(sizes, dim=1)[::-1]  # c1 … c4, each D E
    mean = whole["norm.running_mean"].double()
    for i, (weight, fuse) in enumerate(zip(weights, slices, strict=True)):
        state[f"branches.{i}.weight"] = fuse @ weight  # D E · E C -> D C
        mean = mean - fuse @ whole[f"branches.{i}.bias"].double()
    state["norm.running_mean"] = mean
    return state


def _unfolded_state(head: DecodeHead) -> dict[str, Tensor]:
    state = head.state_dict()
    weight = head.classifier.weight
    dim, stages = weight.shape[1], len(head.branches)
    for i in range(stages):
        state[f"branches.{i}.bias"] = weight.new_zeros(dim)
    identity = torch.eye(dim, dtype=weight.dtype, device=weight.device)
    state["fuse.weight"] = identity.repeat(1, stages)[:, :, None, None]
    return state
