"""Naming tools: what is understood, what is refused, and what changes a tool's identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from collm.errors import ConfigError, LoadError
from collm.tools.spec import ToolSpec
from tests.tools import functions


def test_names_are_read_and_written_alike(tmp_path: Path) -> None:
    table = tmp_path / "facts.csv"
    for text in ("tool:calculator", "tool:calculator:marks", f"tool:lookup:{table}", "tool:a.b:c"):
        spec = ToolSpec.parse(text, eps=0.1)
        assert str(spec) == text
        assert spec.eps == 0.1
        assert spec.is_user_function == (text == "tool:a.b:c")


def test_a_table_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ToolSpec.parse("tool:lookup:facts.csv").table == tmp_path / "facts.csv"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tool:calculater", "there is no tool 'calculater'; expected calculator, lookup"),
        ("tool:calculator:roman", "argument of a tool is 'roman', expected 'marks' or none"),
        ("tool:calculator:utc", "argument of a tool is 'utc', expected 'marks' or none"),
        ("tool:lookup", "expected a table: tool:lookup:facts.csv"),
        ("tool:module:", "there is no tool 'module:'"),
        ("tool:my-module:function", "there is no tool 'my-module:function'"),
        ("tool:", "there is no tool ''"),
    ],
)
def test_other_names_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        ToolSpec.parse(text)


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"eps": 1.0}, {"seconds": 0}, {"max_answer": 0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} of a tool is"):
        ToolSpec("calculator", **options)  # type: ignore[arg-type]


def test_a_function_is_named_by_what_imports_it() -> None:
    assert ToolSpec.of(functions.shout, seconds=2.0) == ToolSpec("tests.tools.functions:shout", seconds=2.0)

    def inner(text: str) -> None:
        return None

    for function in (inner, lambda text: None):
        with pytest.raises(ConfigError, match="cannot be imported by name"):
            ToolSpec.of(function)


def test_the_identity_follows_source_table_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text("def f(text): return None\n")
    table = tmp_path / "facts.csv"
    table.write_text("pattern,a\nit is {a},1\n")
    specs = [
        ToolSpec("mine:f"),
        ToolSpec("lookup", str(table)),
        ToolSpec("calculator"),
        ToolSpec("calculator", eps=0.1),
    ]
    before = [spec.identity() for spec in specs]
    assert len({str(each) for each in before}) == 4
    (tmp_path / "mine.py").write_text("def f(text): return 'other'\n")
    table.write_text("pattern,a\nit is {a},2\n")
    after = [spec.identity() for spec in specs]
    assert [mine == theirs for mine, theirs in zip(before, after, strict=True)] == [False, False, True, True]


@pytest.mark.parametrize("name", ["no.such.module:f", "nosuchmodule:f"])
def test_a_missing_module_is_named(name: str) -> None:
    with pytest.raises(LoadError, match=r"could not find the module 'no.*PYTHONPATH"):
        ToolSpec(name).identity()
