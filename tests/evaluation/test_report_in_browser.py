"""The report as a reader meets it: in Chromium, light and dark, on a phone, by keyboard, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator

from collm.evaluation.report import (
    ChartPoint,
    Report,
    ShownAnswer,
    SystemRow,
    Table,
    Token,
    deferral_chart,
    write_report,
)
from tests.browser import EVERYWHERE, PHONE, WIDE, chromium, opened, sideways, violations

pytestmark = pytest.mark.slow

ROWS = [
    SystemRow("base", 0.1, 0.05, 0.2, 0.0, 500),
    SystemRow("collaboration", 0.9, 0.8, 0.95, 0.1, 300, "a note " * 12),
]
CITIES = [(" Nairobi", 0.4), (" Mombasa", 0.3), (" Ouagadougou", 0.1), (" Antananarivo", 0.1), (" Mogadishu", 0.1)]
CANDIDATES = [CITIES, [(" Nairobi", 0.99), ("<end>", 0.01)]]
TOKENS = [Token(f" word{i}", i % 2, 0.9 * (i % 2), CANDIDATES) for i in range(60)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    curve = [ChartPoint(f"threshold {1 - x}", x, 0.2 + x / 2, 0.1 + x / 2, 0.3 + x / 2) for x in (0.0, 0.1, 1.0)]
    report = Report(
        "Does it pay?",
        "It does.",
        rows=ROWS,
        charts=[deferral_chart(curve, ROWS, 0.1, {"whole answers at random": [(0.0, 0.1), (1.0, 0.7)]})],
        examples=[ShownAnswer("Capital of Kenya?", "Nairobi", TOKENS, 1.0)],
        tables=[Table("tokens", "Tokens", "Of 3.", ("", "times"), [(" a", "3")])],
        authors=["base", "assistant"],
        details={"command": "collm eval " + "x" * 200},
    )
    write_report(path, report)
    return path.as_uri()


@EVERYWHERE
def test_it_is_readable_everywhere(browser: Browser, address: str, tmp_path: Path, scheme: str, window: dict) -> None:
    with opened(browser, address, viewport=window, color_scheme=scheme) as page:
        assert sideways(page) == 0
        assert violations(page) == []
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 19, 24)"}[scheme]
    assert (tmp_path / "page.png").stat().st_size > 20_000


def is_open(token: Locator) -> bool:
    """Whether what is said of a token has more than the pixel that screen readers find."""
    box = token.locator(".tip").bounding_box()
    return box is not None and box["width"] > 1


def test_a_keyboard_reaches_every_token_and_what_each_author_would_have_written(browser: Browser, address: str) -> None:
    with opened(browser, address, viewport=PHONE) as page:
        first, second, last = page.locator(".token").first, page.locator(".token").nth(1), page.locator(".token").last
        assert not is_open(first)
        while not page.evaluate("document.activeElement.classList.contains('token')"):
            page.keyboard.press("Tab")
        assert first.locator(".line").count() == 2
        assert is_open(first)
        page.keyboard.press("ArrowRight")
        assert (is_open(first), is_open(second)) == (False, True)
        box = second.locator(".tip").bounding_box()
        assert box is not None
        assert 0 <= box["x"] <= box["x"] + box["width"] <= PHONE["width"]
        page.keyboard.press("Escape")
        assert not is_open(second)
        page.keyboard.press("End")
        assert is_open(last)
        assert sideways(page) == 0


def test_pointing_at_a_token_shows_it_too(browser: Browser, address: str) -> None:
    with opened(browser, address, viewport=WIDE) as page:
        token = page.locator(".token").nth(7)
        token.hover()
        assert "Mombasa 30.0%" in token.locator(".tip").inner_text()
        assert is_open(token)
