"""Plots as PNG files: bars per class, the confusion matrix, the curves of a training run, trade-offs.

They are drawn by matplotlib's Agg on figures of their own: no window, no global state. Shares are in [0, 1]. A file is
written whole or not at all. Class names in scripts that matplotlib's own font lacks take a font of the system that has
them; if there is none, the class's number replaces its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator

from segprune.files import atomic_path

CJK_FONTS = (  # beginnings of file names tried first; then whatever has the characters
    "notosanscjk-regular",
    "notosanssc-regular",
    "sourcehansanssc-regular",
    "msyh.",
    "pingfang.",
    "simhei.",
    "wqy-",
)
BLUE, ORANGE, GREY = "#2a6fb0", "#d9822b", "#9a9a9a"
LONGEST_NAME = 24  # characters
LONGEST_PATH = 70
FEW_CLASSES = 24  # up to this many, the matrix shows its numbers
DPI = 120


def bars(values: Sequence[float | None], names: Sequence[str], title: str, path: Path) -> None:
    """Draws one horizontal bar per class, the first on top; a class without a value is called absent."""
    number = len(values)
    # The figure grows with the classes, or many bars would overlap.
    figure = Figure(figsize=(7.5, 1.1 + 0.27 * number))
    axes = figure.subplots()
    axes.barh(range(number), [value or 0.0 for value in values], height=0.7, color=BLUE)
    # An absent class is named as such: its empty bar would read as a score of 0.
    for k, value in enumerate(values):
        text = "absent" if value is None else f"{value:.3f}"
        axes.text(
            (value or 0.0) + 0.01,
            k,
            text,
            va="center",
            fontsize=8,
            color=GREY if value is None else "black",
        )

    # Shares end at 1; the room beyond is for the numbers.
    axes.set_title(title)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    # Upside down, since matplotlib counts from the bottom.
    axes.set_ylim(number - 0.4, -0.6)
    axes.xaxis.grid(True, color="#dddddd")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)

    labels, font = _labels(names, number)
    axes.set_yticks(range(number), labels, fontproperties=font)
    _save(figure, path)


def confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """Draws K×K pixel counts, rows labels, as shares of each row; a class without a label has an empty row."""
    number = len(matrix)
    # A class without a label has a sum of 0, hence `or 1`.
    shares = [[count / (sum(row) or 1) for count in row] for row in matrix]
    # A large matrix gets smaller cells, and no numbers in them.
    cell = 0.5 if number <= FEW_CLASSES else max(0.13, 12 / number)  # inches
    figure = Figure(figsize=(2.6 + cell * number, 1.9 + cell * number))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)

    # In the small cells of many classes, numbers could not be read.
    if number <= FEW_CLASSES:
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                # Leave out what rounds to 0.00, and write in white on dark cells.
                if share >= 0.005:
                    colour = "white" if share > 0.55 else "black"
                    axes.text(
                        j, i, f"{share:.2f}", ha="center", va="center", fontsize=8, color=colour
                    )

    axes.set_title("Share of each class's labelled pixels")
    axes.set_xlabel("predicted")
    axes.set_ylabel("labelled")
    labels, font = _labels(names, number)
    # A cell is 72 · `cell` points high, and the letters have to fit into it.
    font.set_size(9 if number <= FEW_CLASSES else min(9, cell * 60))
    axes.set_xticks(range(number), labels, rotation=90, fontproperties=font)
    axes.set_yticks(range(number), labels, fontproperties=font)
    _save(figure, path)


def curves(history: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draws epoch_loss.png and, if any epoch was scored, epoch_miou.png; returns what was written.

    Rows have `epoch` and `loss`, some of them `miou`, and all or none of them `lr`, drawn below the loss.
    """
    epochs = [row["epoch"] for row in history]

    # The loss, with the learning rate below it.
    # The rate is drawn only if every epoch has one: a curve with gaps would mislead.
    with_lr = all("lr" in row for row in history)
    figure = Figure(figsize=(7.5, 5.6 if with_lr else 4.2))
    panels = figure.subplots(
        1 + with_lr, sharex=True, squeeze=False, height_ratios=(3, 1)[: 1 + with_lr]
    )[:, 0]
    _curve(panels[0], epochs, [row["loss"] for row in history], "training loss", BLUE)
    if with_lr:
        _curve(panels[1], epochs, [row["lr"] for row in history], "learning rate", GREY)
    panels[-1].set_xlabel("epoch")
    written = [folder / "epoch_loss.png"]
    _save(figure, written[0])

    # The score, with a ring around the best epoch.
    scored = [row for row in history if "miou" in row]
    if scored:
        figure = Figure(figsize=(7.5, 4.2))
        axes = figure.subplots()
        _curve(
            axes,
            [row["epoch"] for row in scored],
            [row["miou"] for row in scored],
            "validation mIoU",
            ORANGE,
        )
        best = max(scored, key=lambda row: row["miou"])
        axes.set_title(f"best {best['miou']:.4f} in epoch {best['epoch']}", fontsize=10)
        axes.plot(
            best["epoch"],
            best["miou"],
            "o",
            markersize=9,
            markerfacecolor="none",
            color="black",
        )
        axes.set_xlabel("epoch")
        written.append(folder / "epoch_miou.png")
        _save(figure, written[1])
    return written


def trade_off(
    points: Mapping[str, Sequence[tuple[float, float]]],
    y_name: str,
    path: Path,
    *,
    x_name: str = "",
    ringed: Sequence[tuple[float, float]] = (),
) -> None:
    """Draws what each file takes against what it gives; a colour for each file.

    Without `x_name` the points are latencies of unrelated networks; with it each file's points are one curve. A ring
    is drawn around those of `ringed`.
    """
    figure = Figure(figsize=(7.5, 4.8))
    axes = figure.subplots()
    for name, own in points.items():
        # The end of a path tells files apart better than its beginning.
        label = (name if len(name) <= LONGEST_PATH else "…" + name[1 - LONGEST_PATH :]).replace(
            "$", r"\$"
        )
        x, y = [point[0] for point in own], [point[1] for point in own]
        # A blank before the label, since a leading _ would hide it.
        style = "o-" if x_name else "o"
        axes.plot(x, y, style, markersize=7, alpha=0.8, label=" " + label)
    for x_ringed, y_ringed in ringed:
        axes.plot(x_ringed, y_ringed, "o", markersize=14, markerfacecolor="none", color="black")

    # On a log axis, twice as fast is the same distance everywhere.
    axes.set_xscale("log")
    axes.set_xlabel(x_name or "latency of a pass, median (ms)")
    axes.set_ylabel(y_name)
    axes.grid(True, which="both", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Below the axes, where long names hide no point.
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    _save(figure, path)


def lines_svg(
    lines: Sequence[tuple[Sequence[tuple[float, float]], str, bool]],
    *,
    whole_x: bool = False,
    least_height: float = 0.0,
) -> str:
    """Returns a chart as an SVG element for a page: points (x, y) with a colour, joined or not; in all two at least.

    The y axis spans at least `least_height`, or differences that mean nothing would fill the chart.

    Axes have numbers alone, in the page's own colour and font; what they mean is for the page to write.
    """
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    for points, colour, joined in lines:
        x, y = [point[0] for point in points], [point[1] for point in points]
        style = "o-" if joined else "D"
        axes.plot(x, y, style, color=colour, markersize=5 if joined else 7, linewidth=1.6)
    bottom, top = axes.get_ylim()
    if top - bottom < least_height:
        middle = (bottom + top) / 2
        axes.set_ylim(middle - least_height / 2, middle + least_height / 2)
    axes.grid(True, color="#808080", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if whole_x:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    # Text stays text, in a colour that is replaced by the one of the page around it.
    ink = "#010203"
    axes.tick_params(colors=ink)
    for spine in axes.spines.values():
        spine.set_color(ink)
    file = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "segprune"}):
        figure.savefig(
            file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Groups of several charts have the same names, which a page may hold once.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return svg[svg.index("<svg") :].replace(ink, "currentColor")


def _curve(axes: Axes, x: Sequence[float], y: Sequence[float], name: str, colour: str) -> None:
    axes.plot(x, y, color=colour, marker="o" if len(x) < 30 else None, markersize=3.5)
    axes.set_ylabel(name)
    axes.grid(True, color="#dddddd")
    axes.set_xlim(min(x) - 0.5, max(x) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.1)


def _labels(names: Sequence[str], number: int) -> tuple[list[str], FontProperties]:
    """Returns the text beside each class, and the font to write it in."""
    known = [" ".join(name.split()) for name in names[:number]]
    known += [""] * (number - len(known))
    short = [
        name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in known
    ]
    # One font for all names; those with a letter it lacks are shown as numbers.
    font, characters = _font_for(frozenset("".join(short)))
    labels = [
        name if name and characters.issuperset(name) else str(k) for k, name in enumerate(short)
    ]
    escaped = [
        label.replace("$", r"\$") for label in labels
    ]  # matplotlib takes $…$ for a formula
    return escaped, FontProperties(fname=font, size=9)


@cache
def _font_for(characters: frozenset[str]) -> tuple[str, frozenset[str]]:
    """Returns a font's file and which of the characters it has; matplotlib's own font if none has all of them."""
    # The plain font first, as others differ between machines.
    own = findfont(FontProperties(family="DejaVu Sans"))
    if characters == (had := _had(own, characters)):
        return own, had
    for path in sorted(findSystemFonts(), key=_rank):
        if characters == _had(path, characters):
            return path, characters
    return own, had


def _had(path: str, characters: frozenset[str]) -> frozenset[str]:
    try:
        codes = FT2Font(path).get_charmap().keys()
    except (OSError, RuntimeError):  # not a font that can be drawn with
        return frozenset()
    return frozenset(character for character in characters if ord(character) in codes)


def _rank(path: str) -> tuple[int, bool, str]:
    """Sorts fonts known to be good first, then upright ones of normal weight."""
    name = Path(path).name.lower()
    known = [i for i, part in enumerate(CJK_FONTS) if name.startswith(part)]
    return min(known, default=len(CJK_FONTS)), "regular" not in name, name
