"""Pages in headless Chromium, for tests that look at them as a reader does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
EVERYWHERE = pytest.mark.parametrize(
    ("scheme", "window"),
    [
        pytest.param("light", WIDE, id="wide-light"),
        pytest.param("dark", PHONE, id="phone-dark"),
        pytest.param("dark", WIDE, id="wide-dark", marks=pytest.mark.soak),
        pytest.param("light", PHONE, id="phone-light", marks=pytest.mark.soak),
    ],
)
"""Both colour schemes and both windows; each occurs once outside of the soak tests."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The machine's Chromium; without one the test is skipped, unless COLLM_REQUIRE_BROWSER is set."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("COLLM_REQUIRE_BROWSER"):
            pytest.fail("no Chromium on this machine; install the package chromium")
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, address: str, *, failing: str = "", **options: object) -> Iterator[Page]:
    """A page that must ask for nothing but `address` and what lies below it, and must log no error.

    Args:
        failing: what an error that the page does log has to hold.
        options: of the browser's context; axe needs `bypass_csp`, which is the default.
    """
    context = browser.new_context(**{"bypass_csp": True, **options})  # type: ignore[arg-type]
    page = context.new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(address)
    yield page
    here = address.partition("#")[0]
    outside = [url for url in asked if not url.startswith((here, "data:"))]
    context.close()
    assert not outside
    assert not [error for error in errors if not failing or failing not in error]


def sideways(page: Page) -> int:
    """Pixels by which the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def violations(page: Page) -> list[str]:
    """What axe-core finds against WCAG 2.1 A and AA."""
    from axe_playwright_python.sync_playwright import Axe

    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    found = Axe().run(page, options=rules).response["violations"]
    return [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]
