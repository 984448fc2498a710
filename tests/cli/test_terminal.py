"""No text of a model, a row or a file controls the terminal that shows it."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace

import pytest

from collm.cli.authors import coloured
from collm.cli.main import _say
from collm.cli.terminal import Console, log_to_terminal
from collm.redaction import visible

TITLE = "\x1b]0;owned\x07"
EVIL = [TITLE, "\x9b2J", "\r\x1b[2K", "\x08\x08", "\u202egnp.exe", "\x00", "\x1bPq\x1b\\", "\x7f"]


@pytest.mark.parametrize("text", EVIL)
def test_a_terminal_shows_control_characters_and_obeys_none(text: str) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, soft_wrap=True)
    console.print(coloured([SimpleNamespace(text=f"a{text}b", author=1)]), end="")
    console.print(f"a{text}b", markup=False)
    shown = out.getvalue()
    assert "\x1b[1;32m" in shown  # an author's colour
    assert not any(
        char in shown.replace("\x1b[1;32m", "").replace("\x1b[0m", "") for char in text if not char.isprintable()
    )


def test_piped_text_stays_as_it_is() -> None:
    out = io.StringIO()
    Console(file=out, soft_wrap=True).print(coloured([SimpleNamespace(text="a\x1b]0;b", author=0)]), end="")
    assert out.getvalue() == "a\x1b]0;b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\tb\nc", "a\tb\nc"), ("\x1b", "<1b>"), ("a\r\nb\rc", "a\nb<0d>c"), ("é🦊\u200d", "é🦊\u200d")],
)
def test_only_what_controls_is_replaced(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_errors_and_logs_are_shown_alike(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _say(f"the row is {TITLE}")
    assert capsys.readouterr().err == "collm: the row is <1b>]0;owned<07>\n"
    monkeypatch.setattr(logging.root, "handlers", [])
    log_to_terminal()
    logging.getLogger("collm.test").warning("skipped %s", TITLE)
    assert capsys.readouterr().err == "skipped <1b>]0;owned<07>\n"
