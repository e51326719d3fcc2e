"""Names by pattern, as users write them: `stages.3`, `head`, `stages.*.mlp`, `encoder.stages.0.blocks.1.attn.qk`.

A pattern matches a name, or what lies inside it, with shell wildcards (* ? [ ]); the leading "encoder." may be left
out, and "head" stands for "decode_head".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from segprune.pruning.groups import Group


def matches(pattern: str, name: str) -> bool:
    """
    >>> matches("stages.3", "encoder.stages.3.blocks.0.mlp.ffn"), matches("head", "decode_head.width")
    (True, True)
    >>> matches("stages.1", "encoder.stages.10.width")
    False
    """
    if pattern == "head" or pattern.startswith("head."):
        pattern = f"decode_{pattern}"
    forms = (name, name.removeprefix("encoder."))
    return any(fnmatchcase(form, pattern) or fnmatchcase(form, f"{pattern}.*") for form in forms)


def matching_names(patterns: Iterable[str], names: Sequence[str], flag: str) -> set[str]:
    """All names that a pattern matches. ValueError for a pattern that matches none."""
    found: set[str] = set()
    for pattern in patterns:
        here = {name for name in names if matches(pattern, name)}
        if not here:
            raise ValueError(f"{flag} {pattern!r} matches nothing in this network; {_known(names)}")
        found |= here
    return found


def match(values: Mapping[str, float], groups: Sequence[Group], flag: str) -> dict[str, float]:
    """The value of each group that a pattern matches; of several patterns the last one holds."""
    names = [group.name for group in groups]
    return {name: value for pattern, value in values.items() for name in matching_names([pattern], names, flag)}


def parse_values(text: str, flag: str) -> dict[str, float]:
    """`stages.3=0.7,head=0.6`, or one number for everything, as shares by pattern.

    >>> parse_values("stages.3=0.7, head=0.6", "--rates")
    {'stages.3': 0.7, 'head': 0.6}
    >>> parse_values("0.8", "--max_rate")
    {'*': 0.8}
    """
    return _parsed(text, flag, "stages.3=0.7,head=0.6")


def parse_budgets(text: str, flag: str) -> dict[str, float]:
    """`params=0.5,macs=0.7` as shares by unit; what units there are is for the pruner to say."""
    example = "params=0.5,macs=0.7"
    values = _parsed(text, flag, example)
    if "*" in values:
        raise ValueError(f"{flag} is {text!r}; write it as {flag} {example}.")
    return values


def _parsed(text: str, flag: str, example: str) -> dict[str, float]:
    values = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        pattern, _, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError as error:
            raise ValueError(f"{flag} is {text!r}; write it as {flag} {example}.") from error
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{flag} {part} is not a share; it must be at least 0 and below 1.")
        values[pattern.strip() or "*"] = value
    return values


def _known(names: Sequence[str]) -> str:
    return f"its names look like {', '.join(names[:: max(1, len(names) // 3)][:3])}."
