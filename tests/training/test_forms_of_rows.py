"""Rows as people have them: forms told by columns, calls of tools, turns that are not learned, kinds of files."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from collm.errors import DataError, RequestError
from collm.text.chats import Chat
from collm.text.template import PromptTemplate
from collm.training.data import Row, load_rows, write_rows
from collm.training.examples import encode
from tests.text.test_template import BYTE_LEVEL, CHATML, turns_of
from tests.training.test_data import ANSWER, CHAT, USER, jsonl

CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
READ_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
]
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def read(path: Path, *rows: Any) -> list[Row]:
    return load_rows(jsonl(path / "rows.jsonl", list(rows)))


def learned(row: Row, chat: str = CHATML) -> list[str]:
    assert row.messages is not None
    encoded = PromptTemplate(chat=chat).encode_chat(BYTE_LEVEL, row.messages, unlearned=row.unlearned)
    return [str(BYTE_LEVEL.decode(turn)).removesuffix("<|end|>") for one in encoded for _, turn in turns_of(one)]


def test_rows_that_are_written_are_read_alike(tmp_path: Path) -> None:
    calling = {"role": "assistant", "tool_calls": [CALL]}
    chat = [USER, {"role": "assistant", "content": "", "weight": 0}, USER, calling, {"role": "tool", "content": "3"}]
    rows = read(
        tmp_path,
        {"prompt": "é\u2028\n[", "completion": " x"},
        {"messages": [*chat, ANSWER, USER], "tools": TOOLS},
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        {"instruction": "add", "output": "4"},
        {"messages": [USER, calling]},
    )
    write_rows(tmp_path / "written.jsonl", rows)
    again = load_rows(tmp_path / "written.jsonl")
    assert [replace(row, where="") for row in again] == [replace(row, where="") for row in rows]
    for one, other in zip(again, rows, strict=True):
        for chat_of in ("prompt", "messages"):
            assert getattr(getattr(one, chat_of), "tools", None) == getattr(getattr(other, chat_of), "tools", None)


@pytest.mark.parametrize("completion", [[ANSWER], ANSWER])
def test_a_conversational_prompt_is_not_learned_and_its_completion_is(tmp_path: Path, completion: Any) -> None:
    earlier = [USER, {"role": "assistant", "content": "earlier"}, USER]
    (row,) = read(tmp_path, {"prompt": earlier, "completion": completion})
    assert (row.prompt, row.completion, row.unlearned) == (earlier, "x", {1})
    assert row.messages == [*earlier, ANSWER]
    assert learned(row) == ["x"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
def test_a_turn_of_no_weight_is_not_learned(tmp_path: Path, mark: dict[str, Any]) -> None:
    first = {"role": "assistant", "content": "never", **mark}
    (row,) = read(tmp_path, {"messages": [USER, first, USER, {**ANSWER, "weight": 1}]})
    assert learned(row) == ["x"]
    assert row.messages is not None
    assert "weight" not in row.messages[1]
    assert "train" not in row.messages[1]
    with pytest.raises(DataError, match="no assistant turn to train on"):
        read(tmp_path, {"messages": [USER, first]})


def test_calls_of_tools_are_learned(tmp_path: Path) -> None:
    chat = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        ANSWER,
    ]
    for tools in (TOOLS, json.dumps(TOOLS)):
        (row,) = read(tmp_path, {"messages": chat, "tools": tools})
        assert row.messages == [USER, {"role": "assistant", "content": "", "tool_calls": [READ_CALL]}, chat[2], ANSWER]
        assert row.messages.tools == row.prompt.tools == TOOLS
        assert learned(row, WITH_TOOLS) == ['add{"a": 1, "b": 2}', "x"]
        prompt = PromptTemplate(chat=WITH_TOOLS).encode_prompt(BYTE_LEVEL, row.prompt)
        assert str(BYTE_LEVEL.decode(prompt)).startswith(json.dumps(TOOLS)[:20])
        with pytest.raises(DataError, match="does not show the function 'add'"):
            learned(row)


def test_an_older_function_call_is_a_call_of_a_tool(tmp_path: Path) -> None:
    called = {"role": "assistant", "function_call": {"name": "add", "arguments": "{}"}}
    (row,) = read(tmp_path, {"messages": [USER, called, {"role": "function", "name": "add", "content": "3"}, ANSWER]})
    assert row.messages is not None
    assert row.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    assert row.messages[2]["role"] == "tool"


def test_a_last_turn_that_calls_is_compared_by_its_calls(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]})
    assert json.loads(row.completion) == READ_CALL["function"]


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]
    (row,) = read(tmp_path, {"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert row.prompt == [{"role": "user", "content": "ab"}]


def test_sharegpt_is_known_by_its_columns(tmp_path: Path) -> None:
    turns = [("system", "s"), ("human", "u"), ("gpt", "x"), ("human", "v"), ("gpt", "y")]
    (row,) = read(tmp_path, {"id": "1", "conversations": [{"from": who, "value": text} for who, text in turns]})
    assert [(m["role"], m["content"]) for m in row.messages or ()] == [
        ("system", "s"), ("user", "u"), ("assistant", "x"), ("user", "v"), ("assistant", "y"),
    ]  # fmt: skip
    assert learned(row) == ["x", "y"]
    (named,) = read(tmp_path, {"conversations": [USER, ANSWER], "system": "s"})
    assert named.prompt == [{"role": "system", "content": "s"}, USER]


def test_sharegpt_with_calls(tmp_path: Path) -> None:
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    turns = [("human", "u"), ("function_call", call), ("observation", "3"), ("gpt", "x")]
    conversation = [{"from": who, "value": text} for who, text in turns]
    (row,) = read(tmp_path, {"conversations": conversation, "tools": json.dumps(TOOLS)})
    assert learned(row, WITH_TOOLS) == ['add{"a": 1}', "x"]
    with pytest.raises(DataError, match=r"rows.jsonl:1: message 2: the call 'add' is not JSON"):
        read(tmp_path, {"conversations": [conversation[0], {"from": "function_call", "value": "add"}]})


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "do", "input": "it", "output": "done"}, "do\n\nit"),
        ({"instruction": "do", "input": "", "output": "done"}, "do"),
        ({"instruction": "do", "output": "done", "history": [], "text": "ignored"}, "do"),
        ({"instruction": "do", "output": "done", "system": "be"}, "be\n\ndo"),
        ({"instruction": "do", "input": " ", "output": "done"}, "do"),
        ({"instruction": "do", "input": "\n\t", "output": "done", "history": ""}, "do"),
        ({"instruction": "do", "input": None, "output": "done", "system": "  "}, "do"),
        ({"instruction": "do", "input": " it", "output": "done", "system": "\n"}, "do\n\n it"),
    ],
)
def test_alpaca_is_known_by_its_columns(tmp_path: Path, row: dict[str, Any], prompt: str) -> None:
    (found,) = read(tmp_path, row)
    assert (found.prompt, found.completion, found.messages) == (prompt, "done", None)
    (named,) = load_rows(tmp_path / "rows.jsonl", prompt_field="instruction", completion_field="output")
    assert named.prompt == "do"


@pytest.mark.parametrize(
    "chat", [CHATML, CHATML.replace("{{ m['role'] }}", "{% if m.role == 'developer' %}d{% endif %}x")]
)
def test_a_template_that_does_not_know_developers_sees_a_system_message(chat: str) -> None:
    prompt = PromptTemplate(chat=chat).encode_prompt(BYTE_LEVEL, [{"role": "developer", "content": "on"}])
    assert str(BYTE_LEVEL.decode(prompt)).startswith("<|start|>system" if chat == CHATML else "<|start|>dx")


def test_arrow_fills_what_a_row_lacks_and_that_is_not_read(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, {**ANSWER, "tool_calls": [CALL], "weight": 1}], "tools": TOOLS},
        {"messages": [USER, ANSWER], "tools": None},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    first, second = load_rows(tmp_path / "rows.parquet")
    assert first.messages == [USER, {**ANSWER, "tool_calls": [READ_CALL]}]
    assert second.messages == [USER, ANSWER]
    assert second.messages.tools is None


FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "prompt": ({"prompt": "a", "completion": "x"}, "a"),
    "chat": ({"messages": [USER, ANSWER]}, [USER]),
    "tools": ({"messages": [USER, ANSWER], "tools": json.dumps(TOOLS)}, [USER]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "x"}]}, [USER]),
    "alpaca": ({"instruction": "do", "input": "it", "output": "x", "system": "be"}, "be\n\ndo\n\nit"),
    "bare alpaca": ({"instruction": "do", "output": "x"}, "do"),
}


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved", "jsonl"])
def test_forms_of_rows_can_be_mixed_in_one_table(tmp_path: Path, kind: str) -> None:
    columns = {name: None for row, _ in FORMS.values() for name in row}
    rows = [{**columns, **row} for row, _ in FORMS.values()]
    source = jsonl(tmp_path / "rows.jsonl", rows)
    if kind == "parquet":
        source = tmp_path / "rows.parquet"
        datasets.Dataset.from_list(rows).to_parquet(source)
    elif kind != "jsonl":
        source = tmp_path / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(source)
        source = next(source.glob("*.arrow")) if kind == "arrow" else source
    found = load_rows(source, bad_rows="skip")
    assert found.num_bad == 0
    assert [row.prompt for row in found] == [prompt for _, prompt in FORMS.values()]
    assert {row.completion for row in found} == {"x"}
    assert [row.messages.tools for row in found if row.messages is not None] == [None, TOOLS, None]


def test_named_fields_that_are_null_leave_the_chat(tmp_path: Path) -> None:
    rows = [
        {"question": None, "answer": None, "messages": [USER, ANSWER]},
        {"question": "q", "answer": "x", "messages": None},
    ]
    found = load_rows(jsonl(tmp_path / "r.jsonl", rows), prompt_field="question", completion_field="answer")
    assert [row.prompt for row in found] == [[USER], "q"]


def test_special_tokens_written_out_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [Row("the", " cat<|end|> sat", None, "1"), Row("the", " cat", None, "2")]
    first, _ = encode(rows, PromptTemplate(), BYTE_LEVEL, max_length=99)
    assert BYTE_LEVEL.eos_token_id in first.token_ids
    assert "1 of 2 rows have the text of a special token in their completion, most often '<|end|>'" in caplog.text


def test_a_rendered_chat_keeps_one_bos() -> None:
    from tokenizers import processors

    tokenizer = copy.deepcopy(BYTE_LEVEL)
    tokenizer.bos_token = "<|start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
    )
    template = PromptTemplate()
    assert template.encode_prompt(tokenizer, "<|start|>the cat") == template.encode_prompt(tokenizer, "the cat")


def test_text_that_has_no_utf8_is_refused() -> None:
    for prompt in ("\ud800 b", [{"role": "user", "content": "\ud800"}]):
        with pytest.raises(RequestError, match="half of a character"):
            PromptTemplate(chat=CHATML).encode_prompt(BYTE_LEVEL, prompt)


def test_a_chat_is_a_list_of_messages() -> None:
    chat = Chat(CHAT, TOOLS)
    assert chat == CHAT
    assert json.loads(json.dumps(chat)) == CHAT


def test_the_forms_of_the_documentation_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    table = page.partition("## Rows")[2].partition("- **What is learned**")[0]
    rows = [json.loads(found) for found in re.findall(r"`(\{.*?\})`[;,|\s]", table)]
    read_rows = read(tmp_path, *rows)
    assert len(read_rows) == 5
    assert {row.completion for row in read_rows} == {"4", "hello"}
    assert read_rows[4].prompt == "add\n\n2 and 2"
