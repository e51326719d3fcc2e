"""Pictures of labels: overlays, colour masks, legends, error maps and contact sheets, drawn with Pillow.

Images are uint8 [H, W, 3] RGB, labels uint8 [H, W] holding class numbers, 255 ignored. A palette is 768 numbers in
0..255: red, green and blue of each label in turn. Nothing here reads or writes a picture; fonts are looked for on
the system where Pillow's own lacks a letter, and a name that no font can draw is left out beside its number.
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

Row = tuple[str, Bytes, Bytes, Bytes]  # name, image, labels, predicted
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# tried in turn for names that Pillow's font, which has little beyond ASCII, cannot draw
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
    """[H, W, 3]: every label in its colour."""
    painted: Bytes = np.asarray(palette, dtype=np.uint8).reshape(256, 3)[labels]
    return painted


def overlay(image: Bytes, labels: Bytes, palette: Sequence[int], alpha: float = 0.5) -> Bytes:
    """The image with the labels' colours over it, `alpha` in 0..1 of them; black, mostly background, hides nothing."""
    painted = paint(labels, palette)
    painted = np.where(painted.any(axis=2, keepdims=True), painted, image)
    return np.asarray(Image.blend(Image.fromarray(image), Image.fromarray(painted), alpha))


def mask_image(labels: Bytes, palette: Sequence[int]) -> Image.Image:
    """A palette picture: its pixels are the labels, and viewers show their colours."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette)
    return picture


def side_by_side(image: Bytes, mask: Bytes, gap: int = GAP) -> Bytes:
    """[H, W + gap + W, 3]: an image and its painted mask, white between them."""
    between = np.full((image.shape[0], gap, 3), 255, dtype=np.uint8)
    return np.concatenate([image, between, mask], axis=1)


def error_map(labels: Bytes, predicted: Bytes) -> Bytes:
    """[H, W, 3]: white where the prediction is right, red where it is wrong, grey where the label is ignored."""
    kind = np.where(labels == IGNORE_INDEX, 2, labels != predicted)
    drawn: Bytes = np.array([RIGHT, WRONG, IGNORED], dtype=np.uint8)[kind]
    return drawn


def legend(
    class_names: Sequence[str], palette: Sequence[int], present: Iterable[int] | None = None, width: int = 640
) -> Image.Image:
    """The classes' colours, numbers and names in as many columns as `width` pixels hold, no wider than needed.

    `present` picks labels, all classes if None; 255 among them stands as "ignored".
    """
    shown = range(len(class_names)) if present is None else sorted(set(present))
    swatch, line = FONT_SIZE + 3, FONT_SIZE + 13
    texts = [_label_text(label, class_names) for label in shown]
    room = width - 3 * GAP - swatch
    column = swatch + 3 * GAP + min(room, max((_width(text) for text in texts), default=0))
    columns = max(1, min(width // column, len(texts)))
    width = min(width, GAP + columns * column)
    sheet = Image.new("RGB", (width, GAP + line * max(1, -(-len(texts) // columns))), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (label, text) in enumerate(zip(shown, texts, strict=True)):
        left, top = GAP + place % columns * column, GAP + place // columns * line
        colour = tuple(palette[3 * label : 3 * label + 3])
        draw.rectangle((left, top, left + swatch, top + swatch), fill=colour, outline=EDGE)
        _write(draw, (left + swatch + GAP, top + swatch // 2), text, room)
    return sheet


def contact_sheet(
    rows: Sequence[Row], palette: Sequence[int], class_names: Sequence[str], columns: int = 1
) -> Image.Image:
    """Pictures with ground truth, prediction and where they differ, `columns` pictures beside each other.

    Below stands the legend of the classes that occur. ValueError for no row, and for one whose sizes differ.
    """
    if not rows:
        raise ValueError("A contact sheet of no picture was asked for; give one row at least.")
    blocks = [_block(*row, palette) for row in rows]
    columns = max(1, min(columns, len(blocks)))
    step = blocks[0].width + 2 * GAP
    lefts = [GAP + column * step for column in range(columns)]
    present = {int(label) for _, _, labels, predicted in rows for label in np.union1d(labels, predicted)}
    below = legend(class_names, palette, present, columns * step)
    heights = [max(b.height for b in blocks[i : i + columns]) + GAP for i in range(0, len(blocks), columns)]
    head = FONT_SIZE + 2 * GAP
    sheet = Image.new("RGB", (columns * step, head + sum(heights) + GAP + below.height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((0, 0, sheet.width, head - GAP // 2), fill=BAND)
    for left in lefts:
        for i, heading in enumerate(HEADINGS):
            _write(draw, (left + i * (PANEL + GAP), head // 2 - 2), heading, PANEL)
    for i, block in enumerate(blocks):
        sheet.paste(block, (lefts[i % columns], head + sum(heights[: i // columns])))
    sheet.paste(below, (0, sheet.height - below.height))
    return sheet


def _block(name: str, image: Bytes, labels: Bytes, predicted: Bytes, palette: Sequence[int]) -> Image.Image:
    """One picture's four panels, and over them its name and how much of it is right."""
    if not image.shape[:2] == labels.shape == predicted.shape:
        sizes = ", ".join("×".join(map(str, array.shape[:2])) for array in (image, labels, predicted))
        raise ValueError(f"{name}: image, labels and prediction are {sizes} (H×W); give all three in one size.")
    scale = PANEL / max(labels.shape)
    size = (max(1, round(labels.shape[1] * scale)), max(1, round(labels.shape[0] * scale)))  # W, H
    how = Image.Resampling.BILINEAR if scale < 1 else Image.Resampling.NEAREST
    panels = [Image.fromarray(image).resize(size, how)] + [
        Image.fromarray(panel).resize(size, Image.Resampling.NEAREST)
        for panel in (paint(labels, palette), paint(predicted, palette), error_map(labels, predicted))
    ]
    caption = FONT_SIZE + 9
    block = Image.new("RGB", (4 * PANEL + 3 * GAP + 2, caption + size[1] + 2), PAPER)  # 2 for the frames
    draw = ImageDraw.Draw(block)
    for i, panel in enumerate(panels):
        left = 1 + i * (PANEL + GAP)
        block.paste(panel, (left, caption))
        draw.rectangle((left - 1, caption - 1, left + size[0], caption + size[1]), outline=EDGE)
    known = labels != IGNORE_INDEX
    right = f"{100 * np.mean(labels[known] == predicted[known]):.1f} % right" if known.any() else "no labels"
    _write(draw, (0, caption // 2), name, 3 * (PANEL + GAP) - GAP)
    _write(draw, (3 * (PANEL + GAP), caption // 2), right, PANEL)
    return block


def _label_text(label: int, class_names: Sequence[str]) -> str:
    """Number and name, the number alone where there is no name or no font for it."""
    if label >= len(class_names):
        return "ignored" if label == IGNORE_INDEX else str(label)
    name = " ".join(class_names[label].split())
    return str(label) if name in ("", str(label)) or _font(name) is None else f"{label} {name}"


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, room: int) -> None:
    """One line, its middle at `place` (left, y), cut with an ellipsis to `room` pixels; "?" for what no font has."""
    font = _font(text)
    if font is None:
        text = "".join(letter if _font(letter) is not None else "?" for letter in text)
        font = _font(text) or _default()
    if font.getlength(text) > room:
        fitting = bisect_right(range(len(text)), room, key=lambda end: ceil(font.getlength(text[:end] + "…")))
        text = text[: max(0, fitting - 1)] + "…"
    draw.text(place, text, fill=INK, font=font, anchor="lm")


def _width(text: str) -> int:
    font = _font(text) or _default()
    return round(font.getlength(text))


@lru_cache(maxsize=4096)
def _font(text: str) -> Font | None:
    """The first font that has all of the text's letters."""
    if _has_all(_default(), text):
        return _default()
    return next((font for name in FONTS if (font := _named(name)) is not None and _has_all(font, text)), None)


@cache
def _default() -> Font:
    return ImageFont.load_default(FONT_SIZE)


@cache
def _named(name: str) -> Font | None:
    try:
        return ImageFont.truetype(name, FONT_SIZE)
    except OSError:  # not on this system
        return None


def _has_all(font: Font, text: str) -> bool:
    return all(_has(font, letter) for letter in text)


@lru_cache(maxsize=4096)
def _has(font: Font, letter: str) -> bool:
    """Whether it does not come out as the box that a font draws for what it lacks."""
    never_a_letter = "\U0010ffff"
    return letter.isspace() or _drawn(font, letter) != _drawn(font, never_a_letter)


def _drawn(font: Font, letter: str) -> tuple[object, bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
