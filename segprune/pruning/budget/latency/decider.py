"""Decides by the clock: a plan whose network, measured beside the dense one, takes the share of time asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from segprune.model import SegFormer
from segprune.pruning.budget.costs import loss_weights
from segprune.pruning.budget.latency.costs import LatencyCosts, dense_in_predicted_ms
from segprune.pruning.budget.latency.table import LatencyTable
from segprune.pruning.budget.latency.target import meet
from segprune.pruning.budget.rate import Limit, limit_of, solve, with_shares
from segprune.pruning.importance import Scores
from segprune.pruning.options import PruneOptions
from segprune.pruning.plan import Plan
from segprune.pruning.prepare import Prepared
from segprune.pruning.surgery import cut
from segprune.pruning.trace import eval_mode
from segprune.timing import Progress


def by_latency(
    prepared: Prepared,
    scores: Mapping[str, Scores],
    options: PruneOptions,
    table: LatencyTable | None = None,
    progress: Progress | None = None,
    solver: Callable[[Sequence[Limit]], Plan] | None = None,
) -> Plan:
    """Decides, cuts a trial copy, measures it and corrects, until the measured latency is what is asked.

    It may be lower where another budget asks for more. `table` holds times of steps measured before; `solver` makes a
    plan of budgets, by default from the scores. Raises
    ValueError for a network whose latency cannot be predicted, and with the least latency reached if none is met.
    """
    dense, model = prepared.dense, prepared.model
    if not prepared.stock:
        raise ValueError(
            f"{type(dense).__name__} is not a stock SegFormer; its latency cannot be predicted: "
            "ask for a rate of params or macs."
        )
    assert isinstance(model, SegFormer)

    # The latency of any widths is predicted from measured steps, without building a network.
    table = table or LatencyTable(next(model.parameters()).device)
    costs = LatencyCosts(
        model.spec, prepared.groups, table, prepared.input_shape, progress=progress
    )
    weights = loss_weights(
        prepared.rows, prepared.groups, next(iter(options.budgets)), options.group_price
    )
    if solver is None:
        solver = partial(
            solve, groups=prepared.groups, scores=scores, weights=weights, options=options
        )

    # Each try leaves its plan here. The one that `meet` accepts is the last.
    plans: list[Plan] = []

    with eval_mode(dense):
        # Predicted and measured ms differ, so the dense
        # network is first put on the scale of predictions.
        dense_ms = dense_in_predicted_ms(dense, model, costs)

        def prune_for(target_ms: float) -> tuple[nn.Module, float]:
            # Other budgets remain as they are. Only the latency is corrected from try to try.
            rates = options.budgets | {"latency": 1.0 - target_ms / dense_ms}
            limits = []
            for unit, rate in rates.items():
                if unit == "latency":
                    limits.append(Limit(costs, rate, unit, dense_ms))
                else:
                    limits.append(limit_of(prepared, unit, rate))

            plan = solver(limits)
            plans.append(with_shares(prepared, plan, limits))
            return cut(prepared, plan), (1.0 - plan.removed["latency"]) * dense_ms

        meet(
            1.0 - options.budgets["latency"],
            dense,
            dense_ms,
            prune_for,
            prepared.input_shape,
            table.place,
            at_most=len(options.budgets) > 1,
        )
    return plans[-1]
