"""The page in a real browser: one page and one browser for all tests of this file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from segprune.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EXECUTABLE = next((path for path in map(shutil.which, BROWSERS) if path), None)
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason=f"no browser was found (looked for {', '.join(BROWSERS)})"
)


@dataclass
class Shown:
    """The page in its browser, and what it asked for and complained of since it was opened."""

    page: sync_api.Page
    path: Path
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def shown(results: Path) -> Iterator[Shown]:
    path = write_report(results)
    with sync_api.sync_playwright() as playwright:
        # Without a sandbox, which root cannot have; the page is our own.
        browser = playwright.chromium.launch(
            executable_path=EXECUTABLE, args=["--no-sandbox"], timeout=120_000
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.set_default_timeout(120_000)  # the machine may be busy
        opened = Shown(page, path)
        page.on("request", lambda request: opened.requests.append(request.url))
        page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        page.on("console", lambda message: opened.complaints.append(message.text))
        page.goto(path.as_uri())
        yield opened
        browser.close()


def test_the_slider_moves_by_key_and_shows_more_of_one_network(shown: Shown) -> None:
    slider = shown.page.locator("input[type=range]").first
    slider.focus()
    shown.page.keyboard.press("Home")
    left = shown.page.locator(".stack").first.locator(".left")
    assert left.evaluate("e => getComputedStyle(e).clipPath") == "inset(0px 100% 0px 0px)"
    for _ in range(30):
        shown.page.keyboard.press("ArrowRight")
    stack = shown.page.locator(".stack").first
    assert stack.evaluate("e => e.style.getPropertyValue('--x')") == "30%"


def test_another_layer_can_be_laid_on_the_right(shown: Shown) -> None:
    shown.page.check("input[name=right][value=changed]")
    layers = shown.page.locator(".stack").first.locator(".right")
    assert layers.evaluate_all("es => es.map(e => e.dataset.layer)") == ["changed"]


def test_the_language_is_switched(shown: Shown) -> None:
    heading = shown.page.locator("#removed h2")
    assert heading.inner_text() == "What was removed"
    shown.page.click("#language")
    assert heading.inner_text() == "移除了什么"
    shown.page.click("#language")
    assert heading.inner_text() == "What was removed"


def test_the_theme_is_switched(shown: Shown) -> None:
    def paper() -> str:
        return shown.page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = paper()
    shown.page.click("#theme")
    assert paper() != light
    shown.page.click("#theme")
    assert paper() == light


def test_a_class_called_script_stays_text(shown: Shown) -> None:
    assert shown.page.locator("bdi", has_text="<script>").count() > 0
    assert shown.page.title().startswith("segprune")
    assert shown.page.locator("script").count() == 1


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(width: int, shown: Shown) -> None:
    shown.page.set_viewport_size({"width": width, "height": 900})
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_number_stands_on_one_line_on_a_narrow_screen(shown: Shown) -> None:
    shown.page.set_viewport_size({"width": 390, "height": 900})
    lines = shown.page.evaluate(
        """[...document.querySelectorAll(".classes td:last-child")].map(cell => {
            const range = document.createRange(); range.selectNodeContents(cell);
            return new Set([...range.getClientRects()].map(box => box.top)).size; })"""
    )
    assert len(lines) > 2
    assert set(lines) == {1}


def test_nothing_is_fetched_and_nothing_complains(shown: Shown) -> None:
    outside = [url for url in shown.requests if not url.startswith(("data:", "file:"))]
    assert outside == []
    assert [url for url in shown.requests if url.startswith("file:")] == [shown.path.as_uri()]
    assert shown.complaints == []
    assert shown.path.stat().st_size < 5e6
