"""Conversations, tools and forms that users of other servers report as refused or answered wrongly, each with where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from collm.text.chats import Chat
from collm.text.template import PromptTemplate
from tests.clients.conftest import QUESTION, WEATHER, make_speaking_pair
from tests.serving.conftest import CALIBRATION, Running

CHAT, RESPONSE = "/v1/chat/completions", "/v1/responses"
FORM: dict[str, Any] = {
    "type": "object",
    "properties": {"agreed": {"type": "boolean"}},
    "required": ["agreed"],
    "additionalProperties": False,
}
TURNS = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
EMPTY: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def called(arguments: str, **more: Any) -> dict[str, Any]:
    """An assistant's message that calls a function, with `more` keys."""
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}], **more}


def said(**more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call_1", "content": "rain", **more}


HISTORIES: dict[str, list[dict[str, Any]]] = {
    "langchain4j#1958 no content": [*QUESTION, called("{}"), said()],
    "vllm#10015 swarm": [
        *QUESTION,
        called("{}", content=None, refusal=None, function_call=None, audio=None, sender="A"),
        said(tool_name="weather"),
    ],
    "vllm#10463 keys of a plug-in": [{**QUESTION[0], "id": 1947269257, "opts": {"visible": False}}],
    "vllm#19419 empty arguments": [*QUESTION, called("", content=None), said()],
    "vllm#33268 white space": [*QUESTION, called(" \n", content=None), said()],
    "langchain#34751 output_text": [
        *QUESTION,
        {"role": "assistant", "content": [{"type": "output_text", "text": "no"}]},
        *QUESTION,
    ],
    "a refusal": [*QUESTION, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, *QUESTION],
    "a tool's parts": [*QUESTION, called("{}"), said(content=[{"type": "text", "text": "rain"}])],
    "localmind#11 an empty end": [*QUESTION, {"role": "assistant", "content": ""}],
}


@pytest.mark.parametrize("messages", HISTORIES.values(), ids=HISTORIES)
def test_conversations_are_read(speaking: Running, messages: list[dict[str, Any]]) -> None:
    reply = speaking.post(CHAT, model="pair", messages=messages, max_tokens=2)
    assert reply.status_code == 200, reply.text
    token_ids = speaking.post("/tokenize", model="pair", messages=messages).json()["tokens"]
    text = speaking.post("/detokenize", model="pair", tokens=token_ids).json()["prompt"]
    assert ("<tool>rain" in text) == any(message["role"] == "tool" for message in messages)


@pytest.mark.parametrize("arguments", ['"Paris"', '["Paris"]'])
def test_arguments_that_are_no_object_are_refused(speaking: Running, arguments: str) -> None:
    reply = speaking.post(CHAT, model="pair", messages=[*QUESTION, called(arguments), said()], max_tokens=2)
    assert reply.status_code == 400  # sglang#28035: a 500 from the template
    assert reply.json()["error"]["param"] == "messages[1]"


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{"city": "Ro', {"city": "Ro"}),
        ('{"city": "Rome", "days": [1, 2', {"city": "Rome", "days": [1, 2]}),
        ('{"city": "Rome", "da', {"city": "Rome"}),
        ("{", {}),
        ("", {}),
        ('{"city": "Rome"} or so', {"city": "Rome"}),
    ],
)
def test_a_call_that_was_cut_may_be_sent_back(speaking: Running, arguments: str, read: dict[str, Any]) -> None:
    def rendered(arguments: str) -> list[int]:
        messages = [*QUESTION, called(arguments), said()]
        reply = speaking.post("/tokenize", model="pair", messages=messages)
        assert reply.status_code == 200, reply.text
        return reply.json()["tokens"]  # type: ignore[no-any-return]

    assert rendered(arguments) == rendered(json.dumps(read))
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": arguments}
    items = [
        {"role": "user", "content": "x"},
        call,
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
    ]
    assert speaking.post("/v1/responses", model="pair", input=items, max_output_tokens=2).status_code == 200


def test_conversations_of_the_agents_library_are_read(speaking: Running) -> None:
    message = {"type": "output_text", "text": "no", "annotations": [], "logprobs": []}
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"type": "function_call", "id": "fc_1", "status": "completed", "call_id": "c", "name": "n", "arguments": "{}"},
        {"type": "function_call_output", "id": None, "status": None, "call_id": "c", "output": "rain"},
        {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [message]},
        {"role": "user", "content": [{"type": "input_text", "text": "y"}]},
    ]
    reply = speaking.post(RESPONSE, model="pair", input=items, include=[], store=False, max_output_tokens=2)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    "function",
    [
        {"name": "now", "parameters": EMPTY},
        {"name": "now", "parameters": {**EMPTY, "$schema": "http://json-schema.org/draft-07/schema#"}},
        {"name": "now", "description": None, "parameters": EMPTY, "strict": None},
    ],
)
def test_a_function_of_no_arguments_is_called_without(speaking: Running, function: dict[str, Any]) -> None:
    asked = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    reply = speaking.post(CHAT, model="pair", messages=QUESTION, parallel_tool_calls=False, max_tokens=150, **asked)
    (call,) = reply.json()["choices"][0]["message"]["tool_calls"]
    assert call["id"]  # llama.cpp#12279
    assert call["function"]["name"] == "now"
    assert json.loads(call["function"]["arguments"]) == {}


@pytest.mark.parametrize("function", [{"name": "now"}, {"name": "now", "parameters": None}])
def test_a_function_needs_no_schema(speaking: Running, function: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": function}]  # llama.cpp#17667
    reply = speaking.post(CHAT, model="pair", messages=QUESTION, tools=tools, max_tokens=2)
    assert reply.status_code == 200, reply.text


@pytest.mark.slow
def test_tools_are_shown_by_the_template_that_is_named_for_them(serve: Callable[..., Any]) -> None:
    pair = make_speaking_pair(calibration=CALIBRATION)
    tool_use, pair.template = pair.template, replace(pair.template, chat=TURNS, tool_chat=pair.template.chat)
    question: dict[str, Any] = {"model": "pair", "messages": QUESTION, "max_tokens": 2}
    with serve({"pair": pair}) as running:
        for tools, template in (([WEATHER], tool_use), ([], PromptTemplate(chat=TURNS))):
            expected = template.encode_prompt(pair.tokenizer, Chat(QUESTION, tools or None))
            asked = question | ({"tools": tools} if tools else {})
            assert running.post(CHAT, **asked).json()["usage"]["prompt_tokens"] == len(expected)
        forced = running.post(CHAT, **question | {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 300})
    assert forced.json()["choices"][0]["finish_reason"] in ("tool_calls", "length"), forced.text


def test_a_call_that_must_come_goes_before_a_form(speaking: Running) -> None:
    """pydantic-ai#728 and vllm#16313: tools beside a form."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": FORM, "strict": True}}
    asked = {"model": "pair", "messages": QUESTION, "tools": [WEATHER], "response_format": form, "max_tokens": 200}
    more = {"tool_choice": "required", "parallel_tool_calls": False}
    (choice,) = speaking.post(CHAT, **asked, **more).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (choice,) = speaking.post(CHAT, **asked, tool_choice="none").json()["choices"]
    assert set(json.loads(choice["message"]["content"])) == {"agreed"}


def test_an_object_s_schema_is_not_ignored(speaking: Running) -> None:
    """llama.cpp's way to say it, {"type": "json_object", "schema": ..}, is done or refused."""
    form = {"type": "json_object", "schema": FORM}
    reply = speaking.post(CHAT, model="pair", messages=QUESTION, response_format=form, max_tokens=100)
    if reply.status_code == 200:
        assert set(json.loads(reply.json()["choices"][0]["message"]["content"])) == {"agreed"}
    else:
        assert reply.json()["error"]["param"].startswith("response_format")


def test_every_chunk_has_a_finish_reason_and_every_message_a_refusal(speaking: Running) -> None:
    """vllm#19650, mlcommons/endpoints#133."""
    asked = {"model": "pair", "messages": QUESTION, "max_tokens": 4}
    assert speaking.post(CHAT, **asked).json()["choices"][0]["message"]["refusal"] is None
    events = speaking.post(CHAT, **asked, stream=True).text.split("\n\n")
    chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
