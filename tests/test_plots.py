"""What is drawn, read off the figures before they become files; and the files, whole or not at all."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image

from segprune import plots

CHINESE = ("背景", "飞机", "鸟")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, so that their parts can be asked for."""
    figures: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(
        plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    return figures


@pytest.fixture
def fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], None]]:
    """Sets which font files the system has besides matplotlib's own."""
    plots._font_for.cache_clear()
    yield lambda paths: monkeypatch.setattr(plots, "findSystemFonts", lambda: paths)
    plots._font_for.cache_clear()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def tick_labels(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_bars_are_as_long_as_their_values_and_an_absent_class_says_so(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    plots.bars([0.25, None, 1.0], ["sky", "sea"], "mIoU 0.6250", tmp_path / "mIoU.png")
    axes = drawn[0].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.0, 1.0]
    assert [text.get_text() for text in axes.texts] == ["0.250", "absent", "1.000"]
    assert tick_labels(drawn[0]) == ["sky", "sea", "2"]
    assert axes.get_title() == "mIoU 0.6250"
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first class on top


def test_the_matrix_shows_shares_of_each_row(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.confusion([[3, 1, 0], [0, 0, 0], [1, 1, 998]], [], tmp_path / "confusion_matrix.png")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [
        [0.75, 0.25, 0],
        [0, 0, 0],
        [0.001, 0.001, 0.998],
    ]
    assert [text.get_text() for text in axes.texts] == [
        "0.75",
        "0.25",
        "1.00",
    ]  # nothing where it would be 0.00
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("labelled", "predicted")
    assert tick_labels(drawn[0]) == ["0", "1", "2"]


def test_a_matrix_of_many_classes_has_no_numbers_in_it(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    plots.confusion(np.eye(40, dtype=int).tolist(), [], tmp_path / "confusion_matrix.png")
    assert len(drawn[0].axes[0].texts) == 0


@pytest.mark.parametrize("number", [1, 2, 26])
def test_nothing_is_cut_off_at_the_edges(number: int, tmp_path: Path) -> None:
    names = [f"a class with a long name {k}" for k in range(number)]
    plots.confusion(np.eye(number, dtype=int).tolist(), names, tmp_path / "matrix.png")
    plots.bars([1.0] * number, names, "mIoU 1.0000", tmp_path / "bars.png")
    for name in ("matrix.png", "bars.png"):
        picture = pixels(tmp_path / name)
        assert picture.min() < 100
        assert all(
            (edge == 255).all()
            for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1])
        )


def test_names_are_shortened_and_are_no_formulas(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.bars(
        [0.5, 0.5], ["crt screen, and a lot of other things", "$x$"], "", tmp_path / "bars.png"
    )
    assert tick_labels(drawn[0]) == ["crt screen, and a lot o…", r"\$x\$"]


def test_names_that_no_font_has_become_numbers_without_a_warning(
    tmp_path: Path, drawn: list[Figure], fonts: Callable[[list[str]], None]
) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    fonts(
        [
            findfont(FontProperties(family="DejaVu Serif")),
            str(broken),
            str(tmp_path / "gone.ttf"),
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.bars([0.5] * 4, [*CHINESE, "bird"], "", tmp_path / "bars.png")
        plots.confusion(
            np.eye(4, dtype=int).tolist(), [*CHINESE, "bird"], tmp_path / "matrix.png"
        )
    assert [tick_labels(figure) for figure in drawn] == [["0", "1", "2", "bird"]] * 2


def test_a_font_of_the_system_is_taken_that_has_all_characters(
    tmp_path: Path,
    drawn: list[Figure],
    fonts: Callable[[list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    latin, chinese = tmp_path / "latin.ttf", tmp_path / "wqy-any.ttf"
    for path in (
        latin,
        chinese,
    ):  # which font it is does not matter, what is asked of it is answered below
        path.write_bytes(Path(findfont(FontProperties(family="DejaVu Sans"))).read_bytes())
    had = plots._had
    monkeypatch.setattr(
        plots,
        "_had",
        lambda path, wanted: wanted if path == str(chinese) else had(path, wanted),
    )
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    fonts([str(latin), str(chinese)])
    plots.bars([0.5] * 3, CHINESE, "", tmp_path / "bars.png")
    assert tick_labels(drawn[0]) == list(CHINESE)
    assert {
        label.get_fontproperties().get_file() for label in drawn[0].axes[0].get_yticklabels()
    } == {str(chinese)}


def test_known_fonts_come_before_others_and_regular_ones_before_bold() -> None:
    paths = [
        "/f/Arial-Bold.ttf",
        "/f/Other-Regular.otf",
        "/f/wqy-microhei.ttc",
        "/f/NotoSansCJK-Regular.ttc",
    ]
    assert sorted(paths, key=plots._rank) == [paths[3], paths[2], paths[1], paths[0]]


def history(number: int, *, lr: bool, every: int = 2) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for epoch in range(1, number + 1):
        row = {"epoch": epoch, "loss": 2.0 / epoch} | ({"lr": 1e-3 / epoch} if lr else {})
        rows.append(row | ({"miou": 0.5 - abs(epoch - 4) / 10} if epoch % every == 0 else {}))
    return rows


@pytest.mark.parametrize("lr", [False, True])
def test_curves_show_every_epochs_loss_and_the_scores_there_are(
    lr: bool, tmp_path: Path, drawn: list[Figure]
) -> None:
    rows = history(7, lr=lr)
    assert plots.curves(rows, tmp_path) == [
        tmp_path / "epoch_loss.png",
        tmp_path / "epoch_miou.png",
    ]
    loss, *others = drawn[0].axes
    assert loss.lines[0].get_xydata().tolist() == [[row["epoch"], row["loss"]] for row in rows]
    assert [axes.get_ylabel() for axes in others] == ["learning rate"] * lr
    miou = drawn[1].axes[0]
    assert miou.lines[0].get_xydata().tolist() == [[2, 0.3], [4, 0.5], [6, 0.3]]
    assert miou.get_title() == "best 0.5000 in epoch 4"
    assert pixels(tmp_path / "epoch_miou.png").min() < 100


def test_without_a_score_there_is_no_curve_of_it(tmp_path: Path) -> None:
    assert plots.curves(history(1, lr=False), tmp_path) == [tmp_path / "epoch_loss.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_loss.png"]


def test_a_plot_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "bars.png"
    plots.bars([0.5], [], "", path)
    before = path.read_bytes()

    def half(self: Figure, file: Path, **settings: object) -> None:
        file.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(
        OSError,
        match=r"bars\.png could not be written \(No space left on device\); give another place",
    ):
        plots.bars([0.7], [], "", path)
    assert [file.read_bytes() for file in path.parent.iterdir()] == [before]


def test_a_chart_does_not_blow_up_what_is_next_to_nothing() -> None:
    points = [((0.0, 0.5), (1.0, 0.5001))]
    spans = []
    for least in (0.0, 0.02):
        svg = plots.lines_svg([(points[0], "#000000", False)], least_height=least)
        numbers = [float(text) for text in re.findall(r">(0\.\d+)</text>", svg)]
        heights = [number for number in numbers if 0.4 < number < 0.6]
        spans.append(max(heights) - min(heights))
    assert spans[0] < 0.001
    assert spans[1] > 0.01
