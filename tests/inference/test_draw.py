"""What is drawn of labels: colours against the palette, what is written against what fonts can draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segprune.data import draw_shapes, load_mask, voc_palette
from segprune.inference import draw
from segprune.inference.draw import (
    GAP,
    IGNORED,
    PANEL,
    RIGHT,
    WRONG,
    contact_sheet,
    error_map,
    legend,
    mask_image,
    overlay,
    paint,
    side_by_side,
)

PALETTE = voc_palette()
IMAGE, LABELS = draw_shapes(5, "val", 0, (40, 60))


@pytest.fixture(autouse=True)
def _fonts_found_anew() -> Iterator[None]:
    yield
    draw._find_font.cache_clear()
    draw._open_font.cache_clear()


def test_a_label_is_painted_in_its_palette_colour() -> None:
    labels = np.array([[0, 1, 2], [3, 20, 255]], dtype=np.uint8)
    published = [
        [(0, 0, 0), (128, 0, 0), (0, 128, 0)],
        [(128, 128, 0), (0, 64, 128), (224, 224, 192)],
    ]  # VOC's
    assert paint(labels, PALETTE).tolist() == np.array(published).tolist()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_an_overlay_mixes_image_and_colour_and_leaves_black_classes_out(alpha: float) -> None:
    colours = paint(LABELS, PALETTE)
    mixed = (1 - alpha) * IMAGE + alpha * colours
    expected = np.where(colours.any(axis=2, keepdims=True), mixed, IMAGE)
    drawn = overlay(IMAGE, LABELS, PALETTE, alpha)
    assert (drawn.dtype, drawn.shape) == (np.uint8, IMAGE.shape)
    assert np.abs(drawn - expected).max() <= 1
    assert (LABELS > 0).any()


def test_a_mask_keeps_the_labels_as_its_pixels_and_shows_their_colours(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[:3] = 255
    mask_image(labels, PALETTE).save(tmp_path / "mask.png")
    assert np.array_equal(load_mask(tmp_path / "mask.png"), labels)
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.asarray(mask.convert("RGB")), paint(labels, PALETTE))


def test_side_by_side_has_both_whole_with_white_between() -> None:
    mask = paint(LABELS, PALETTE)
    drawn = side_by_side(IMAGE, mask)
    assert np.array_equal(drawn[:, :60], IMAGE)
    assert (drawn[:, 60 : 60 + GAP] == 255).all()
    assert np.array_equal(drawn[:, 60 + GAP :], mask)


def test_an_error_map_tells_right_wrong_and_ignored_apart() -> None:
    labels = np.array([[1, 1, 255, 255]], dtype=np.uint8)
    predicted = np.array([[1, 2, 1, 255]], dtype=np.uint8)
    assert error_map(labels, predicted).tolist() == [
        [list(RIGHT), list(WRONG), list(IGNORED), list(IGNORED)]
    ]


def colours_in(picture: Image.Image) -> set[tuple[int, ...]]:
    counted = picture.getcolors(picture.width * picture.height)
    return {colour for _, colour in counted if isinstance(colour, tuple)}


def test_a_legend_shows_the_colours_that_are_asked_for_and_no_others() -> None:
    names = [f"class {k}" for k in range(30)]
    wanted = {tuple(PALETTE[3 * k : 3 * k + 3]) for k in (3, 7, 29)}
    others = {tuple(PALETTE[3 * k : 3 * k + 3]) for k in range(30)} - wanted
    shown = colours_in(legend(names, PALETTE, [29, 3, 7, 7]))
    assert wanted <= shown
    assert not others & shown
    assert wanted | others <= colours_in(legend(names, PALETTE))


@pytest.mark.parametrize("width", [160, 400, 900])
@pytest.mark.parametrize("longest", [1, 20, 200])
def test_a_legend_is_no_wider_than_allowed_and_cuts_nothing_off(
    longest: int, width: int
) -> None:
    names = [*"abcdefg", "m" * longest]
    sheet = np.asarray(legend(names, PALETTE, width=width))
    assert sheet.shape[1] <= width
    assert (sheet[:, -2:] == 255).all()  # paper at the right and below
    assert (sheet[-2:] == 255).all()
    assert {tuple(PALETTE[3 * k : 3 * k + 3]) for k in range(8)} <= colours_in(
        Image.fromarray(sheet)
    )


def test_a_legend_of_nothing_is_blank_paper() -> None:
    assert colours_in(legend([], PALETTE)) == {(255, 255, 255)}


def test_ignored_pixels_have_their_own_entry() -> None:
    assert draw._label_text(255, ["a", "b"]) == "ignored"
    assert draw._label_text(255, ["c"] * 256) == "255 c"


@pytest.mark.parametrize(
    ("name", "text"), [("cat", "0 cat"), (" two\nlines ", "0 two lines"), ("0", "0"), ("", "0")]
)
def test_a_class_is_written_as_number_and_name(name: str, text: str) -> None:
    assert draw._label_text(0, [name]) == text


def test_a_class_without_a_name_is_written_as_its_number() -> None:
    assert draw._label_text(4, ["a"]) == "4"


CAT = "\u732b"
LETTER = """STARTCHAR {name}
ENCODING {code}
SWIDTH 500 0
DWIDTH 15 0
BBX 8 8 0 0
BITMAP
{rows}
ENDCHAR
"""


@pytest.fixture
def chinese_font(tmp_path: Path) -> Path:
    """A bitmap font that has one Chinese letter, digits' space, and a box for what it lacks."""
    letters = {
        "box": (0, "FF\n" + "81\n" * 6 + "FF"),
        "cat": (ord(CAT), "AA\n55\n" * 4),
        "zero": (48, "3C\n" * 8),
    }
    letters["blank"] = (32, "00\n" * 8)
    body = "".join(
        LETTER.format(name=name, code=code, rows=rows.strip())
        for name, (code, rows) in letters.items()
    )
    path = tmp_path / "cjk.bdf"
    path.write_text(
        "STARTFONT 2.1\nFONT -test-cjk-medium-r-normal--15-150-72-72-p-80-iso10646-1\nSIZE 15 72 72\n"
        "FONTBOUNDINGBOX 8 15 0 0\nSTARTPROPERTIES 5\nPIXEL_SIZE 15\nFONT_ASCENT 12\nFONT_DESCENT 3\n"
        'CHARSET_REGISTRY "ISO10646"\nCHARSET_ENCODING "1"\nENDPROPERTIES\n'
        f"CHARS {len(letters)}\n{body}ENDFONT\n"
    )
    return path


def test_a_chinese_name_is_written_where_a_font_has_it(
    chinese_font: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "FONTS", ("no such font.ttf", str(chinese_font)))
    assert draw._label_text(0, [CAT]) == f"0 {CAT}"
    with_name, without = (np.asarray(legend([name], PALETTE)) for name in (CAT, ""))
    assert not np.array_equal(with_name, without)


def test_a_name_that_no_font_has_becomes_the_number_and_never_boxes(
    chinese_font: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "FONTS", (str(chinese_font),))
    assert draw._label_text(3, ["a", "b", "c", "\u72d7"]) == "3"
    monkeypatch.setattr(draw, "FONTS", ())
    names = [CAT, "\u72d7"]
    assert np.array_equal(
        np.asarray(legend(names, PALETTE)), np.asarray(legend(["", ""], PALETTE))
    )


def test_an_image_whose_name_no_font_has_is_captioned_with_question_marks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draw, "FONTS", ())
    sheets = [
        np.asarray(contact_sheet([(name, IMAGE, LABELS, LABELS)], PALETTE, []))
        for name in (f"{CAT}1.jpg", "?1.jpg")
    ]
    assert np.array_equal(*sheets)


def test_a_contact_sheet_shows_image_truth_prediction_and_difference() -> None:
    predicted = np.zeros_like(LABELS)
    image = np.kron(IMAGE, np.ones((4, 4, 1), dtype=np.uint8))[
        :, :PANEL
    ]  # no resampling is needed for a panel
    labels, predicted = (
        np.kron(x, np.ones((4, 4), dtype=np.uint8))[:, :PANEL] for x in (LABELS, predicted)
    )
    sheet = np.asarray(contact_sheet([("a", image, labels, predicted)], PALETTE, ["zero"]))
    panels = (
        image,
        paint(labels, PALETTE),
        paint(predicted, PALETTE),
        error_map(labels, predicted),
    )
    found = [
        (y, x)
        for x in range(sheet.shape[1] - PANEL)
        for y in range(40, 70)
        if np.array_equal(sheet[y, x : x + PANEL], image[0])
    ]
    (top, left) = found[0]
    for i, panel in enumerate(panels):
        x = left + i * (PANEL + GAP)
        assert np.array_equal(sheet[top : top + len(panel), x : x + PANEL], panel)
    assert (sheet[40:, -2:] == 255).all()  # nothing reaches the right edge


def test_each_image_stands_below_the_one_before() -> None:
    row = ("a", IMAGE, LABELS, LABELS)
    one, two, five = (
        contact_sheet([row] * number, PALETTE, ["zero"] * 8) for number in (1, 2, 5)
    )
    assert one.width == two.width == five.width
    assert five.height - one.height == 4 * (two.height - one.height)


def test_images_of_all_sizes_and_names_fit_on_one_sheet() -> None:
    rows = []
    for size in ((1, 1), (3, 900), (900, 3), (32, 32)):
        labels = np.full(size, 255, dtype=np.uint8)
        rows.append(
            ("n" * 500, np.zeros((*size, 3), dtype=np.uint8), labels, np.zeros_like(labels))
        )
    sheet = contact_sheet(rows, PALETTE, ["zero"])
    assert (np.asarray(sheet)[40:, -2:] == 255).all()
    assert tuple(PALETTE[-3:]) in colours_in(sheet)  # the ignored have an entry


def test_a_row_of_unequal_sizes_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError,
        match=r"^a\.jpg: image, labels and prediction are 40×60, 40×60, 39×60 \(H×W\); give",
    ):
        contact_sheet([("a.jpg", IMAGE, LABELS, LABELS[1:])], PALETTE, [])


def test_a_sheet_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no image was asked for"):
        contact_sheet([], PALETTE, [])
