"""Records of options: each option's default and help stand in one place, its field; flags are derived from it."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, *, metavar: str = "", panel: str = "") -> Any:
    """Returns a field of a frozen record of options.

    `help` says in one sentence what the option does, with its unit. `metavar` names several values, as in "H W".
    `panel` is the title under which `--help` lists this option and those after it.
    """
    return field(default=default, metadata={"help": help, "metavar": metavar, "panel": panel})
