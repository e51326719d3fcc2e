"""Every option of pruning: its default, its help, and what it cannot be combined with. Flags are derived from it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from segprune.model import check_input
from segprune.options import option
from segprune.pruning.importance import METHODS
from segprune.pruning.patterns import parse_names, parse_shares
from segprune.spec import MAX_KV_REDUCTION

RateOf = Literal["params", "macs", "channels", "latency"]
Scope = Literal["global", "local", "isomorphic"]
Normalise = Literal["share", "mean", "max", "none"]
PlanBy = Literal["curves", "scores"]
Price = Literal["both", "params", "macs", "none"]

UNITS: tuple[RateOf, ...] = get_args(RateOf)
DEFAULT_RATE = 0.5
MAX_RATE = 0.9


@dataclass(frozen=True)
class PruneOptions:
    """How much is removed, of what, and how channels are chosen. None is "not given".

    `price`: what a group costs when groups are compared: "both" parameters and MACs, one of them, or "none" (all
    cost the same); None takes "both", and "params" with `uniform`. `normalise`: what is compared across groups: a
    channel's "share" of the score that its group has left, its score by the group's "mean" or "max", or the score as
    it is ("none"). `sensitivity`: factors on the weights of groups by name, as `segprune.pruning.scan` measures them.
    Patterns of names are explained in patterns.py.
    """

    pruning_method: str = option(
        "l1",
        "How channels are ranked: l1, l2, fpgm, lamp, bn by their weights; taylor, fisher, wanda by what they do on "
        "images; random is the control.",
        panel="How much is removed, and which channels",
    )
    pruning_rate: float | str | Mapping[str, float] | None = option(
        None,
        "Share to remove, in [0, 1), of what `rate_of` says: 0.5, met within 0.01. Or several, each met at least: "
        "params=0.5,macs=0.7. Or exact shares of groups by name, alone or beside a rate: 0.5,stages.3=0.7. "
        "If not given: 0.5.",
        metavar="SHARE",
    )
    rate_of: RateOf | None = option(
        None,
        "What the rate is a share of: params, macs, channels, latency. If not given: params.",
    )
    max_drop: float | None = option(
        None,
        "Instead of a rate: the smallest network that loses no more than so many points of mIoU on the val part of "
        "`data`, after the repair and before fine-tuning.",
        metavar="POINTS",
    )
    plan_by: PlanBy | None = option(
        None,
        "How widths are decided. curves: by what each group loses after the repair, measured on images; scores: by "
        "ranking all channels. If not given: curves where there are images, unless options for scores are given.",
    )
    scope: Scope = option(
        "global",
        "global: rank all channels together; local: remove the same share of every group; isomorphic: of every set of "
        "equal groups.",
    )
    round_to: int = option(8, "Keep every width a multiple of it; 1: any width.")
    max_rate: float | str | Mapping[str, float] | None = option(
        None,
        "Largest share of any one group's channels that may be removed: 0.8, or by name stages.3=0.6,head=0.5. "
        "If not given: 0.9.",
        metavar="SHARE",
    )
    ignore: str | Sequence[str] = option(
        "",
        "Layers and groups of a plan that keep all their channels, by name: stages.0.*,stages.1.blocks.0.mlp.ffn.",
    )
    plan: str | Mapping[str, int] | None = option(
        None, "Carry out the widths of such a file, edited or not.", metavar="FILE"
    )
    heads: bool = option(False, "Whole attention heads may be removed too.")
    keep_decoder: bool = option(False, "Do not fold the decode head.")
    kv_reduction: int | str | Mapping[str, int] | None = option(
        None,
        "Attention reads keys and values from a map averaged over K × K: no weights are needed, and much is saved where "
        "the input is large. 2: in all stages where that saves enough; or by name, stages.0=2,stages.1=4. 1 undoes it.",
        metavar="K",
    )
    uniform: bool = option(
        False,
        "Keep every stage uniform, so that stock transformers can hold the network: convert.",
    )
    repair: bool | None = option(
        None,
        "Solve what reads the removed channels anew, from a few images. If not given: where there are images.",
    )
    input_shape: tuple[int, int] = option(
        (512, 512),
        "Height and width for MACs, latency, scoring and fine-tuning.",
        metavar="H W",
    )
    seed: int = option(11, "Of random weights, of random ranking and of fine-tuning.")
    price: Price | None = None
    normalise: Normalise = "share"
    sensitivity: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Takes text apart, and raises ValueError for values out of range and for options that contradict others."""
        # The record is frozen, so this is the one place where text from a command line or a
        # file becomes numbers and names. All checks below read those.
        _set(self, "pruning_rate", _read_rate(self.pruning_rate, self.rate_of))
        _set(self, "max_rate", _read_max_rate(self.max_rate))
        _set(
            self,
            "ignore",
            tuple(parse_names(self.ignore) if isinstance(self.ignore, str) else self.ignore),
        )
        _set(self, "kv_reduction", _read_factors(self.kv_reduction))
        _set(self, "sensitivity", self.sensitivity or None)
        _set(
            self,
            "plan",
            os.fspath(self.plan) if isinstance(self.plan, os.PathLike) else self.plan or None,
        )

        # First each value by itself, then what cannot be combined.
        check_input((1, 3, *self.input_shape))
        _check_words(self)
        _check_shares(self)
        _check_max_drop(self)
        _check_plan(self)
        _check_uniform(self)
        _check_curves(self)
        _check_effects(self)

    @property
    def budgets(self) -> dict[RateOf, float]:
        """The shares to remove by unit. Empty where a plan, or shares by name alone, say everything."""
        if isinstance(self.pruning_rate, Mapping):
            return {
                unit: self.pruning_rate[unit] for unit in UNITS if unit in self.pruning_rate
            }
        if self.plan is not None:
            return {}

        # One number, or none, is a share of a single unit.
        rate = DEFAULT_RATE if self.pruning_rate is None else cast(float, self.pruning_rate)
        return {self.rate_of or "params": rate}

    @property
    def shares_by_name(self) -> dict[str, float]:
        """The exact shares of groups to remove, by pattern."""
        if not isinstance(self.pruning_rate, Mapping):
            return {}

        # Names that are no unit are patterns of groups.
        return {
            pattern: share
            for pattern, share in self.pruning_rate.items()
            if pattern not in UNITS
        }

    @property
    def limits_by_name(self) -> Mapping[str, float]:
        """The largest share that may be removed, by pattern; `MAX_RATE` where none matches."""
        assert isinstance(self.max_rate, Mapping)
        return self.max_rate

    @property
    def kv_factors(self) -> Mapping[str, int]:
        """What keys and values are averaged over, by pattern; "" stands for the stages where that saves enough."""
        assert self.kv_reduction is None or isinstance(self.kv_reduction, Mapping)
        return self.kv_reduction or {}

    @property
    def group_price(self) -> Price:
        """Uniform networks keep the published decode head: priced by its MACs, it would lose nearly all its width."""
        return self.price or ("params" if self.uniform else "both")

    @property
    def removes_nothing(self) -> bool:
        """Whether no channel is removed."""
        return self.plan is None and not any(self.budgets.values()) and not self.shares_by_name

    @property
    def may_use_curves(self) -> bool:
        """Whether widths may be decided by curves, given images."""
        if self.plan_by is not None:
            return self.plan_by == "curves"
        return self.lets_curves_choose and self.plan is None and bool(self.budgets)

    @property
    def lets_curves_choose(self) -> bool:
        """Whether it may be measured, given images, which channels the repair can do without."""
        return (
            self.plan_by != "scores" and self.repair is not False and not self.given(FOR_SCORES)
        )

    def given(self, names: Iterable[str]) -> list[str]:
        """Returns those of the options that differ from their defaults."""
        usual = PruneOptions()
        return [name for name in names if getattr(self, name) != getattr(usual, name)]


def _set(options: PruneOptions, name: str, value: Any) -> None:
    object.__setattr__(options, name, value)


def _read_rate(rate: Any, rate_of: RateOf | None) -> float | dict[str, float] | None:
    """Returns one rate as a number, and anything else as shares by unit and by pattern."""
    if rate is None or isinstance(rate, int | float):
        return rate
    if isinstance(rate, str):
        shares = parse_shares(
            rate, "pruning_rate", "0.5, or params=0.5,macs=0.7, or stages.3=0.7"
        )
    else:
        shares = dict(rate)

    # A number without a name is measured in `rate_of`.
    if "" in shares:
        unit = rate_of or "params"
        if unit in shares:
            raise ValueError(
                f"`pruning_rate` says twice how much of the {unit} to remove; leave one of them out."
            )
        if len(shares) == 1:
            return shares[""]
        shares[unit] = shares.pop("")
    elif rate_of is not None and rate_of not in shares:
        raise ValueError(
            "`rate_of` has no effect beside a `pruning_rate` that names its units; leave one of them out."
        )
    return shares


def _read_max_rate(limit: Any) -> dict[str, float]:
    # A limit without a name holds for all groups: the pattern "*".
    if limit is None:
        return {}
    if isinstance(limit, str):
        shares = parse_shares(limit, "max_rate", "0.8, or stages.3=0.6,head=0.5")
        return {pattern or "*": share for pattern, share in shares.items()}
    return dict(limit) if isinstance(limit, Mapping) else {"*": float(limit)}


def _read_factors(wanted: Any) -> dict[str, int] | None:
    """Returns the factors by pattern; one number has the pattern ""."""
    if wanted is None:
        return None
    if isinstance(wanted, str):
        wanted = parse_shares(wanted, "kv_reduction", "2, or stages.0=2,stages.1=4")
    elif not isinstance(wanted, Mapping):
        wanted = {"": wanted}

    factors = {}
    for name, factor in wanted.items():
        # Text was read as a fraction, of which whole numbers are a part; infinity and NaN are none.
        whole = type(factor) is int or (type(factor) is float and factor.is_integer())
        if not whole or not 1 <= factor <= MAX_KV_REDUCTION:
            of = f" for {name}" if name else ""
            given = f"{factor:g}" if type(factor) is float else factor
            raise ValueError(
                f"`kv_reduction` is {given}{of}; it must be a whole number from 1 to {MAX_KV_REDUCTION}, the side of "
                "the windows that keys and values are averaged over."
            )
        factors[name] = int(factor)
    return factors or None


def _check_words(options: PruneOptions) -> None:
    for name, known in (
        ("pruning_method", tuple(METHODS)),
        ("rate_of", UNITS),
        ("plan_by", get_args(PlanBy)),
        ("scope", get_args(Scope)),
        ("normalise", get_args(Normalise)),
        ("price", get_args(Price)),
    ):
        word = getattr(options, name)

        # None is "not given": what it stands for depends on other options.
        if word is not None and word not in known:
            raise ValueError(
                f"`{name}` is {word!r}, which is unknown; choose one of {', '.join(known)}."
            )

    for name, factor in (options.sensitivity or {}).items():
        if not 0.0 < factor < math.inf:
            raise ValueError(
                f"`sensitivity` is {factor:g} for {name}; give factors above 0, as a scan measures them."
            )

    if options.round_to < 1:
        raise ValueError(
            f"`round_to` is {options.round_to}; widths are kept multiples of a whole number from 1 up."
        )


def _check_shares(options: PruneOptions) -> None:
    # A single rate is checked as a rate without a name.
    rates: dict[str, Any] = {"": options.pruning_rate}
    if isinstance(options.pruning_rate, Mapping):
        rates = dict(options.pruning_rate)
    for argument, shares in (("pruning_rate", rates), ("max_rate", options.limits_by_name)):
        for name, share in shares.items():
            if share is not None and not 0.0 <= share < 1.0:
                of = f" for {name}" if name and name != "*" else ""
                raise ValueError(
                    f"`{argument}` is {share:g}{of}; it must be at least 0 and below 1."
                )


def _check_max_drop(options: PruneOptions) -> None:
    """What may be lost decides how much is removed."""
    if options.max_drop is None:
        return
    if not 0.0 < options.max_drop < 100.0:
        raise ValueError(
            f"`max_drop` is {options.max_drop:g}; give the points of mIoU that may be lost, above 0 and below 100."
        )
    for name in ("pruning_rate", "plan"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"`max_drop` cannot be combined with `{name}`, which says how much is removed; leave one of them out."
            )


PLANNING = (
    "pruning_rate",
    "rate_of",
    "plan_by",
    "scope",
    "round_to",
    "max_rate",
    "sensitivity",
    "price",
    "normalise",
)


def _check_plan(options: PruneOptions) -> None:
    """A finished plan leaves nothing to decide."""
    for name in options.given(PLANNING) if options.plan is not None else ():
        raise ValueError(
            f"`{name}` has no effect with `plan`, which says what is kept; leave one of them out."
        )


def _check_uniform(options: PruneOptions) -> None:
    if not options.uniform:
        return

    # Uniform stages have one width each and the published decode head: what asks for other
    # widths, group by group, or for another head contradicts that.
    excluded = options.given(("heads", "keep_decoder", "scope"))
    if any(factor > 1 for factor in options.kv_factors.values()):
        excluded.append("`kv_reduction` above 1")
    excluded += [
        f"{unit} as a unit of `pruning_rate`"
        for unit in ("channels", "latency")
        if unit in options.budgets
    ]
    if options.shares_by_name:
        excluded.append("names in `pruning_rate`")
    if options.price == "none":
        excluded.append("price none")
    for name in excluded:
        named = f"`{name}`" if name.isidentifier() else name
        raise ValueError(
            f"{named} cannot be combined with `uniform`, whose stages have rules of their own; drop one."
        )


FOR_SCORES = (
    "pruning_method",
    "scope",
    "sensitivity",
    "price",
    "normalise",
    "heads",
    "uniform",
)


def _check_curves(options: PruneOptions) -> None:
    """Curves compare what groups lose after the repair; nothing else is compared."""
    if options.plan_by != "curves":
        return
    for name in options.given(FOR_SCORES):
        raise ValueError(
            f"`{name}` cannot be combined with `plan_by` curves; leave it out, or plan by scores."
        )

    # The curves measure the loss after the repair, which would not happen.
    if options.repair is False:
        raise ValueError(
            "`plan_by` curves counts on the repair; leave out `repair` False, or plan by scores."
        )


def _check_effects(options: PruneOptions) -> None:
    """An option without effect is a mistake."""
    # Shares by name alone fix widths, so that nothing is ranked across groups.
    if options.shares_by_name and not options.budgets:
        for name in options.given(("scope", "max_rate", "sensitivity", "price", "normalise")):
            raise ValueError(
                f"`{name}` has no effect where `pruning_rate` gives the share of every group by name; give a rate too, "
                f"or leave `{name}` out."
            )

    # The other scopes compare no groups with each other, so that a factor on one changes
    # nothing.
    if options.scope != "global":
        for name in options.given(("sensitivity", "price", "normalise")):
            raise ValueError(
                f"`{name}` has no effect with `scope` {options.scope}, which compares no groups; leave one of them out."
            )
