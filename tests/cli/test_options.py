"""Options are the fields of dataclasses: their names, help, defaults and kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from collm.cli.main import app
from collm.cli.options import Fields, with_options
from collm.errors import ConfigError

WIDE = {"COLUMNS": "100", "TERM": "dumb"}


@dataclass(frozen=True)
class Shape:
    """A shape.

    Attributes:
        sides: number of sides.
        limit_s: longest time,
            in seconds.
        names: names of the shape.
        weights: weights of the corners.
        kind: flat or solid.
        closed: close it.
    """

    sides: int
    limit_s: float = 2.5
    names: Sequence[str] = ()
    weights: Mapping[int, float] = field(default_factory=dict, metadata={"metavar": "CORNER=KG"})
    kind: Literal["flat", "solid"] | None = None
    closed: bool = False


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        grammar: the grammar.
        choice: one of these.
    """

    grammar: str | None = field(default=None, metadata={"file": True, "flag": "--lark"})
    choice: list[str] | None = None


@pytest.fixture
def seen() -> list[Any]:
    return []


@pytest.fixture
def command(seen: list[Any]) -> typer.Typer:
    made = typer.Typer(add_completion=False)

    @made.command()
    @with_options
    def draw(
        name: Annotated[str, typer.Argument()],
        shape: Annotated[Shape, Fields("sides limit_s closed", "names weights kind", "Rare", {"limit_s": 4.5})],
        rule: Rule | None,
        fast: bool = False,
    ) -> None:
        """Draw it."""
        seen.extend([name, shape, rule, fast])

    return made


def test_a_command_is_given_the_dataclass_of_its_options(command: typer.Typer, seen: list[Any], tmp_path: Path) -> None:
    (tmp_path / "rule.lark").write_text("start: x")
    asked = "a --sides 3 --limit 1 --names x --names y --weights 1=2 --weights 2=0.5 --kind solid --closed --fast"
    done = CliRunner().invoke(command, [*asked.split(), "--lark", str(tmp_path / "rule.lark")])
    assert done.exit_code == 0, done.output
    assert seen == ["a", Shape(3, 1.0, ["x", "y"], {1: 2.0, 2: 0.5}, "solid", True), Rule("start: x"), True]


def test_what_is_not_given_keeps_its_default_and_an_empty_file_is_given(
    command: typer.Typer, seen: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "rule.lark").touch()
    assert CliRunner().invoke(command, ["a", "--sides", "3"]).exit_code == 0
    assert CliRunner().invoke(command, ["a", "--sides", "3", "--lark", str(tmp_path / "rule.lark")]).exit_code == 0
    assert seen == ["a", Shape(3, 4.5), None, False, "a", Shape(3, 4.5), Rule(""), False]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "--sides"),
        ("--sides x", "--sides"),
        ("--sides 3 --kind round", "--kind"),
        ("--sides 3 --weights heavy", "--weights"),
        ("--sides 3 --weights 1=heavy", "'1=heavy' is not CORNER=KG"),
        ("--sides 3 --no-closed", "--no-closed"),
    ],
)
def test_a_wrong_option_is_wrong_usage(command: typer.Typer, arguments: str, named: str) -> None:
    done = CliRunner().invoke(command, ["a", *arguments.split()])
    assert done.exit_code == 2
    assert named in done.stderr


def test_a_file_that_cannot_be_read_is_one_sentence(command: typer.Typer) -> None:
    with pytest.raises(ConfigError, match="cannot read nowhere: No such file or directory"):
        CliRunner().invoke(command, ["a", "--sides", "3", "--lark", "nowhere"], catch_exceptions=False)


def test_help_says_what_the_docstring_says_and_hides_what_is_rare(command: typer.Typer) -> None:
    short, whole = (CliRunner().invoke(command, [option], env=WIDE).output for option in ("--help", "--help-all"))
    assert "Longest time, in seconds." in short
    assert "[default: 4.5]" in short
    assert "One of these. Can be given several times." in short
    for rare in ("Rare", "--names", "CORNER=KG", "flat|solid"):
        assert rare not in short
        assert rare in whole


def test_the_help_of_generate_fits_a_screen() -> None:
    short, whole = (CliRunner().invoke(app, ["generate", one], env=WIDE).output for one in ("--help", "--help-all"))
    assert len(short.splitlines()) <= 40
    for heading in ("Who writes", "Sampling", "Structured outputs", "Loading models"):
        assert heading in whole


def test_every_option_has_a_help_and_a_name_of_its_own() -> None:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        options = [option for option in command.params if option.param_type_name == "option"]
        assert all(option.help for option in options), name
        assert len({option.name for option in options}) == len(options)
