"""BatchNorm over the batch of all processes, on any device: torch's own SyncBatchNorm refuses the CPU.

The forward pass exchanges each process's count, means and squared deviations once, the backward pass two sums per
channel. The formulas are those of batch normalisation (arXiv 1502.03167) with sums over all processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_OVER = (0, 2, 3)  # B H W, all but the channels


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """An nn.BatchNorm2d that in training takes mean and variance over the default process group.

    Every process must call it equally often, with batches of any size. Gradients of weight and bias are the
    process's own share, which DDP averages like all others.
    """

    def forward(self, x: Tensor) -> Tensor:
        # In eval mode, and alone, the usual BatchNorm does the same without an exchange.
        if not self.training or not _several_processes():
            return super().forward(x)

        self._check_input_dim(x)
        mean, variance, count = _statistics(x.detach())
        # The running variance is the unbiased one, n / (n − 1), as in nn.BatchNorm2d.
        self._update_running(mean, variance * count / (count - 1).clamp(min=1), x)
        return _Normalise.apply(x, self.weight, self.bias, mean, variance, count, self.eps)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased: Tensor, x: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        # Without a momentum BatchNorm averages over all batches alike.
        momentum = (
            1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        )
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


@contextmanager
def synced(model: nn.Module) -> Iterator[None]:
    """Within it every nn.BatchNorm2d in `model` is a SyncedBatchNorm2d; no module, parameter, buffer or name changes.

    Subclasses of others are left alone. Works on modules that DDP already holds, too.
    """
    # Only plain BatchNorms: a subclass may compute something else in its forward.
    norms = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    try:
        for norm in norms:
            # Changing the class keeps parameters and hooks, which a new module would lose.
            norm.__class__ = SyncedBatchNorm2d
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.BatchNorm2d


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean and biased variance per channel over all processes, at least float32, and the number of values."""
    # In at least float32: sums over a whole batch overflow fp16.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(x, _OVER, correction=0)

    # Each process fills in its own row; adding up zeros is a gathering that every backend can do.
    rows = x.new_zeros(dist.get_world_size(), 1 + 2 * len(mean))
    rows[dist.get_rank()] = torch.cat([x.new_tensor([x.numel() / len(mean)]), mean, variance])
    dist.all_reduce(rows)

    # The variance of all values is the mean of the variances, plus the variance of the means.
    counts, means, variances = rows.split([1, len(mean), len(mean)], dim=1)  # each R ·
    shares = counts / counts.sum()
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(0), counts.sum()


class _Normalise(torch.autograd.Function):
    """(x − mean) / √(variance + eps) · weight + bias, whose gradient knows that mean and variance came from x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps), count)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        by_channel = (slice(None), None, None)  # C -> C 1 1
        normal = (x.to(mean.dtype) - mean[by_channel]) * inverse[by_channel]
        gradient = gradient.to(mean.dtype)

        # The sums of this process's gradients are those of bias and weight; the mean over all processes enters x.
        own = torch.stack([gradient.sum(_OVER), (gradient * normal).sum(_OVER)])  # 2 C
        total = own.clone()
        dist.all_reduce(total)
        shift, slope = total / count

        scale = inverse if weight is None else inverse * weight
        # Mean and variance depend on x too. Their part of the gradient is its mean, and its
        # mean product with the normalised x; both are taken off.
        of_x = scale[by_channel] * (gradient - shift[by_channel] - normal * slope[by_channel])
        of_weight = own[1].to(weight.dtype) if ctx.needs_input_grad[1] else None
        of_bias = own[0].to(weight.dtype) if ctx.needs_input_grad[2] else None
        return of_x.to(x.dtype), of_weight, of_bias, None, None, None, None
