"""Least squares from streamed moments: what an affine layer should be, given what it reads and should put out.

Only sums, X^T X and X^T Y are kept, in float64, however many rows come. The ridge pulls towards given weights and
not towards zero, so that directions the few images do not show keep the weights they have; the bias is free.
Reconstructing a layer's outputs after its inputs were cut: "Channel Pruning for Accelerating Very Deep Neural
Networks" (arXiv 1707.06168); from second moments alone: "Optimal Brain Compression" (arXiv 2208.11580).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

ROUNDING = 1e-12
Rows = Iterable[tuple[Tensor, Tensor]]  # inputs n p and targets n q, piece by piece


class Moments:
    """Of rows x (n p) and y (n q): counts, sums and products."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: tuple[Tensor, ...] = ()

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = x.double(), y.double()

        # Sums only, p + q + p p + p q numbers; they are added to in place.
        new = (x.sum(0), y.sum(0), x.T @ x, x.T @ y)
        self._sums = (
            tuple(old.add_(more) for old, more in zip(self._sums, new, strict=True))
            if self.count
            else new
        )
        self.count += len(x)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        return self._sums[0] / self.count, self._sums[1] / self.count

    @property
    def products(self) -> Tensor:
        """Sum of x with itself (p p), about zero."""
        return self._sums[2]

    @property
    def covariances(self) -> tuple[Tensor, Tensor]:
        """Of x with itself (p p) and with y (p q)."""
        # E[x x^T] − E[x] E[x]^T, and the same with y.
        x, y = self.means
        return self._sums[2] / self.count - torch.outer(x, x), self._sums[
            3
        ] / self.count - torch.outer(x, y)

    @property
    def definite(self) -> Tensor:
        """The covariance of x with itself (p p), raised above what rounding leaves where all rows are the same."""
        covariance = self.covariances[0].clone()
        covariance.diagonal().add_(self._rounding)
        return covariance

    @property
    def _rounding(self) -> float:
        return ROUNDING * float(self._sums[2].diagonal().mean()) / self.count

    def through(self, matrix: Tensor) -> Moments:
        """Returns the moments as they would be with inputs x @ matrix.T."""
        # Each sum is linear in x, or quadratic: M Σx, M (Σx x^T) M^T, M (Σx y^T).
        result = Moments()
        result.count = self.count
        x, y, xx, xy = self._sums
        result._sums = (matrix @ x, y, matrix @ xx @ matrix.T, matrix @ xy)
        return result

    def solve(self, weight: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """Returns weight (q p) and bias (q) of the map from x to y, near `weight` where the rows leave it open."""
        # Ridge regression around the given W0: W = W0 + (Cyx − W0 Cxx) (Cxx + r I)^-1,
        # where r is the ridge.
        weight = weight.double()
        xx, xy = self.covariances
        unexplained = xy - xx @ weight.T  # by the given weight

        ridge = damping * float(xx.diagonal().mean()) + self._rounding
        if ridge > 0.0:
            # Cxx + r I is symmetric and positive definite, which Cholesky needs.
            damped = xx.clone()
            damped.diagonal().add_(ridge)
            weight = weight + torch.cholesky_solve(unexplained, torch.linalg.cholesky(damped)).T

        # The bias is free: it makes the mean output right, whatever the weights are.
        x, y = self.means
        return weight, y - weight @ x


def moments_of(rows: Rows) -> Moments:
    moments = Moments()
    for x, y in rows:
        moments.add(x, y)
    return moments


def fit(rows: Rows, weight: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    return moments_of(rows).solve(weight, damping)
