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

    # The dot before the wildcard keeps "stages.1" from matching "stages.10".
    forms = (name, name.removeprefix("encoder."))
    return any(
        fnmatchcase(form, pattern) or fnmatchcase(form, f"{pattern}.*") for form in forms
    )


def matching_names(patterns: Iterable[str], names: Sequence[str], argument: str) -> set[str]:
    """Returns all names that a pattern matches. Raises ValueError for a pattern of `argument` that matches none."""
    matched: set[str] = set()
    for pattern in patterns:
        new = {name for name in names if matches(pattern, name)}
        if not new:
            # Three names from all over the network show how encoder and head are called.
            examples = names[:: max(1, len(names) // 3)][:3]
            units = (
                " (and units are params, macs, channels, latency)"
                if argument == "pruning_rate"
                else ""
            )
            raise ValueError(
                f"`{argument}` {pattern!r} matches nothing in this network; its names look like {', '.join(examples)}"
                f"{units}."
            )
        matched |= new
    return matched


def match(
    values: Mapping[str, float], groups: Sequence[Group], argument: str
) -> dict[str, float]:
    """Returns the value of each group that a pattern matches; of several patterns the last one holds."""
    names = [group.name for group in groups]
    by_name: dict[str, float] = {}
    for pattern, value in values.items():
        by_name |= dict.fromkeys(matching_names([pattern], names, argument), value)
    return by_name


def parse_names(text: str) -> list[str]:
    """
    >>> parse_names("stages.0.*, head")
    ['stages.0.*', 'head']
    """
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_shares(text: str, argument: str, example: str) -> dict[str, float]:
    """Returns numbers by name; one without a name has the name "". Raises ValueError for text of another form.

    >>> parse_shares("0.5, stages.3=0.7", "pruning_rate", "0.5")
    {'': 0.5, 'stages.3': 0.7}
    """
    shares: dict[str, float] = {}
    for part in parse_names(text):
        # Without "=" the name is empty, and the whole part is the number.
        name, _, number = part.rpartition("=")
        try:
            share = float(number)
        except ValueError as error:
            raise ValueError(f"`{argument}` is {text!r}; write it as {example}.") from error

        name = name.strip()
        if name in shares:
            raise ValueError(
                f"`{argument}` is {text!r}, which gives two shares for {name or 'one number'}; drop one."
            )
        shares[name] = share
    return shares
