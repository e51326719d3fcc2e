"""Decides by what may be lost: the highest rate whose network, cut and repaired, stays within a drop of the mIoU.

The loss hardly falls as the rate grows, and grows about exponentially towards its end. So the rate is bracketed
between one that stays within the drop and one that does not, and the next is where the logarithms of the two losses
lead, or the middle where that moves the same end again. A loss with a margin that reaches over the drop decides
nothing: such a network is scored again, on all images, and so are the two at the ends, at last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from segprune.inference.drop import Drop
from segprune.pruning.options import PruneOptions
from segprune.pruning.plan import Plan

STEPS = 100  # of the rate: one is a hundredth, as near as a rate is met
MAX_TRIALS = 8
LEAST_LOSS = 0.05  # of the drop: smaller losses are noise, and compared as if they were this


@dataclass(frozen=True)
class Trial:
    """A network cut at a rate and repaired, and what it loses."""

    rate: float
    plan: Plan
    network: nn.Module
    drop: Drop


@dataclass(frozen=True)
class Search:
    """What was tried. `larger` and `smaller` are those next to the chosen one, None where none was tried.

    The smaller one loses more than `max_drop`; where there is none, `limit` says why none can be made.
    """

    max_drop: float
    chosen: Trial
    larger: Trial | None
    smaller: Trial | None
    trials: tuple[Trial, ...]
    limit: str = ""


def by_accuracy(
    options: PruneOptions,
    reach: tuple[float, float],
    decide: Callable[[PruneOptions], Plan],
    make: Callable[[Plan], nn.Module],
    score: Callable[[nn.Module, bool], Drop],
    on_trial: Callable[[Trial], None] | None = None,
) -> Search:
    """Returns the trials, and which of them is the smallest within `options.max_drop` points.

    `reach`: what folding removes alone, and the most that can be removed. `decide` makes a plan of options with a
    rate, `make` cuts and repairs, and `score` says what a network loses: on a part of the images, or on all of them
    (True). `on_trial` is given each trial when it was scored, on a part and perhaps again on all. ValueError with the
    least loss that was seen if even the lowest rate loses more.
    """
    assert options.max_drop is not None
    max_drop = options.max_drop
    trials: dict[int, Trial] = {}  # by rate, in steps
    verdicts: list[bool] = []  # whether each stayed within the drop when it was first scored

    # Below the lowest rate there is the dense network, folded, which loses nothing.
    start = math.floor(reach[0] * STEPS)
    wall, limit = math.floor(reach[1] * STEPS) + 1, "no group may lose more of its channels"

    while True:
        within = [k for k, trial in trials.items() if trial.drop.points <= max_drop]
        low = max(within, default=start)
        high = min([k for k in trials if k > low], default=wall)
        closed = high - low <= 1 or len(trials) == MAX_TRIALS

        # What a part of the images cannot decide, all of them do: near the drop at once,
        # and for both ends of the bracket before they are believed.
        doubtful = _doubtful(trials, (low, high), max_drop, closed)
        if doubtful is not None:
            trial = trials[doubtful]
            trials[doubtful] = replace(trial, drop=score(trial.network, True))
            if on_trial is not None:
                on_trial(trials[doubtful])
            continue
        if closed:
            break

        again = verdicts[-2:] in ([True, True], [False, False])
        k = _next_rate(trials, low, high, max_drop, halve=again)
        rate = k / STEPS
        try:
            plan = decide(replace(options, max_drop=None, pruning_rate=rate))
        except ValueError as error:
            # What cannot be cut ends the range, as the formula's limit does.
            wall, limit = k, str(error)
            continue

        network = make(plan)
        trials[k] = Trial(rate, plan, network, score(network, False))
        verdicts.append(trials[k].drop.points <= max_drop)
        if on_trial is not None:
            on_trial(trials[k])

    if low not in trials:
        raise ValueError(_refusal(trials, max_drop, limit))
    return _conclude(trials, low, max_drop, limit)


def _doubtful(
    trials: Mapping[int, Trial], ends: tuple[int, int], max_drop: float, closed: bool
) -> int | None:
    """Returns the end of the bracket that has to be scored on all images, if there is one."""
    for k in ends:
        if k not in trials or not trials[k].drop.margin:
            continue
        drop = trials[k].drop
        if closed or abs(drop.points - max_drop) <= drop.margin:
            return k
    return None


def _next_rate(
    trials: Mapping[int, Trial], low: int, high: int, max_drop: float, *, halve: bool
) -> int:
    """Returns the next rate to try, in steps, between two of which the higher one loses too much or was not tried."""
    if high not in trials or halve:
        return (low + high) // 2

    # The losses' logarithms lie about on a line. The dense network loses nothing.
    least = LEAST_LOSS * max_drop
    lost = max(trials[low].drop.points, least) if low in trials else least
    share = math.log(max_drop / lost) / math.log(trials[high].drop.points / lost)
    return min(max(low + round(share * (high - low)), low + 1), high - 1)


def _conclude(trials: Mapping[int, Trial], chosen: int, max_drop: float, limit: str) -> Search:
    # A smaller network may have been tried after a larger one, hence the order of rates.
    rates = sorted(trials)
    place = rates.index(chosen)
    smaller = trials[rates[place + 1]] if place + 1 < len(rates) else None
    return Search(
        max_drop,
        trials[chosen],
        trials[rates[place - 1]] if place else None,
        smaller,
        tuple(trials.values()),
        "" if smaller is not None else limit,
    )


def _refusal(trials: Mapping[int, Trial], max_drop: float, limit: str) -> str:
    if not trials:
        return f"No rate could be tried for `max_drop` {max_drop:g}: {limit}"
    best = min(trials.values(), key=lambda trial: trial.drop.points)
    return (
        f"No network within {max_drop:g} points of mIoU came out of {len(trials)} trials; the least that was lost is "
        f"{best.drop.points:.2f} points, at rate {best.rate:g}: allow a larger `max_drop`, give more images for the "
        "repair (`num_images`), or fine-tune after a rate of your own."
    )
