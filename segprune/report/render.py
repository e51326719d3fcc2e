"""The page: facts and images put into one HTML file that asks for nothing from outside.

The template is jinja2's, with everything escaped: names and paths come from strangers. Both languages stand in the page,
and a style shows one of them. Charts are matplotlib's SVG, which is in use for the plots already; bars are plain boxes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import segprune
from segprune.model import PARTS
from segprune.report.examples import CHANGES, NUM_TRIED, Example
from segprune.report.gather import WIDTHS, Facts, Note, Point
from segprune.report.words import WORDS

Language = Literal["en", "zh"]
TEMPLATES = Path(__file__).parent / "templates"
UNITS = {"parameters": 1e6, "macs": 1e9, "latency_ms": 1.0}  # of an axis
COLOURS = ("#2a78c2", "#d9822b", "#3a9a5b", "#b0508f", "#8a6bbf", "#a08a2a")  # of the curves
FELT = 0.005  # of mIoU or IoU: what is lost below is not worth a warning, or a fine-tuning
LEAST_MIOU = 0.02  # that the y axis of the trade-off spans: less looks like a difference where there is none


@dataclass(frozen=True)
class Gallery:
    """The examples with the names and colours of their classes, or a note why there are none."""

    examples: tuple[Example, ...] = ()
    class_names: Sequence[str] = ()
    palette: Sequence[int] = ()
    note: Note | None = None


def render(facts: Facts, gallery: Gallery, lang: Language) -> str:
    """Returns the page as HTML."""
    trade_off, curves = _draw_points(facts)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    notes = list(facts.notes)
    if gallery.note is not None:
        notes.append(gallery.note)

    return (
        _environment()
        .get_template("report.html")
        .render(
            facts=facts,
            gallery=gallery,
            legend=_legend(gallery),
            dense=facts.networks[0] if facts.networks else None,
            last=facts.networks[-1] if facts.networks else None,
            notes=notes,
            felt=FELT,
            lang=lang,
            version=segprune.__version__,
            kinds=WIDTHS,
            part_names=PARTS,
            changes=[_hex(colour) for colour in CHANGES],
            num_tried=NUM_TRIED,
            trade_off=trade_off,
            curves=curves,
            training=_draw_epochs(facts),
            unit=UNITS.get(facts.cost, 1.0),
            script=Markup(script),
            script_hash=_hash(script),
            style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        )
    )


def say(key: str, **facts: object) -> Markup:
    """Returns a sentence in both languages; whatever is filled in is escaped."""
    english, chinese = WORDS[key]
    both = Markup('<span lang="en">{}</span><span lang="zh-CN">{}</span>')
    return both.format(Markup(english).format(**facts), Markup(chinese).format(**facts))


def percent(before: float | None, after: float | None) -> str:
    """Returns the change in per cent, with a sign; "–" if it is not known.

    >>> percent(4.0, 3.0)
    '−25.0 %'
    """
    if not before or after is None:
        return "–"
    return _signed(100 * (after / before - 1)) + " %"


def points(before: float | None, after: float | None) -> str:
    """Returns a difference of shares in points.

    >>> points(0.5, 0.512)
    '+1.2'
    """
    if before is None or after is None:
        return "–"
    return _signed(100 * (after - before))


def number(value: float | None, digits: int = 2, unit: float = 1.0) -> str:
    return "–" if value is None else f"{value / unit:,.{digits}f}"


def _signed(value: float) -> str:
    # A true minus is as wide as the plus, and 0 has no sign.
    rounded = round(value, 1)
    sign = "+" if rounded > 0 else "−" if rounded < 0 else ""
    return f"{sign}{abs(rounded):.1f}"


def _hex(colour: Sequence[int]) -> str:
    return "#" + bytes(colour).hex()


def _hash(script: str) -> str:
    """Returns what the page's policy allows to run: this script, and none that a name smuggles in."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _legend(gallery: Gallery) -> list[tuple[str, str]]:
    """Returns colour and name of each class that occurs in the examples."""
    present: set[int] = set()
    for example in gallery.examples:
        present.update(example.classes)
    rows = []
    for k in sorted(present):
        name = gallery.class_names[k] if k < len(gallery.class_names) else ""
        rows.append((_hex(gallery.palette[3 * k : 3 * k + 3]), name.strip() or str(k)))
    return rows


def _draw_points(facts: Facts) -> tuple[Markup, list[tuple[str, str]]]:
    """Returns the chart of the trade-off, and colour and name of each curve in it."""
    if len(facts.points) < 2:
        return Markup(""), []
    unit = UNITS.get(facts.cost, 1.0)
    by_curve: dict[str, list[Point]] = {}
    for point in facts.points:
        by_curve.setdefault(point.curve, []).append(point)

    # Networks that stand alone have a name beside them, those of a curve a line through them.
    lines, names = [], []
    for k, (name, own) in enumerate(by_curve.items()):
        own = sorted(own, key=lambda point: point.cost)
        pairs = [(point.cost / unit, point.miou) for point in own]
        lines.append((pairs, COLOURS[k % len(COLOURS)], bool(name)))
        names.append((COLOURS[k % len(COLOURS)], name))
    from segprune import plots  # drawing takes a second to import

    return Markup(plots.lines_svg(lines, least_height=LEAST_MIOU)), names


def _draw_epochs(facts: Facts) -> list[tuple[str, Markup]]:
    """Returns the charts of a training run, each with the word that names it."""
    if len(facts.epochs) < 2:
        return []
    from segprune import plots

    charts = []
    for key, column, colour in (("loss", 1, COLOURS[0]), ("miou_val", 2, COLOURS[1])):
        pairs = [(row[0], row[column]) for row in facts.epochs if row[column] is not None]
        if len(pairs) > 1:
            chart = plots.lines_svg([(pairs, colour, True)], whole_x=True)  # type: ignore[list-item]
            charts.append((key, Markup(chart)))
    return charts


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(say=say, percent=percent, points=points, number=number)
    environment.filters["M"] = partial(number, unit=1e6)
    environment.filters["G"] = partial(number, unit=1e9)
    return environment
