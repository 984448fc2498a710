"""Tables of facts: what is found where a text ends, and which tables are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collm.errors import DataError
from collm.tools.lookup import Lookup

CAPITAL = "The capital of {country} is {capital}."


def table(folder: Path, content: Any, name: str = "facts.json") -> Lookup:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return Lookup(path)


@pytest.fixture(params=["csv", "list", "bom"])
def capitals(request: pytest.FixtureRequest, tmp_path: Path) -> Lookup:
    facts = [{"country": "France", "capital": "Paris"}, {"country": "Korea, South", "capital": "Seoul"}]
    if request.param == "list":
        return table(tmp_path, [{"pattern": CAPITAL, **fact} for fact in facts])
    rows = [f'"{CAPITAL}",France,Paris', "", f'{CAPITAL},"Korea, South",Seoul', f"{CAPITAL},France,Paris"]
    text = "\n".join(["pattern,country,capital", *rows])
    return table(tmp_path, text.encode("utf-8-sig" if request.param == "bom" else "utf-8"), "facts.CSV")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The capital of France is", " Paris."),
        ("The capital of France is ", "Paris."),
        ("I know. The capital of Korea, South is", " Seoul."),
        ("(The capital of France is", " Paris."),
        ("The capital of France is  ", None),
        ("The capital of France is P", None),
        ("The capital of France i", None),
        ("the capital of France is", None),
        ("capital of France is", None),
        ("xThe capital of France is", None),
        ("_The capital of France is", None),
        ("The capital of Nauru is", None),
        ("", None),
    ],
)
def test_the_fact_with_which_a_text_ends(capitals: Lookup, text: str, answer: str | None) -> None:
    assert capitals(text) == answer
    assert capitals("\nSo " * 10 + text) == answer


def test_the_longest_match_counts(tmp_path: Path) -> None:
    rows = [
        ("Paris is in {a}", "France"),
        ("Texas: Paris is in {a}", "the USA"),
        ("s in {a}", "a word"),
        ("is in {a}", "it"),
    ]
    lookup = table(tmp_path, [{"pattern": pattern, "a": a} for pattern, a in rows])
    assert lookup("Paris is in") == " France"
    assert lookup("Texas: Paris is in") == " the USA"
    assert lookup("That is in") == " it"
    assert lookup("Comparis is in") == " it"
    assert lookup("words in") is None
    assert lookup("word s in ") == "a word"


def test_patterns_without_white_space_and_with_more_behind(tmp_path: Path) -> None:
    rows = [
        {"pattern": "tel:{number} ({name})", "number": "5-1", "name": "Ann"},
        {"pattern": "{name}\n\t{number}!", "number": 68.10, "name": "\u00c5sa"},
        {"pattern": "{name} and {name}", "name": "Bo"},
    ]
    lookup = table(tmp_path, rows)
    assert lookup("tel:5-1 (") == "Ann)"
    assert lookup("\u00c5sa") == "\n\t68.1!"
    assert lookup("\u00c5sa\n\t") == "68.1!"
    assert lookup("Bo and") == " Bo"


def test_numbers_stay_as_they_are_written(tmp_path: Path) -> None:
    assert table(tmp_path, '[{"pattern": "pi is {a}", "a": 3.140}]')("pi is") == " 3.140"
    assert table(tmp_path, f'[{{"pattern": "n is {{a}}", "a": {"9" * 5000}}}]')("n is") == " " + "9" * 5000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "a,b\n1,2\n", "line 1: the header is ['a', 'b'], expected 'pattern'"),
        ("a.csv", "pattern,a,a\nx {a},1,2\n", "each once"),
        ("a.csv", "pattern,a\n,1\n", "line 2: the pattern is ''"),
        ("a.csv", "pattern,a\nx {b},1\n", "line 2: unknown placeholder {b}"),
        ("a.csv", "pattern,a\nx,1\n", "placeholders"),
        ("a.csv", "pattern,a\nx {a} {,1\n", "placeholders"),
        ("a.csv", "pattern,a\n {a} is,1\n", "nothing before its last placeholder"),
        ("a.csv", "pattern,a\nx {a},\n", "line 2: the field 'a' is ''"),
        ("a.csv", "pattern,a\nx {a}\n", "line 2: the field 'a' is ''"),
        ("a.csv", "pattern,a\nx {a},1,2\n", "3 cells, expected 2"),
        ("a.csv", "pattern,a\nx {a},1\nx {a},2\n", "line 3: 'x' is followed by ' 2', but in"),
        ("a.csv", "pattern,a\nx {a},1\nx{a},1\n", "line 3: 'x' is followed by '1', but in"),
        ("a.csv", 'pattern,a\n"x {a}', "line 2: not CSV"),
        ("a.csv", "pattern,a\n", "no facts"),
        ("a.csv", "", "no facts"),
        ("a.csv", b"pattern,a\nx {a},\xff\n", "not UTF-8 at byte 16"),
        ("a.json", "{", "not JSON"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", "3", "expected a list of facts"),
        ("a.json", {"patterns": [], "fact": []}, "expected a list of facts"),
        ("a.json", [], "no facts"),
        ("a.json", [3], "fact 1: the fact is '3', expected an object"),
        ("a.json", [{"a": "1"}], "fact 1: the pattern is None"),
        ("a.json", [{"pattern": ["x {a}"], "a": "1"}], "fact 1: the pattern is ['x {a}']"),
        ("a.json", [{"pattern": "x {a}", "a": None}], "fact 1: the field 'a' is None"),
        ("a.json", [{"pattern": "x {pattern}"}], "unknown placeholder {pattern}"),
        ("a.json", '[{"pattern": "x {a}", "a": "\\ud800"}]', "not valid Unicode"),
        (
            "a.json",
            [{"pattern": "{a}" * 200 + "{b}", "a": "x" * 10**6, "b": "y"}],
            "fact 1: the facts have over 100000000 characters",
        ),
        ("a.txt", "", "has the suffix '.txt', expected a .csv or .json file"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, name: str, content: Any, said: str) -> None:
    with pytest.raises(DataError) as refused:
        table(tmp_path, content, name)
    assert said in str(refused.value)
    assert name in str(refused.value)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not read"):
        Lookup(tmp_path / "facts.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="could not read"):
        Lookup(tmp_path / "folder.csv")


@pytest.mark.slow
def test_a_large_table(tmp_path: Path) -> None:
    facts = [
        {"pattern": pattern, "country": f"Country {n}", "capital": f"City {n * 7}"}
        for n in range(50_000)
        for pattern in (CAPITAL, "{capital} lies in {country}")
    ]
    lookup = table(tmp_path, facts)
    assert lookup("word is " * 125_000 + "The capital of Country 49999 is") == " City 349993."
    assert lookup("City 349993 lies in") == " Country 49999"
    assert lookup("is " * 300_000) is None


@pytest.mark.slow
@given(st.text(), st.dictionaries(st.text("ab ", min_size=1), st.text("cd", min_size=1), min_size=1, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text(tmp_path: Path, text: str, facts: dict[str, str]) -> None:
    """Against a search through all facts."""
    rows = [{"pattern": "-{a}: {b}", "a": a, "b": b} for a, b in facts.items() if a.strip()]
    lookup = table(tmp_path, [*rows, {"pattern": "? {b}", "b": "!"}])
    assert lookup(text) == (" !" if text.endswith("?") else "!" if text.endswith("? ") else None)
    for row in rows:
        assert lookup(f"{text}-{row['a']}:") == f" {row['b']}"
        assert lookup(f"{text}-{row['a']}: ") == row["b"]
