"""Coordinates of a normalised stream that became narrower: a rotation keeps more of it than a choice of channels.

Whatever passes a LayerNorm before it is read may be turned by any orthogonal matrix, if the gain moves into the
readers ("SliceGPT", arXiv 2401.15024, for RMSNorm). LayerNorm also takes the mean off, so of D' channels D' − 1 are
free: the leading principal directions of the normalised stream, laid into the subspace of D' channels that sum to
zero. Scaled by sqrt(D' / D) LayerNorm finds the same variance as in the wide network, less that of what is left out.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RANK_TOLERANCE = 1e-10  # singular values below this share of the largest are rounding, whichever driver found them
UNSEEN = 1e-6  # of the mean variance: what directions get that no image shows, far above rounding, far below damping


class Basis:
    """D' coordinates of a stream D wide; without a matrix (D' D) the stream is as wide as it was."""

    def __init__(self, matrix: Tensor | None = None) -> None:
        self.matrix = matrix

    def project(self, x: Tensor) -> Tensor:
        """Channels last."""
        return x if self.matrix is None else (x.double() @ self.matrix.T).to(x.dtype)

    @property
    def back(self) -> Tensor | None:
        """D' D; x is about project(x) @ back."""
        # matrix^T @ matrix is D' / D times the projection onto the directions that are
        # kept, so dividing by it leads back.
        return (
            None
            if self.matrix is None
            else self.matrix * (self.matrix.shape[1] / self.matrix.shape[0])
        )

    def rows(self, weight: Tensor) -> Tensor:
        """The weight of a layer that writes D channels, D in [kernel], made to write the coordinates."""
        return (
            weight if self.matrix is None else torch.tensordot(self.matrix, weight.double(), 1)
        )


class Reads:
    """How layers behind a LayerNorm read it: their dense weights, put into the coordinates of its new output.

    The dense output is about the new output @ matrix (D' D), up to what a bias takes; without a matrix it is that.
    """

    def __init__(self, matrix: Tensor | None = None) -> None:
        self.matrix = matrix

    def columns(self, weight: Tensor) -> Tensor:
        """Weight out D [kernel] to out D' [kernel]."""
        return (
            weight
            if self.matrix is None
            else torch.einsum("oc...,dc->od...", weight.double(), self.matrix)
        )


def principal(second_moment: Tensor, width: int) -> Basis:
    """Returns the best `width` coordinates for a normalised stream with that second moment (D D, about zero)."""
    # The D' − 1 directions (D D'−1) are laid into D' channels that sum to zero (D' D'−1).
    directions = leading_directions(second_moment)[:, : width - 1]  # D k
    scale = (width / len(second_moment)) ** 0.5
    return Basis(scale * _sum_to_zero(width, directions.device) @ directions.T)


def leading_directions(second_moment: Tensor) -> Tensor:
    """Returns the principal directions of a normalised stream as columns (D D), the strongest first."""
    # What is the same in all channels never reaches a LayerNorm's output: it comes last, however few directions count.
    size = len(second_moment)
    mean = second_moment.trace() / size
    second_moment = second_moment - mean

    # Of directions that the images do not show, rounding would choose: prefer the first channels' instead.
    ramp = torch.linspace(2.0, 1.0, size, dtype=mean.dtype, device=mean.device)
    second_moment = second_moment + torch.diag(UNSEEN * mean * ramp)
    directions = torch.linalg.eigh(second_moment).eigenvectors.flip(1)

    # An eigenvector's sign is the driver's choice, and gains fitted channel by channel depend on it.
    return directions * signs_of_columns(directions)


def signs_of_columns(vectors: Tensor) -> Tensor:
    """Returns 1 or -1 for each column of `vectors` (... D k), as ... 1 k: the sign of its largest number."""
    largest = vectors.abs().argmax(-2, keepdim=True)
    return vectors.gather(-2, largest).sign()


def second_moment(batches: Iterable[Tensor]) -> Tensor:
    """Sums outer products over images and tokens: batches B … N C to … C C, in float64."""
    moments = ((x.double().mT @ x.double()).sum(0) for x in batches)
    total = next(moments)
    for moment in moments:
        total += moment
    return total


def _sum_to_zero(width: int, device: torch.device) -> Tensor:
    """Returns orthonormal columns (Helmert's) that span the vectors of `width` numbers whose sum is zero."""
    columns = torch.zeros(width, width - 1, dtype=torch.float64, device=device)

    # Column k has k ones and then −k: it sums to zero and is orthogonal to all others.
    for k in range(1, width):
        columns[:k, k - 1] = 1.0
        columns[k, k - 1] = -k
    return columns / torch.linalg.vector_norm(columns, dim=0)


def normalised(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Returns what the LayerNorm makes of x before gain and bias."""
    return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)


def fit_norm(
    dense: nn.LayerNorm,
    pruned: nn.LayerNorm,
    basis: Basis,
    inputs: Iterable[tuple[Tensor, Tensor]],
    damping: float,
) -> Reads:
    """Sets gain and bias of the pruned LayerNorm so that it puts out what the dense one does, in the coordinates.

    `inputs` are pairs (dense, pruned), channels last. The dense gain moves into the layers that read this one: the
    returned `Reads` tell how.
    """
    # As wide as before: the readers' weights fit as they are, only gain and bias are solved.
    if basis.back is None:
        fit_lines(
            pruned,
            ((x, dense(x_dense)) for x_dense, x in inputs),
            dense.weight.double(),
            damping,
        )
        return Reads()

    # Back to D channels, times the dense gain: what readers have to multiply with first.
    reads = basis.back * dense.weight.double()

    # Zero, with which convolutions pad, shall mean zero as before: the shortest offset with offset @ reads nearest to
    # the dense bias. The rows of `reads` sum to zero, so its rank is below D' and least squares by QR would fail.
    inverse = torch.linalg.pinv(reads, rtol=RANK_TOLERANCE)  # D D'
    offset = dense.bias.double() @ inverse

    pairs = (
        (x, basis.project(normalised(dense, x_dense)).double() + offset)
        for x_dense, x in inputs
    )
    fit_lines(pruned, pairs, None, damping)
    return Reads(reads)


@torch.no_grad()
def fit_lines(
    norm: nn.LayerNorm,
    pairs: Iterable[tuple[Tensor, Tensor]],
    gain: Tensor | None,
    damping: float,
) -> None:
    """Sets gain and bias by least squares, each channel by itself, from (inputs, wanted outputs), channels last.

    The ridge pulls towards `gain`, by default the one number that fits all channels together.
    """
    lines = _Lines()
    for x, wanted in pairs:
        lines.add(normalised(norm, x), wanted)

    slope, start = lines.solve(gain, damping)
    norm.weight.copy_(slope)
    norm.bias.copy_(start)


class _Lines:
    """Streamed least squares of y on x, each channel by itself."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = x.double().flatten(0, -2), y.double().flatten(0, -2)

        # Four sums per channel are all that a line's least squares need.
        new = [x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)]
        self.sums = (
            [old + more for old, more in zip(self.sums, new, strict=True)]
            if self.count
            else new
        )
        self.count += len(x)

    def solve(self, slope: Tensor | None, damping: float) -> tuple[Tensor, Tensor]:
        """Returns slopes and intercepts, near `slope`, by default the one that fits all channels together."""
        x, y, xx, xy = (total / self.count for total in self.sums)
        variance, covariance = xx - x * x, xy - x * y

        # Without a given slope: one for all channels, pooled. `tiny` is for inputs that
        # never vary.
        tiny = torch.finfo(torch.float64).tiny
        if slope is None:
            slope = covariance.sum() / variance.sum().clamp_min(tiny)

        # The ridge is of the mean variance of all channels, so that it holds what hardly varies.
        ridge = damping * variance.mean() + tiny
        slope = slope + (covariance - variance * slope) / (variance + ridge)
        return slope, y - slope * x
