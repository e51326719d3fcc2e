"""Plans as files to read and edit, and as a table; and what a scan measured, read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segprune.cli.console import console, show_table
from segprune.files import write_json
from segprune.pruning.groups import Group
from segprune.pruning.plan import Plan

PLAN = "plan.json"
EXPLAINED = (
    "width: channels that stay in each of a group's parts (heads), from 1 to `slots`. Edit it, then run the same "
    "command with --plan and this file; which channels stay is decided by their scores."
)


def write_plan(plan: Plan, groups: tuple[Group, ...], settings: Mapping[str, Any], path: Path) -> None:
    rows = [
        {"name": group.name, "kind": group.kind, "parts": group.parts, "slots": group.slots, "width": width}
        for group, width in widths_by_group(plan, groups)
    ]
    record = {"explained": EXPLAINED, "removed": dict(plan.removed), "groups": rows, "settings": dict(settings)}
    write_json(record, path)


def read_plan(path: Path) -> dict[str, int]:
    """Widths by group name. ValueError where the file is no plan, and for a width that is none."""
    try:
        rows = [(row["name"], row["width"]) for row in _read(path)["groups"]]
    except (KeyError, TypeError):
        rows = [(None, None)]
    widths: dict[str, int] = {}
    for name, width in rows:
        if type(name) is not str:
            raise ValueError(f"{path} is no plan; write one with --plan_only, and in it change only the widths.")
        if type(width) is not int:
            raise ValueError(f"{path} gives group {name} the width {json.dumps(width)}; it must be a whole number.")
        if name in widths:
            raise ValueError(f"{path} names group {name} twice; leave one of them.")
        widths[name] = width
    return widths


def read_sensitivity(path: Path) -> dict[str, float]:
    """Factors by group name. ValueError where the file is no result of a scan."""
    factors = _read(path).get("sensitivity")
    if not isinstance(factors, dict) or not all(type(v) in (int, float) and v > 0 for v in factors.values()):
        raise ValueError(f"{path} holds no sensitivities; write it with `segprune scan`.")
    return factors


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; give the JSON file of a plan or a scan.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write it anew, or mend it there.") from error
    return record if isinstance(record, dict) else {}


def show_plan(plan: Plan, groups: tuple[Group, ...], left_alone: tuple[str, ...]) -> None:
    rows = []
    for group, width in sorted(widths_by_group(plan, groups), key=lambda row: row[0].name):
        full, left = (f"{group.parts} × {slots}" if group.parts > 1 else str(slots) for slots in (group.slots, width))
        rows.append([group.name.removeprefix("encoder."), full, left, f"{1 - width / group.slots:.0%}"])
    show_table("Plan", ["group", "channels", "stay", "go"], rows)
    if left_alone:
        names = ", ".join(sorted(name.removeprefix("encoder.") for name in left_alone))
        console.print(f"Left alone by --ignore: {names}.", soft_wrap=True)


def widths_by_group(plan: Plan, groups: tuple[Group, ...]) -> list[tuple[Group, int]]:
    """Per part of each group the channels that stay."""
    return [(group, len(plan.keep[group.name]) // group.parts) for group in groups]
