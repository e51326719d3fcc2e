"""Deciders: each makes a plan from a prepared network, the scores of its channels, and the options.

by_rate            one threshold for all channels, where the budgets are met
by_widths          widths that somebody has decided
by_uniform_stages  stages of one width throughout, for stock transformers
by_curves          what each group loses after the repair, from a few images
by_latency         the same as one of these two, with the clock as the budget
by_accuracy        the highest rate of any of them that loses no more than is allowed
"""

from segprune.pruning.budget.accuracy import Search, Trial, by_accuracy
from segprune.pruning.budget.curves import by_curves, by_widths_and_curves, solve_by_curves
from segprune.pruning.budget.latency.decider import by_latency
from segprune.pruning.budget.rate import by_rate
from segprune.pruning.budget.uniform import by_uniform_stages
from segprune.pruning.budget.widths import by_widths

__all__ = [
    "Search",
    "Trial",
    "by_accuracy",
    "by_curves",
    "by_latency",
    "by_rate",
    "by_uniform_stages",
    "by_widths",
    "by_widths_and_curves",
    "solve_by_curves",
]
