"""The decode head folded: each stage's branch and its slice of the fuse convolution become one product.

Branch, bilinear upsampling and fuse convolution are linear, and a product over channels commutes with an
upsampling over space; so the product is taken at the stage's own, smaller resolution. The branches' biases pass
through upsampling unchanged and end, summed, before the BatchNorm, which subtracts them again: they move into its
running mean, exactly, in training as in evaluation. BatchNorm itself stays apart, so a folded head trains.
A head whose branches are not linear (`head` "conv") has nothing to fold: see segprune/model.py.

For deployment, where nothing is trained any more, every BatchNorm goes into the products before it as well, and the
scale of attention into the queries.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from segprune.model import Attention, DecodeHead, SegFormer
from segprune.spec import Spec, with_folded_head, with_unfolded_head


def fold_decoder(model: SegFormer) -> SegFormer:
    """Returns a new network with the same logits (to rounding) and a folded head; `model` is left as it was.

    One with a conv head is copied as it is.
    """
    spec = with_folded_head(model.spec)

    # It is folded already, or cannot be.
    if spec == model.spec:
        return copy.deepcopy(model)
    return _with_head(model, spec, _folded_state(model.decode_head))


def unfold_decoder(model: SegFormer) -> SegFormer:
    """Returns a network with a head as published, for files that other tools read: the inverse of `fold_decoder`."""
    if not model.spec.folded:
        return copy.deepcopy(model)
    return _with_head(model, with_unfolded_head(model.spec), _unfolded_state(model.decode_head))


def fold_for_inference(model: SegFormer) -> SegFormer:
    """Returns a new network with the same logits (to rounding) in evaluation.

    Its head is folded, and it has no BatchNorm and no attention scale. It has parameters that its spec does not know,
    so it can be run and exported, not saved or trained.
    """
    new = fold_decoder(model).eval().requires_grad_(False)
    _fold_batchnorm(new.decode_head)

    # scale · (q · k) = (scale · q) · k, so the scale moves into what computes q.
    for module in new.modules():
        if isinstance(module, Attention):
            for tensor in module.q.parameters():
                tensor.mul_(module.qk_scale)
            module.qk_scale = 1.0
    return new


def _fold_batchnorm(head: DecodeHead) -> None:
    """Moves every BatchNorm's factors into the rows of its products, and what it adds into a bias of the last one.

    Upsampling leaves a bias alone, and the last stage's map is the smallest.
    """
    # A branch's norm belongs to that branch alone.
    # The last norm reads the sum of all products.
    if head.branch_norms is not None:
        for i, norm in enumerate(head.branch_norms):
            _into_products(norm, head.branches[i : i + 1])
            head.branch_norms[i] = nn.Identity().eval()

    _into_products(head.norm, head.summed_products())
    head.norm = nn.Identity().eval()  # type: ignore[assignment]


def _into_products(norm: nn.Module, products: nn.ModuleList) -> None:
    assert isinstance(norm, nn.BatchNorm2d)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None

    # In evaluation a BatchNorm is factor · x + bias,
    # per channel. Rows of a product take the factor.
    factor = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    for product in products:
        assert isinstance(product, nn.Linear)
        product.weight.copy_(factor[:, None] * product.weight.double())  # out in

    # Products are summed, so one of them carries the bias for all.
    bias = norm.bias.double() - mean.double() * factor
    products[-1].bias = nn.Parameter(bias.to(norm.bias.dtype), requires_grad=False)


def _with_head(model: SegFormer, spec: Spec, state: dict[str, Tensor]) -> SegFormer:
    """Returns a copy of the network whose decode head is the spec's, with the weights in `state`."""
    old, head = model.decode_head, DecodeHead(spec)

    # Device, dtype and mode are those of the old head.
    head.to(old.classifier.weight).train(old.training)
    head.load_state_dict(state)

    # What was frozen stays so.
    frozen = {name for name, parameter in old.named_parameters() if not parameter.requires_grad}
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name not in frozen)

    new = copy.deepcopy(model, {id(old): head})  # the new head is taken where the old one stood
    new.spec = spec
    return new


def _folded_state(head: DecodeHead) -> dict[str, Tensor]:
    """Returns a folded head's weights: each branch times its slice of the fuse convolution."""
    whole = head.state_dict()
    state = {
        name: tensor
        for name, tensor in whole.items()
        if not name.startswith(("branches.", "fuse."))
    }

    # The fuse convolution reads c4, c3, c2, c1.
    weights = [
        whole[f"branches.{i}.weight"].double() for i in range(len(head.branches))
    ]  # each E C
    sizes = [len(weight) for weight in reversed(weights)]
    slices = (
        whole["fuse.weight"].double().flatten(1).split(sizes, dim=1)[::-1]
    )  # c1 … c4, each D E

    # What the branches' biases add to the sum, the BatchNorm's mean takes away again.
    mean = whole["norm.running_mean"].double()
    for i, (weight, fuse) in enumerate(zip(weights, slices, strict=True)):
        state[f"branches.{i}.weight"] = fuse @ weight  # D E · E C -> D C
        mean = mean - fuse @ whole[f"branches.{i}.bias"].double()
    state["norm.running_mean"] = mean
    return state


def _unfolded_state(head: DecodeHead) -> dict[str, Tensor]:
    """Returns the weights of a head as published: the products as branches, and a fuse convolution that adds them."""
    state = head.state_dict()
    weight = head.classifier.weight
    dim, stages = weight.shape[1], len(head.branches)

    # The products become branches with zero bias. The
    # fuse convolution is [I I I I], which adds them.
    for i in range(stages):
        state[f"branches.{i}.bias"] = weight.new_zeros(dim)
    identity = torch.eye(dim, dtype=weight.dtype, device=weight.device)
    state["fuse.weight"] = identity.repeat(1, stages)[:, :, None, None]
    return state
