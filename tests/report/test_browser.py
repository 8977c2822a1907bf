"""The page in a real browser, from a file, at the widths of a laptop and of a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from assay.report import render
from assay.spec.result import Result
from tests.browser import browser as browser
from tests.report.conftest import HOSTILE

STAGES = ("tour", "baseline", "positions")  # between them every kind of plot
SIZES = {"laptop": (1280, 900), "phone": (390, 844)}
DRAW_ALL = """async () => {
  dispatchEvent(new Event('beforeprint'));
  const cards = [...document.querySelectorAll('figure[data-figure]')];
  const done = () => cards.every((card) => card.querySelector('.plot-container .cartesianlayer'));
  for (let i = 0; i < 300 && !done(); i += 1) await new Promise((wake) => setTimeout(wake, 50));
  return cards.length;
}"""
EMPTY_CARDS = """() => [...document.querySelectorAll('figure[data-figure]')].filter((card) => {
  const marks = card.querySelectorAll('.scatterlayer .point, .scatterlayer .js-line, .heatmaplayer image');
  return ![...marks].some((mark) => mark.getBoundingClientRect().width > 0);
}).map((card) => card.querySelector('h4').textContent)"""


class Visit:
    """A page opened from its file, with all that it complained about or asked of the network."""

    def __init__(self, browser: Any, path: Path, size: str, **options: Any) -> None:
        width, height = SIZES[size]
        self.complaints: list[str] = []
        phone = {"is_mobile": True, "has_touch": True} if size == "phone" else {}
        self.context = browser.new_context(viewport={"width": width, "height": height}, **phone, **options)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", self._asked)
        self.page.goto(path.as_uri())

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"request: {request.url}")

    def hover_text(self, point: str) -> str:
        self.page.locator(point).first.scroll_into_view_if_needed()
        box = self.page.locator(point).first.bounding_box()
        self.page.mouse.move(box["x"] + box["width"] / 2 - 2, box["y"] + box["height"] / 2)
        self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        label = self.page.locator(".hoverlayer .hovertext")
        label.first.wait_for(timeout=5000)
        return "".join(label.all_text_contents())


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory: pytest.TempPathFactory, plain: list[Result]) -> Path:
    path = tmp_path_factory.mktemp("plain") / "report.html"
    path.write_text(render([r for r in plain if r.study in STAGES], "A tour of a small decoder"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory: pytest.TempPathFactory, hostile: list[Result]) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "report.html"
    path.write_text(render([r for r in hostile if r.study.endswith("positions")], HOSTILE), encoding="utf-8")
    return path


@pytest.mark.parametrize("size", SIZES)
def test_every_plot_draws_and_nothing_sticks_out(browser: Any, plain_file: Path, size: str) -> None:
    visit = Visit(browser, plain_file, size)
    assert visit.page.evaluate(DRAW_ALL) > 25
    assert visit.page.evaluate(EMPTY_CARDS) == []
    assert visit.page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    assert visit.complaints == []
    visit.context.close()


def test_hover_zoom_switches_and_dark_scheme(browser: Any, plain_file: Path) -> None:
    visit = Visit(browser, plain_file, "laptop", bypass_csp=True, color_scheme="light")
    card = "#stage-2 figure:has(h4:text-is('Loss during training'))"
    page = visit.page
    page.locator(card).scroll_into_view_if_needed()
    shown = visit.hover_text(f"{card} .scatterlayer .trace >> nth=1 >> .point")
    assert "training tokens: 20,000" in shown and "3 seeds" in shown and "Rotary (RoPE)" in shown

    drawing = f"document.querySelectorAll('#stage-2 figure')[{_index(page, card)}].querySelector('.drawing')"
    page.click(f"{card} button:text-is('log x')")
    page.wait_for_function(f"{drawing}._fullLayout.xaxis.type === 'log' && !{drawing}.ticking")
    page.click(f"{card} button:text-is('training')")
    page.wait_for_function(f"{drawing}._fullData.filter((t) => t.visible === true)[0].x.length === 100")
    page.click(f"{card} .legend button:text-is('Rotary (RoPE)')")
    page.wait_for_function(f"{drawing}._fullData.filter((t) => t.visible === true).length === 4")

    box = page.locator(f"{card} .nsewdrag").first.bounding_box()
    wide = page.evaluate(f"{drawing}._fullLayout.xaxis.range")
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.8 * box["height"], steps=4)
    page.mouse.up()
    page.wait_for_function(f"{drawing}._fullLayout.xaxis.range[0] > {wide[0]} + 0.1 && !{drawing}.ticking")
    assert page.locator(f"{card} .xtick").count() >= 2

    ink = f'getComputedStyle(document.querySelector("{card.split(":has")[0]} .xtick text")).fill'
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{ink} !== '{light}'")
    assert visit.complaints == []
    visit.context.close()


def _index(page: Any, card: str) -> int:
    return page.locator(card).evaluate("(el) => [...document.querySelectorAll('#stage-2 figure')].indexOf(el)")


def test_hostile_text_neither_runs_nor_breaks_the_layout(browser: Any, hostile_file: Path) -> None:
    """Without the content policy, so that escaping alone is on trial."""
    visit = Visit(browser, hostile_file, "phone", bypass_csp=True)
    page = visit.page
    page.evaluate(DRAW_ALL)
    assert page.evaluate("window.pwned") is None
    assert page.locator("script").count() == 3 and page.locator("img, iframe, object").count() == 0
    assert page.locator("[href*=attacker], svg a, svg tspan[style*=bold]").count() == 0
    names = page.evaluate("[...document.querySelectorAll('.ytick text')].map((t) => t.textContent)")
    assert any(name.startswith("</script><script>") for name in names)
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES["phone"][0]
    assert visit.complaints == []
    visit.context.close()


def test_a_hover_shows_a_hostile_name_as_written(browser: Any, hostile_file: Path) -> None:
    visit = Visit(browser, hostile_file, "laptop", bypass_csp=True)
    visit.page.locator("#stage-1 figure").first.scroll_into_view_if_needed()
    shown = visit.hover_text("#stage-1 figure .scatterlayer .point")
    assert "</script><script>window.pwned=1</script><img src=x" in shown
    assert visit.page.evaluate("window.pwned") is None and visit.complaints == []
    assert visit.page.evaluate("document.documentElement.scrollWidth") == SIZES["laptop"][0]
    visit.context.close()
