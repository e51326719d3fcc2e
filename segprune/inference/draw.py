"""What is drawn of labels: overlays, colour masks, legends, error maps and contact sheets, with Pillow.

Images are uint8 [H, W, 3] RGB, labels uint8 [H, W] holding class numbers, 255 ignored. A palette is 768 numbers in
0..255: red, green and blue of each label in turn. Nothing here reads or writes an image file. Where Pillow's own font
lacks a letter, the system's fonts are tried; a name that no font can draw is left out beside its number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from math import ceil

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segprune.data import IGNORE_INDEX
from segprune.data.transforms import Bytes
from segprune.spec import RGB

Row = tuple[str, Bytes, Bytes, Bytes]  # name, image, labels, predicted
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Tried in turn for names that Pillow's own font cannot draw: it has little beyond ASCII.
FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "SourceHanSansCN-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "uming.ttc",
    "msyh.ttc",
    "simhei.ttf",
    "simsun.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc",
    "Arial Unicode.ttf",
)
FONT_SIZE = 15  # pixels
PAPER, BAND, INK, EDGE = (255, 255, 255), (232, 236, 240), (32, 32, 32), (150, 150, 150)
RIGHT, WRONG, IGNORED = (255, 255, 255), (214, 39, 40), (160, 160, 160)
HEADINGS = ("image", "ground truth", "prediction", "difference (red)")
PANEL, GAP = 224, 8  # pixels


def paint(labels: Bytes, palette: Sequence[int]) -> Bytes:
    """Returns [H, W, 3]: every label in its colour."""
    painted: Bytes = np.asarray(palette, dtype=np.uint8).reshape(256, 3)[labels]
    return painted


def as_rgb(image: Bytes) -> Bytes:
    """Returns [H, W, 3] to look at, of an image of any channels: the first three of more, the first alone of fewer."""
    channels = image.shape[2]
    if channels == RGB:
        return image
    return image[..., :RGB] if channels > RGB else np.repeat(image[..., :1], RGB, axis=2)


def overlay(image: Bytes, labels: Bytes, palette: Sequence[int], alpha: float = 0.5) -> Bytes:
    """Lays the labels' colours over the image with weight `alpha` in 0..1; black, mostly background, hides nothing."""
    image, painted = as_rgb(image), paint(labels, palette)
    painted = np.where(painted.any(axis=2, keepdims=True), painted, image)
    return np.asarray(Image.blend(Image.fromarray(image), Image.fromarray(painted), alpha))


def mask_image(labels: Bytes, palette: Sequence[int]) -> Image.Image:
    """Returns a palette image: its pixels are the labels, and viewers show their colours."""
    image = Image.fromarray(labels)
    image.putpalette(palette)
    return image


def side_by_side(image: Bytes, mask: Bytes) -> Bytes:
    """Returns [H, W + GAP + W, 3]: an image and its painted mask, white between them."""
    between = np.full((image.shape[0], GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([as_rgb(image), between, mask], axis=1)


def error_map(labels: Bytes, predicted: Bytes) -> Bytes:
    """Returns [H, W, 3]: white where the prediction is right, red where wrong, grey where the label is ignored."""
    kind = np.where(labels == IGNORE_INDEX, 2, labels != predicted)
    drawn: Bytes = np.array([RIGHT, WRONG, IGNORED], dtype=np.uint8)[kind]
    return drawn


def legend(
    class_names: Sequence[str],
    palette: Sequence[int],
    present: Iterable[int] | None = None,
    width: int = 640,
) -> Image.Image:
    """Draws the classes' colours, numbers and names in as many columns as `width` pixels hold, no wider than needed.

    `present` selects labels, all classes if None; 255 among them is written as "ignored".
    """
    shown = range(len(class_names)) if present is None else sorted(set(present))
    texts = [_label_text(label, class_names) for label in shown]

    # Lay out columns of a swatch and a text each.
    swatch, line = FONT_SIZE + 3, FONT_SIZE + 13
    # Longer names are cut, so that no column is wider than the sheet.
    room = width - 3 * GAP - swatch
    column = swatch + 3 * GAP + min(room, max((_width(text) for text in texts), default=0))
    columns = max(1, min(width // column, len(texts)))
    rows = max(1, ceil(len(texts) / columns))
    width = min(width, GAP + columns * column)

    sheet = Image.new("RGB", (width, GAP + line * rows), PAPER)
    draw = ImageDraw.Draw(sheet)
    # Row by row, from left to right.
    for place, (label, text) in enumerate(zip(shown, texts, strict=True)):
        row, number = divmod(place, columns)
        left, top = GAP + number * column, GAP + row * line
        colour = tuple(palette[3 * label : 3 * label + 3])
        draw.rectangle((left, top, left + swatch, top + swatch), fill=colour, outline=EDGE)
        _write(draw, (left + swatch + GAP, top + swatch // 2), text, room)
    return sheet


def contact_sheet(
    rows: Sequence[Row], palette: Sequence[int], class_names: Sequence[str]
) -> Image.Image:
    """Draws images below each other, each with ground truth, prediction and where they differ.

    The legend of the classes that occur stands below. ValueError for no row, and for one whose sizes differ.
    """
    if not rows:
        raise ValueError("A contact sheet of no image was asked for; give one row at least.")
    # The rows are drawn first, since the height of the sheet is the sum of theirs.
    blocks = [_draw_block(*row, palette) for row in rows]
    width = blocks[0].width + 2 * GAP

    # Explain only the classes that occur here; a data set may have 150 of them.
    present: set[int] = set()
    for _, _, labels, predicted in rows:
        present.update(np.union1d(labels, predicted).tolist())
    below = legend(class_names, palette, present, width)

    head = FONT_SIZE + 2 * GAP
    height = head + sum(block.height + GAP for block in blocks) + GAP + below.height
    sheet = Image.new("RGB", (width, height), PAPER)

    # The headings, over the panels of every row.
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((0, 0, width, head - GAP // 2), fill=BAND)
    for i, heading in enumerate(HEADINGS):
        _write(draw, (GAP + i * (PANEL + GAP), head // 2 - 2), heading, PANEL)

    # The rows from the top down, and the legend at the bottom.
    top = head
    for block in blocks:
        sheet.paste(block, (GAP, top))
        top += block.height + GAP
    sheet.paste(below, (0, height - below.height))
    return sheet


def _draw_block(
    name: str, image: Bytes, labels: Bytes, predicted: Bytes, palette: Sequence[int]
) -> Image.Image:
    """Draws one image's four panels, and over them its name and how much of it is right."""
    if not image.shape[:2] == labels.shape == predicted.shape:
        sizes = ", ".join(
            "×".join(map(str, array.shape[:2])) for array in (image, labels, predicted)
        )
        raise ValueError(
            f"{name}: image, labels and prediction are {sizes} (H×W); give all three in one size."
        )

    # Fit the longer side into a panel. Photographs may be smoothed, labels may not.
    scale = PANEL / max(labels.shape)
    size = (
        max(1, round(labels.shape[1] * scale)),
        max(1, round(labels.shape[0] * scale)),
    )  # W, H
    smooth = Image.Resampling.BILINEAR if scale < 1 else Image.Resampling.NEAREST
    panels = [Image.fromarray(as_rgb(image)).resize(size, smooth)]
    for panel in (
        paint(labels, palette),
        paint(predicted, palette),
        error_map(labels, predicted),
    ):
        panels.append(Image.fromarray(panel).resize(size, Image.Resampling.NEAREST))

    # Two pixels more each way for the frames.
    caption = FONT_SIZE + 9
    block = Image.new("RGB", (4 * PANEL + 3 * GAP + 2, caption + size[1] + 2), PAPER)
    draw = ImageDraw.Draw(block)
    for i, panel_image in enumerate(panels):
        left = 1 + i * (PANEL + GAP)
        block.paste(panel_image, (left, caption))
        draw.rectangle((left - 1, caption - 1, left + size[0], caption + size[1]), outline=EDGE)

    # Pixels without a label are neither right nor wrong.
    known = labels != IGNORE_INDEX
    right = (
        f"{100 * np.mean(labels[known] == predicted[known]):.1f} % right"
        if known.any()
        else "no labels"
    )
    _write(draw, (0, caption // 2), name, 3 * (PANEL + GAP) - GAP)
    _write(draw, (3 * (PANEL + GAP), caption // 2), right, PANEL)
    return block


def _label_text(label: int, class_names: Sequence[str]) -> str:
    """Returns number and name; the number alone if there is no name or no font for it."""
    if label >= len(class_names):
        return "ignored" if label == IGNORE_INDEX else str(label)

    # Line breaks in a name would spoil the layout of the legend.
    name = " ".join(class_names[label].split())
    nameless = name in ("", str(label)) or _find_font(name) is None
    return str(label) if nameless else f"{label} {name}"


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, room: int) -> None:
    """Writes one line, its middle at `place` (left, y), cut with an ellipsis to `room` pixels.

    Letters that no font has become "?".
    """
    font = _find_font(text)
    if font is None:
        # A letter that the font lacks would be drawn as an empty box.
        text = "".join(letter if _find_font(letter) is not None else "?" for letter in text)
        font = _find_font(text) or _default_font()

    if font.getlength(text) > room:
        # The length grows with the text, so the longest beginning that fits is found by bisection.
        num_fitting = bisect_right(
            range(len(text)), room, key=lambda end: ceil(font.getlength(text[:end] + "…"))
        )
        text = text[: max(0, num_fitting - 1)] + "…"
    draw.text(place, text, fill=INK, font=font, anchor="lm")


def _width(text: str) -> int:
    font = _find_font(text) or _default_font()
    return round(font.getlength(text))


@lru_cache(maxsize=4096)
def _find_font(text: str) -> Font | None:
    """Returns the first font that has all of the text's letters, if there is one."""
    # The default font first: it comes with Pillow, so it is there on every machine.
    if _has_all(_default_font(), text):
        return _default_font()

    for name in FONTS:
        font = _open_font(name)
        if font is not None and _has_all(font, text):
            return font
    return None


@cache
def _default_font() -> Font:
    return ImageFont.load_default(FONT_SIZE)


@cache
def _open_font(name: str) -> Font | None:
    try:
        return ImageFont.truetype(name, FONT_SIZE)
    except OSError:  # not on this system
        return None


def _has_all(font: Font, text: str) -> bool:
    return all(_has(font, letter) for letter in text)


@lru_cache(maxsize=4096)
def _has(font: Font, letter: str) -> bool:
    """Tells whether a font has a letter: for one that it lacks, a font draws the same box always."""
    never_a_letter = "\U0010ffff"
    return letter.isspace() or _draw_letter(font, letter) != _draw_letter(font, never_a_letter)


def _draw_letter(font: Font, letter: str) -> tuple[object, bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
