"""Widths that somebody has decided, in a file or in Python, made a plan."""

from __future__ import annotations

from collections.abc import Mapping

from segprune.pruning.budget.rate import with_shares
from segprune.pruning.importance import Scores
from segprune.pruning.options import PruneOptions
from segprune.pruning.plan import Plan, check_widths, keep_best, read_plan
from segprune.pruning.prepare import Prepared


def by_widths(prepared: Prepared, scores: Mapping[str, Scores], options: PruneOptions) -> Plan:
    """Decides nothing but which channels of each group are kept: those with the highest scores."""
    assert options.plan is not None
    widths = read_plan(options.plan) if isinstance(options.plan, str) else options.plan
    plan = keep_best(prepared.groups, scores, check_widths(widths, prepared.groups))
    return with_shares(prepared, plan)
