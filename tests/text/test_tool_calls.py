"""Calls of tools are told from text in any pieces, and grammars let nothing else through."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, hf
from transformers import PreTrainedTokenizerFast

from collm.text.tool_calls import Delta, ToolCallReader
from collm.text.tool_formats import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    MISTRAL_WITH_IDS,
    ToolFormat,
    grammar,
    tool_format,
)
from tests.tokenizers import merging_tokenizer

Read = tuple[str, list[tuple[str, str]]]
BYTES = merging_tokenizer('{"name": "weather", "arguments": {"city": "Paris"}}')
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer"}},
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
TREE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "tree",
        "parameters": {  # names no type, and refers to itself and to its parts
            "properties": {"left": {"$ref": "#"}, "label": {"type": "string"}, "other": {"$ref": "#/properties/label"}},
            "additionalProperties": False,
        },
    },
}
NESTED = '{"name": "f", "arguments": {"a": "}{\\"<", "b": [1, {"c": "\\u00e9"}], "d": null}}'


def joined(deltas: list[Delta]) -> Read:
    text, calls = "", list[list[str]]()
    for delta in deltas:
        if delta.index is None:
            text += delta.text
        elif delta.name:
            assert (delta.index, delta.text) == (len(calls), "")
            calls.append([delta.name, ""])
        else:
            assert delta.index == len(calls) - 1
            calls[-1][1] += delta.text
    return text, [(name, arguments) for name, arguments in calls]


def read(written: ToolFormat, pieces: list[str]) -> Read:
    reader = ToolCallReader(written)
    return joined([delta for piece in pieces for delta in reader.push(piece)] + reader.finish())


CASES: list[tuple[ToolFormat, str, Read]] = [
    (HERMES, "just text", ("just text", [])),
    (HERMES, "ends in space \n", ("ends in space \n", [])),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', ("", [("f", "{}")])),
    (
        HERMES,
        'Let me see.\n\n<tool_call>{"name":"f","arguments":{"x":1}}</tool_call>\n',
        ("Let me see.\n\n", [("f", '{"x":1}')]),
    ),
    (
        HERMES,
        f"<tool_call>\n{NESTED}\n</tool_call>",
        ("", [("f", '{"a": "}{\\"<", "b": [1, {"c": "\\u00e9"}], "d": null}')]),
    ),
    (
        HERMES,
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>\n{"name": "g"}\n</tool_call>',
        ("", [("f", '{"x": 1}'), ("g", "{}")]),
    ),
    (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', ("", [("f", '{"x": 1}')])),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', ("", [("f", '{"x": 1}')])),
    (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', ("", [("f", "{}")])),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")])),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"x": ', ("", [("f", '{"x": ')])),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"x": 1}}', ("", [("f", '{"x": 1}')])),
    (HERMES, "use <tool_call> to call", ("use <tool_call> to call", [])),
    (HERMES, 'say <tool_call>{"nam', ('say <tool_call>{"nam', [])),
    (HERMES, "a <tool_", ("a <tool_", [])),
    (HERMES, 'a<tool_call>{"name": "f", "arguments": {}}</tool_call> and b', ("a and b", [("f", "{}")])),
    (
        HERMES,
        'a \n<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"}</tool_call>\n b \n',
        ("a \n\n b \n", [("f", "{}"), ("g", "{}")]),
    ),
    (
        HERMES,
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n{"name": "g", "arguments": {}}\n</tool_call>',
        ("", [("f", '{"x": 1}'), ("g", "{}")]),
    ),
    (LLAMA, '{"name": "f", "parameters": {"x": "y"}}', ("", [("f", '{"x": "y"}')])),
    (LLAMA, ' \n<|python_tag|>{"name": "f", "parameters": {}}', ("", [("f", "{}")])),
    (
        LLAMA,
        '<|python_tag|>{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}',
        ("", [("f", '{"x": 1}'), ("g", "{}")]),
    ),
    (LLAMA, '{"answer": 42}', ('{"answer": 42}', [])),
    (LLAMA, '{"name": "Ada", "age": 36}', ('{"name": "Ada", "age": 36}', [])),
    (LLAMA, 'It is {"name": "f", "parameters": {}}', ('It is {"name": "f", "parameters": {}}', [])),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"x": [1]}}]', ("", [("f", '{"x": [1]}')])),
    (
        MISTRAL,
        'ok[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"y": 2}}]',
        ("ok", [("f", "{}"), ("g", '{"y": 2}')]),
    ),
    (MISTRAL_NAMED, '[TOOL_CALLS]f[ARGS]{"x": 1}', ("", [("f", '{"x": 1}')])),
    (MISTRAL_NAMED, '[TOOL_CALLS]f{"x": 1}[TOOL_CALLS]g[ARGS]{}', ("", [("f", '{"x": 1}'), ("g", "{}")])),
    (MISTRAL_NAMED, "[TOOL_CALLS]f [ARGS] null", ("", [("f", "{}")])),
    (MISTRAL_WITH_IDS, '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"x": 1}', ("", [("f", '{"x": 1}')])),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"x": 1}\n</tool_call> b', (" b", [("f", '{"x": 1}')])),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"x": 1}}}\n</tool_call>b', ("b", [("f", '{"x": 1}')])),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"x": 1}, "arguments": {}}</tool_call>', ("", [("f", '{"x": 1}')])),
    *(
        (HERMES, text, (text, []))
        for value in ("not json", "[1, 2]", "5", '"5"', '"{"')
        for text in [f'<tool_call>{{"name": "f", "arguments": {value}}}</tool_call>']
    ),
    (LLAMA, '{"name": "Ada", "parameters": 5}', ('{"name": "Ada", "parameters": 5}', [])),
    (MISTRAL, "[TOOL_CALLS] [nothing]", ("[TOOL_CALLS] [nothing]", [])),
    (MISTRAL, "[TOOL_CALLS] [, nothing]", ("[TOOL_CALLS] [, nothing]", [])),
]


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize(
    ("written", "text"),
    [
        (HERMES, 'so <tool_call>\n{"name": "h", "arguments": {"x": 1}}\n</tool_call> it is'),
        (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "h"}</tool_call>'),
        (LLAMA, '{"name": "resnet", "parameters": {"depth": 50}, "dataset": "imagenet"}'),
        (LLAMA, '<|python_tag|>{"name": "h", "parameters": {}}'),
        (MISTRAL, '[TOOL_CALLS] [{"name": "h", "arguments": {"x": [1]}}]'),
        (MISTRAL_NAMED, '[TOOL_CALLS]h[ARGS]{"x": 1}'),
        (MISTRAL_WITH_IDS, '[TOOL_CALLS]h[CALL_ID]abcdefghi[ARGS]{"x": 1}'),
    ],
)
def test_a_call_of_no_tool_is_text(written: ToolFormat, text: str, pieces: int) -> None:
    reader = ToolCallReader(written, {"f", "g"})
    deltas = [delta for at in range(0, len(text), pieces) for delta in reader.push(text[at : at + pieces])]
    assert joined(deltas + reader.finish()) == (text, [])


@pytest.mark.slow
@pytest.mark.parametrize(("written", "text", "expected"), CASES, ids=lambda value: ascii(value)[:40])
def test_calls_are_read_in_any_pieces(written: ToolFormat, text: str, expected: Read) -> None:
    assert read(written, [text]) == expected
    assert read(written, list(text)) == expected
    for cut in range(len(text)):
        assert read(written, [text[:cut], text[cut:]]) == expected


@pytest.mark.slow
@given(
    st.sampled_from([HERMES, LLAMA, MISTRAL, MISTRAL_NAMED]),
    st.text(alphabet='<>{}[]":,; tolcanmergu_/|ARGS\\\n', max_size=60),
    st.randoms(),
)
def test_nothing_that_comes_breaks_the_reader(written: ToolFormat, text: str, rng: Any) -> None:
    cuts = sorted(rng.sample(range(len(text) + 1), min(3, len(text) + 1)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(written, pieces) == read(written, [text])
    if written.opening not in text and not text.lstrip().startswith("{"):
        assert read(written, pieces) == (text, [])


def test_arguments_come_as_they_are_written() -> None:
    reader = ToolCallReader(HERMES, new_id=lambda: "call_1")
    found = [
        reader.push(piece) for piece in ('<tool_call>{"name": "f", "argum', 'ents": {"x": "a', 'b"}}</tool', "_call>")
    ]
    assert found == [
        [],
        [Delta("", 0, "call_1", "f"), Delta('{"x": "a', 0)],
        [Delta('b"}', 0)],
        [],
    ]
    ids = {ToolCallReader(written)._new_id() for written in (HERMES, HERMES, MISTRAL)}
    assert sorted(map(len, ids)) == [9, 29, 29]


def test_formats_are_recognised_from_templates() -> None:
    assert tool_format("{{ messages }} <tool_call>") is None  # it shows no tools
    assert tool_format('{% if tools %}<tools>.. return <tool_call>\n{"name": ..}\n</tool_call>') == HERMES
    assert tool_format("{% if tools %}<tool_call>\n<function=f>\n<parameter=x>") is None
    assert tool_format("{% if tools %}<tool_call>{name}<arg_key>") is None
    assert tool_format("{{ tools }}[TOOL_CALLS]{{ name }}[CALL_ID]{{ id }}[ARGS]") == MISTRAL_WITH_IDS
    assert tool_format('{% if tools %}Environment: ipython {"name": .., "parameters": ..}') == LLAMA
    assert tool_format("{% for tool in tools %}<|python_tag|>") == LLAMA
    assert tool_format('[AVAILABLE_TOOLS] {{ tools }} [TOOL_CALLS] [{"name": ..}]') == MISTRAL
    assert tool_format("{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}") == MISTRAL_NAMED
    assert tool_format("{{ tools }} in a form of its own") is None


MARKED = merging_tokenizer('{"name": "weather", "arguments": {"city": "Paris"}}')
_MARKERS = sorted(MISTRAL_WITH_IDS.markers | HERMES.markers | LLAMA.markers)
MARKED.add_special_tokens({"additional_special_tokens": _MARKERS})


def accepts(source: str, text: str, tokenizer: PreTrainedTokenizerFast = BYTES) -> bool:
    """Whether a text, token by token, is one of the grammar's."""
    over = hf.from_tokenizer(tokenizer, n_vocab=len(tokenizer), eos_token=tokenizer.eos_token_id)
    matcher = LLMatcher(over, LLMatcher.grammar_from_lark(source), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = tokenizer.encode(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def of(written: ToolFormat, name: str, arguments: str) -> str:
    call = f'{{"name": "{name}", "{written.arguments}": {arguments}}}'
    return {
        "tags": f"<tool_call>\n{call}\n</tool_call>",
        "bare": call,
        "list": f"[TOOL_CALLS] [{call}]",
        "named": f"[TOOL_CALLS]{name}{'[CALL_ID]abcdefghi' * bool(written.call_id)}[ARGS]{arguments}",
    }[written.kind]


ALL = [HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, MISTRAL_WITH_IDS]


@pytest.mark.slow
@pytest.mark.parametrize("written", ALL, ids=lambda one: one.kind)
@pytest.mark.parametrize("tokenizer", [BYTES, MARKED], ids=["markers are text", "markers are tokens"])
def test_grammars_let_calls_through_and_nothing_else(written: ToolFormat, tokenizer: PreTrainedTokenizerFast) -> None:
    special = {str(token): n for n, token in tokenizer.added_tokens_decoder.items()}
    source = grammar(written, [WEATHER, CLOCK, TREE], parallel=False, special=special)
    for name, arguments, right in [
        ("weather", '{"city": "Oslo"}', True),
        ("weather", '{"city": "Oslo", "days": 3}', True),
        ("weather", '{"city": "Oslo", "days": "3"}', False),
        ("weather", '{"town": "Oslo"}', False),
        ("tree", '{"left": {"left": {}}, "label": "a", "other": "b"}', True),
        ("tree", '{"left": 3}', False),
        ("tree", '{"other": 3}', False),
        ("clock", "{}", True),
        ("clock", "3", False),
        ("calendar", "{}", False),
    ]:
        text = of(written, name, arguments)
        assert accepts(source, text, tokenizer) == right, text
        if right:
            assert read(written, [text]) == ("", [(name, arguments)])


@pytest.mark.parametrize("written", [HERMES, LLAMA, MISTRAL, MISTRAL_NAMED], ids=lambda one: one.kind)
def test_several_calls_where_they_may_come(written: ToolFormat) -> None:
    one = of(written, "clock", "{}")
    inner = one.removeprefix("[TOOL_CALLS] [").removesuffix("]")
    both = {
        "tags": f"{one}\n{one}",
        "bare": f"{one}; {one}",
        "list": f"[TOOL_CALLS] [{inner}, {inner}]",
        "named": one + one,
    }
    text = both[written.kind]
    assert accepts(grammar(written, [CLOCK], parallel=True, special={}), text)
    assert not accepts(grammar(written, [CLOCK], parallel=False, special={}), text)
    assert read(written, [text]) == ("", [("clock", "{}")] * 2)
