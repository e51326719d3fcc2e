"""A plan: which channels of each group are kept. Plain data, and a file that a person can read and edit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from segprune.files import read_json, write_json
from segprune.pruning.groups import Group
from segprune.pruning.importance import Scores
from segprune.pruning.options import RateOf

Widths = np.ndarray[
    tuple[int], np.dtype[np.int64]
]  # channels kept in each part of each group, in the groups' order

WHAT = "the JSON file of a plan"
EXPLAINED = (
    "width: channels kept in each of a group's parts (heads), from 1 to `slots`. Edit it, then run the same command "
    "with --plan and this file; which channels are kept is decided anew, by images or by scores. share_of_params, "
    "share_of_macs: what the whole group costs, as a share of the network; share_of_time, where curves decided: of the "
    "estimated time. "
    "expected_loss, where curves decided: the divergence of the "
    "logits after the repair, in nats per pixel, that this group alone would cause."
)


@dataclass(frozen=True)
class Plan:
    """The channels that are kept, by group name; `removed` is the share removed, by unit.

    `decided_by` says how widths were found. Where that was "curves", `losses` has by group name what it was expected
    to lose after the repair, in nats per pixel.
    """

    keep: Mapping[str, tuple[int, ...]]
    removed: Mapping[RateOf, float] = field(default_factory=dict)
    decided_by: Literal["scores", "curves"] = "scores"
    losses: Mapping[str, float] = field(default_factory=dict)


def keep_best(groups: Sequence[Group], scores: Mapping[str, Scores], widths: Widths) -> Plan:
    """Returns the plan for given widths: each part of a group keeps its highest scores, of equal ones the first."""
    keep = {}
    for group, width in zip(groups, widths.tolist(), strict=True):
        # Scores as parts × slots. The sort is stable, so that equal scores keep the first
        # channels on every machine.
        by_part = scores[group.name].reshape(group.parts, group.slots)
        best = np.argsort(-by_part, axis=1, kind="stable")[:, :width]

        # From slots within a part to channels of the group: part p starts at p · slots.
        channels = best + np.arange(group.parts)[:, None] * group.slots
        keep[group.name] = tuple(sorted(channels.ravel().tolist()))
    return Plan(keep)


def widths_of(plan: Plan, groups: Sequence[Group]) -> Widths:
    return np.array(
        [len(plan.keep[group.name]) // group.parts for group in groups], dtype=np.int64
    )


def check_widths(widths: Mapping[str, int], groups: Sequence[Group]) -> Widths:
    """Returns the widths in the order of the groups. Raises ValueError for names or widths that do not fit."""
    # A plan has to name exactly the groups of this network: none missing, none left over.
    slots = {group.name: group.slots for group in groups}
    strange, missing = (
        sorted(widths.keys() - slots.keys()),
        sorted(slots.keys() - widths.keys()),
    )
    wrong = [f"group {name}, which this network cannot cut" for name in strange[:1]]
    wrong += [f"group {name}, which the plan does not name" for name in missing[:1]]
    if wrong:
        raise ValueError(
            f"The plan is not one for this network and these options: {', and '.join(wrong)}."
        )

    for name, width in widths.items():
        if not 1 <= width <= slots[name]:
            raise ValueError(
                f"The plan keeps {width} channels of {name}; it must be 1 to {slots[name]}."
            )
    return np.array([widths[group.name] for group in groups], dtype=np.int64)


def plan_rows(
    plan: Plan, groups: Sequence[Group], costs: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Returns a record per group: its width, its share of the network's `costs`, by unit, and the loss expected."""
    rows: list[dict[str, Any]] = []
    for group, width in zip(groups, widths_of(plan, groups).tolist(), strict=True):
        # Rounded for reading; only the name and the width are read back.
        row = {
            "name": group.name,
            "kind": group.kind,
            "parts": group.parts,
            "slots": group.slots,
            "width": width,
        }
        row |= {
            f"share_of_{unit}": round(shares[group.name], 6) for unit, shares in costs.items()
        }
        if group.name in plan.losses:
            row["expected_loss"] = float(f"{plan.losses[group.name]:.3g}")
        rows.append(row)
    return rows


def plan_record(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what files hold of a plan: how it was decided, what it removes, and a record per group (`plan_rows`)."""
    return {
        "decided_by": plan.decided_by,
        "removed": dict(plan.removed),
        "groups": list(rows),
    }


def write_plan(record: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    """Writes a plan (`plan_record`) as JSON, with the settings that it was made with."""
    write_json({"explained": EXPLAINED, **record, "settings": dict(settings)}, path)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the settings that a plan was made with; none of a file that states none."""
    record = read_json(path, WHAT)
    settings = record.get("settings") if isinstance(record, dict) else None
    return settings if isinstance(settings, dict) else {}


def read_plan(path: str | os.PathLike[str]) -> dict[str, int]:
    """Returns the widths by group name. Raises ValueError where the file is no plan, and for a width that is none."""
    try:
        rows = [(row["name"], row["width"]) for row in read_json(path, WHAT)["groups"]]
    except (KeyError, TypeError):
        # A file of another form fails the first check below, and so gets its message.
        rows = [(None, None)]

    widths: dict[str, int] = {}
    for name, width in rows:
        if type(name) is not str:
            raise ValueError(
                f"{path} is no plan; write one with --plan_only, and in it change only the widths."
            )

        # `isinstance` would let JSON's true pass for 1.
        if type(width) is not int:
            raise ValueError(
                f"{path} gives group {name} the width {json.dumps(width)[:60]}; it must be a whole number."
            )
        if name in widths:
            raise ValueError(f"{path} names group {name} twice; leave one of them.")
        widths[name] = width
    return widths
