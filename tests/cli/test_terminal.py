"""Colours by author in a terminal, plain text elsewhere, and no text controls the terminal that shows it."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from collm.cli.chat import converse
from collm.cli.main import WRONG_USAGE, main
from collm.cli.terminal import Console, coloured, legend, log_to_terminal, style_of
from collm.errors import ConfigError
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


@pytest.mark.parametrize(
    "text",
    [
        *EVIL,
        "all:\n\tcc -o a a.c\n",
        "a\tb\r\nc\td\r\n",
        "one\x0ctwo\x0bthree\x08\x08\x07",
        "  [bold]x[/bold] :smile: \n\n\n ",
        "x" * 500,
        "".join(map(chr, range(0x250))),
    ],
)
def test_piped_text_stays_as_it_is(text: str) -> None:
    out = io.BytesIO()
    console = Console(file=io.TextIOWrapper(out, encoding="utf-8"), soft_wrap=True)
    for part in (text[:2], text[2:]):
        console.show([SimpleNamespace(text=part, author=1)])
    assert out.getvalue() == text.encode()


@pytest.mark.parametrize(
    ("encoding", "written"), [("cp1252", b"\x80 \\U0001f98a\n"), ("ascii", b"\\u20ac \\U0001f98a\n")]
)
def test_a_character_that_the_output_cannot_hold_is_written_as_its_code_point(
    encoding: str, written: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.BytesIO()

    def run(arguments: list[str], **options: bool) -> None:
        console = Console(soft_wrap=True)
        console.show([SimpleNamespace(text="€ 🦊", author=1)])
        console.print()

    monkeypatch.setattr("collm.cli.main.app", run)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding=encoding))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert out.getvalue() == written


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_standard_input_that_is_no_text_is_one_sentence(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["collm", "generate", "nowhere", "-"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    if command == "chat":
        monkeypatch.setattr("collm.cli.main.app", lambda _, **options: converse(Mock(), Console()))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == WRONG_USAGE
    assert capsys.readouterr().err.startswith("collm: standard input is not utf-8 text ('utf-8' codec can't decode")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\tb\nc", "a\tb\nc"), ("\x1b", "<1b>"), ("a\r\nb\rc", "a\nb<0d>c"), ("é🦊\u200d", "é🦊\u200d")],
)
def test_only_what_controls_is_replaced(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_errors_and_logs_are_shown_alike(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["collm"])
    monkeypatch.setattr("collm.cli.main.app", Mock(side_effect=ConfigError(f"the row is {TITLE}")))
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "collm: the row is <1b>]0;owned<07>\n"
    monkeypatch.setattr(logging.root, "handlers", [])
    log_to_terminal()
    logging.getLogger("collm.test").warning("skipped %s", TITLE)
    assert capsys.readouterr().err == "skipped <1b>]0;owned<07>\n"


@pytest.mark.parametrize(
    ("terminal", "text"), [(False, "The Paris"), (True, "The \x1b[1;32mPa\x1b[0m\x1b[1;35mris\x1b[0m")]
)
def test_a_terminal_shows_colours_and_a_pipe_plain_text(terminal: bool, text: str) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, color_system="standard" if terminal else None)
    parts = [("The ", 0), ("Pa", 1), ("ris", 2)]
    console.print(
        coloured([SimpleNamespace(text=part, author=author) for part, author in parts]), legend(["me", "you"])
    )
    assert text in out.getvalue()
    assert len({style_of(author) for author in range(7)}) == 7
    assert style_of(7) == style_of(1)
    assert ("written by: me  you" in out.getvalue()) is not terminal
