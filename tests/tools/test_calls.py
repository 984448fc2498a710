"""Calling a user's function: whatever it does, the caller gets an answer or a failure that says where."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from collm.errors import DataError, LoadError, ToolFailure
from collm.tools.calls import Answer, IsolatedTool, Tool, open_tool
from collm.tools.spec import ToolSpec


@pytest.fixture
def moody() -> Iterator[IsolatedTool]:
    tool = IsolatedTool(ToolSpec("tests.tools.functions:moody", seconds=0.5))
    yield tool
    tool.close()


def said(tool: Tool | IsolatedTool, text: str) -> Answer:
    answers = tool.answers if isinstance(tool, IsolatedTool) else tool
    (answer,) = answers(text, [len(text)])
    return answer


def test_every_prefix_is_asked_in_order(moody: IsolatedTool) -> None:
    text = "let it go"
    assert moody.answers(text, range(len(text) + 1)) == [None] * len(text) + [" fine"]
    assert moody.answers(text, []) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("raise", "raised ValueError: no good"),
        ("sleep", "did not answer within 0.5 s"),
        ("backtrack", "did not answer within 0.5 s"),
        ("close", "did not answer within 0.5 s"),
        ("exit", "raised SystemExit: 3"),
        ("die", "ended its process with status 7"),
        ("number", "returned int, expected text or None"),
        ("surrogate", "returned text that is not valid Unicode"),
    ],
)
def test_a_failure_says_why_and_where_and_leaves_the_other_calls_alone(
    moody: IsolatedTool, word: str, why: str
) -> None:
    text = f"go {word} now go"
    before, failure, after = moody.answers(text, [2, 3 + len(word), len(text)])
    assert (before, after) == (" fine", " fine")
    assert isinstance(failure, ToolFailure)
    assert f"tool:tests.tools.functions:moody {why}" in str(failure)
    assert str(failure).endswith(f"ends with 'go {word}'")


def test_a_long_text_is_quoted_by_its_end(moody: IsolatedTool) -> None:
    failure = said(moody, "x" * 10_000 + " raise")
    assert len(str(failure)) < 250
    assert str(failure).endswith("x raise'")


@pytest.mark.slow
def test_one_that_no_longer_reads_is_bounded(moody: IsolatedTool) -> None:
    assert said(moody, "stop") == " fine"
    time.sleep(0.2)
    began = time.monotonic()
    failure = said(moody, "a long text " * 100_000)
    assert "did not answer within 0.5 s" in str(failure)
    assert time.monotonic() - began < 10
    assert said(moody, "x" * 1_000_000 + " go") == " fine"


@pytest.mark.slow
def test_it_answers_beyond_1024_descriptors() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        tool = IsolatedTool(ToolSpec("tests.tools.functions:moody"))
        assert said(tool, "go") == " fine"
        tool.close()
    finally:
        for one in taken:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_its_input_and_output_are_not_the_callers(moody: IsolatedTool) -> None:
    assert said(moody, "print") == " printed"
    assert said(moody, "read") == " ''"
    assert said(moody, "go") == " fine"


def test_any_text_arrives(moody: IsolatedTool) -> None:
    assert said(moody, "日本\n\u2028\x00 é go") == " fine"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tests.tools.functions:nothing", "has no attribute 'nothing'"),
        ("tests.tools.functions:NOT_A_FUNCTION", "it is a int, expected a function"),
        ("tests.tools.nowhere:f", "No module named 'tests.tools.nowhere'.*PYTHONPATH"),
    ],
)
def test_what_cannot_be_imported_is_told_at_once(name: str, why: str) -> None:
    with pytest.raises(LoadError, match=f"could not load tool:{name}: .*{why}"):
        open_tool(ToolSpec(name))


def test_a_module_that_ends_the_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("import os; os._exit(5)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(LoadError, match="ended its process with status 5"):
        open_tool(ToolSpec("broken:f"))


def test_built_in_tools_open_by_name(tmp_path: Path) -> None:
    table = tmp_path / "capitals.csv"
    table.write_text("pattern,country,capital\nThe capital of {country} is {capital}.,Mongolia,Ulaanbaatar\n")
    assert said(open_tool(ToolSpec("calculator")), "2 + 3 =") == " 5"
    assert said(open_tool(ToolSpec("calculator", "marks")), "2 + 3 =") is None
    assert str(said(open_tool(ToolSpec("calculator", "marks")), "so <<2+3=")).startswith("5>>")
    assert said(open_tool(ToolSpec("lookup", str(table))), "The capital of Mongolia is") == " Ulaanbaatar."
    assert said(open_tool(ToolSpec("calculator")), "48 / 2 =") == " 24"
    with pytest.raises(DataError):
        open_tool(ToolSpec("lookup", str(tmp_path / "none.csv")))
