"""Which channels a linear reader needs least: they are removed one by one, and the reader is solved anew each time.

Backward elimination for least squares: with the inverse of the channels' covariance at hand, the error that removing a
channel adds, and the readers' new weights, follow without solving anything ("Optimal Brain Surgeon", Hassibi and Stork
1992; for layers "Optimal Brain Compression", arXiv 2208.11580). Solved in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BLOCK = 64  # removals between two updates of whole matrices


@dataclass(frozen=True)
class Elimination:
    """`order` holds the channels, first removed first. `lost[w]` (q p) is what readers lack of their weight at width w:
    weight − the weight solved anew, which is zero where a channel is removed."""

    order: Tensor
    lost: dict[int, Tensor]


def eliminate(
    covariance: Tensor, weight: Tensor, metric: Tensor, widths: list[int], damping: float
) -> Elimination:
    """Removes channels until the least of `widths` is left.

    `covariance` (p p) is that of the channels, `weight` (q p) reads them, and the error of what is read counts as
    error · metric · error, `metric` q q. `damping` is a share of the mean variance, as in moments.py.
    """
    size = len(covariance)

    # Ridge: a share of the mean variance on the
    # diagonal. `tiny` is for channels that are all zero.
    damped = covariance.clone()
    damped.diagonal().add_(
        damping * covariance.diagonal().mean() + torch.finfo(covariance.dtype).tiny
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    current = weight.clone()
    order: list[int] = []
    lost = {size: torch.zeros_like(weight)} if size in widths else {}

    # Remove down to each width in turn, and record there what the reader lacks.
    stops = sorted((width for width in widths if width < size), reverse=True)
    for stop in stops:
        while size - len(order) > stop:
            count = min(MAX_BLOCK, size - len(order) - stop)
            order += _remove_block(inverse, current, metric, order, count)
        lost[stop] = weight - current
    kept = sorted(set(range(size)) - set(order))
    return Elimination(torch.tensor(order + kept), lost)


def _remove_block(
    inverse: Tensor, current: Tensor, metric: Tensor, removed: list[int], count: int
) -> list[int]:
    """Removes `count` channels; `inverse` and `current` are updated in place at the end, once."""
    size = len(inverse)

    # Each removal is an update of rank one. A block of them is kept
    # as columns (p t) and readers (q t): the matrices are then
    # inverse − columns @ columnsᵀ and current − readers @ columnsᵀ.
    columns, readers = inverse.new_zeros(size, count), current.new_zeros(len(current), count)

    # Removing channel j adds the error (wᵀ metric w) / inverse[j, j], w its column of weights.
    weighted = metric @ current  # q p
    norms = (current * weighted).sum(0)
    pivots = inverse.diagonal().clone()
    is_removed = torch.zeros(size, dtype=torch.bool, device=inverse.device)
    is_removed[removed] = True
    chosen: list[int] = []
    for t in range(count):
        # Of all channels left, the one whose removal adds the least error.
        added = (norms / pivots).masked_fill(is_removed, torch.inf)
        j = int(added.argmin())
        chosen.append(j)
        is_removed[j] = True

        # Its column of the inverse and its weights, as
        # the removals of this block have left them.
        column = inverse[:, j] - columns[:, :t] @ columns[j, :t]
        reader = current[:, j] - readers[:, :t] @ columns[j, :t]
        root = column[j].sqrt()
        column, reader = column / root, reader / root

        # What the other channels lose or gain by it.
        products = weighted.T @ reader - columns[:, :t] @ (readers[:, :t].T @ (metric @ reader))
        norms = norms - 2.0 * column * products + column.square() * (reader @ metric @ reader)
        pivots = pivots - column.square()
        columns[:, t], readers[:, t] = column, reader

    # The whole block at once: one product of matrices in place of `count` outer products.
    inverse -= columns @ columns.T
    current -= readers @ columns.T

    # Removed channels become exactly zero, without rounding, and a 1 that divides safely.
    inverse[:, chosen] = 0.0
    inverse[chosen] = 0.0
    inverse[chosen, chosen] = 1.0
    current[:, chosen] = 0.0
    return chosen
