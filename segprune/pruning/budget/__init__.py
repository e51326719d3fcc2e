"""Deciders: each makes a plan from a prepared network, the scores of its channels, and the options.

by_rate            one threshold for all channels, where the budgets are met
by_widths          widths that somebody has decided
by_uniform_stages  stages of one width throughout, for stock transformers
by_latency         the same as by_rate, with the clock as the budget
"""

from segprune.pruning.budget.latency.decider import by_latency
from segprune.pruning.budget.rate import by_rate
from segprune.pruning.budget.uniform import by_uniform_stages
from segprune.pruning.budget.widths import by_widths

__all__ = ["by_latency", "by_rate", "by_uniform_stages", "by_widths"]
