"""Requests and conversations that users of other servers report as refused or answered wrongly, each with where."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from collm.text.chats import Chat
from collm.text.template import PromptTemplate
from tests.clients.conftest import QUESTION, WEATHER, make_speaking_pair
from tests.serving.conftest import CALIBRATION, Running

CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
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
    output = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}
    items = [{"role": "user", "content": "x"}, call, output]
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
    """llama.cpp's way to say it: {"type": "json_object", "schema": ..}."""
    form = {"type": "json_object", "schema": FORM}
    reply = speaking.post(CHAT, model="pair", messages=QUESTION, response_format=form, max_tokens=100)
    assert set(json.loads(reply.json()["choices"][0]["message"]["content"])) == {"agreed"}


def test_every_chunk_has_a_finish_reason_and_every_message_a_refusal(speaking: Running) -> None:
    """vllm#19650, mlcommons/endpoints#133."""
    asked = {"model": "pair", "messages": QUESTION, "max_tokens": 4}
    assert speaking.post(CHAT, **asked).json()["choices"][0]["message"]["refusal"] is None
    events = speaking.post(CHAT, **asked, stream=True).text.split("\n\n")
    chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]


ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"model": "pair", "messages": QUESTION, "max_tokens": 6},
    COMPLETION: {"model": "pair", "prompt": "the cat", "max_tokens": 6},
    RESPONSE: {"model": "pair", "input": "the cat?", "max_output_tokens": 6},
}

# Clients in typed languages send every optional field.
NULL_IN_CHATS = """
    temperature top_p n stop seed stream_options tools tool_choice response_format logprobs top_logprobs logit_bias
    user metadata store presence_penalty frequency_penalty max_completion_tokens modalities audio prediction
    reasoning_effort service_tier parallel_tool_calls functions function_call web_search_options
"""
NULL_IN_RESPONSES = """
    previous_response_id instructions tools tool_choice text reasoning metadata background include truncation store
    conversation prompt
"""

TAKEN: list[tuple[str, dict[str, Any]]] = [
    (CHAT, dict.fromkeys(NULL_IN_CHATS.split())),
    (COMPLETION, dict.fromkeys(["suffix", "best_of", "echo", "logprobs", "logit_bias", "stop", "n", "user"])),
    (RESPONSE, dict.fromkeys(NULL_IN_RESPONSES.split())),
    (CHAT, {"stop": []}),
    (CHAT, {"tools": [], "tool_choice": "auto"}),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "now"}}]}),  # llama.cpp#17667
    (CHAT, {"tools": [{"type": "function", "function": {"name": "now", "parameters": None}}]}),
    (CHAT, {"tools": [WEATHER], "tool_choice": "none"}),
    (CHAT, {"temperature": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}),
    (CHAT, {"top_p": 1, "temperature": 0.0001, "seed": 0}),
    (CHAT, {"logprobs": True, "top_logprobs": 0}),
    (CHAT, {"logprobs": False, "top_logprobs": 0}),
    (CHAT, {"logit_bias": {"5": -100, "7": 2.5}}),
    (CHAT, {"messages": [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, *QUESTION]}),
    (CHAT, {"messages": [*QUESTION, {"role": "assistant", "content": ""}, *QUESTION]}),
    (CHAT, {"messages": [{"role": "user", "content": "caf\u00e9 \U0001f408"}]}),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}),
    (CHAT, {"user": "", "metadata": {"a": "b"}}),
    (CHAT, {"stream_options": {"include_usage": True}}),
    (CHAT, {"max_tokens": 6, "max_completion_tokens": 6}),
    (CHAT, {"response_format": {"type": "text"}, "verbosity": "high"}),
    (CHAT, {"presence_penalty": 0.6, "frequency_penalty": 0.5, "repetition_penalty": 1.1}),
    (CHAT, {"ignore_eos": True, "min_tokens": 3, "stop_token_ids": [7]}),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": False}}),
    (CHAT, {"bad_words": ["dog"], "include_stop_str_in_output": True, "stop": "zz"}),
    (CHAT, {"priority": 0, "request_id": "abc", "cache_salt": "x", "spaces_between_special_tokens": True}),
    (COMPLETION, {"prompt": ["the", "cat"]}),
    (COMPLETION, {"prompt": [[5, 6], [7]], "echo": True, "logprobs": 1, "max_tokens": 1}),
    (COMPLETION, {"prompt_logprobs": 0}),
    (COMPLETION, {"truncate_prompt_tokens": 2}),
    (COMPLETION, {"max_tokens": 0, "echo": True}),
    (RESPONSE, {"input": [{"type": "message", "role": "developer", "content": "x"}, {"role": "user", "content": "y"}]}),
    (RESPONSE, {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low", "summary": "auto"}}),
    (RESPONSE, {"text": {"format": {"type": "text"}, "verbosity": "low"}, "max_tool_calls": 3}),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETION, {"guided_json": {}}, "guided_json"),
    (CHAT, {"messages": "the cat?"}, "messages"),
    (CHAT, {"messages": [*QUESTION, called('"Paris"'), said()]}, "messages[1]"),  # sglang#28035
    (CHAT, {"messages": [*QUESTION, called('["Paris"]'), said()]}, "messages[1]"),
    (CHAT, {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "tree"}}}},
        "response_format",
    ),
    (CHAT, {"messages": [called("no")]}, "messages[0]"),
]


@pytest.mark.parametrize(("path", "fields"), TAKEN, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_what_clients_send_is_taken(speaking: Running, path: str, fields: dict[str, Any], stream: bool) -> None:
    reply = speaking.post(path, **{**ASKED[path], **fields, "stream": stream})
    assert reply.status_code == 200, reply.text
    if stream:
        assert reply.headers["content-type"].startswith("text/event-stream")
        last = reply.text.rstrip().rsplit("data: ", 1)[1]
        assert last == "[DONE]" or json.loads(last)["type"] in ("response.completed", "response.incomplete")


@pytest.mark.parametrize(("path", "fields", "param"), REFUSED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_refused_fields_are_named(
    speaking: Running, path: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    reply = speaking.post(path, **{**ASKED[path], "stream": stream, **fields})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


def test_unknown_fields_may_be_ignored(serve: Callable[..., Any]) -> None:
    with serve({"pair": make_speaking_pair()}, ignore_unknown=True, threshold=0.5) as server:
        for path, asked in ASKED.items():
            plain, more = server.post(path, **asked), server.post(path, **asked, foo=1)
            assert (plain.status_code, more.status_code) == (200, 200)
            assert server.post(path, **asked, collm={"foo": 1}).status_code == 400
        assert server.client.get("/v1/collm/info").json()["data"][0]["default_threshold"] == 0.5
        other = server.post(CHAT, **ASKED[CHAT], collm={"threshold": 1.0}).json()
        assert set(other["choices"][0]["collm"]["authors"]) == {0}


def test_the_prompt_s_log_probabilities_beside_those_of_the_answer(speaking: Running) -> None:
    model = speaking.models["pair"]
    prompt = model.tokenizer.encode("hens may sit")
    expected = model.prompt_logprobs(prompt, 2)
    asked = {"model": "pair", "prompt": prompt, "echo": True, "logprobs": 2}
    (whole,) = speaking.post(COMPLETION, **asked, max_tokens=3).json()["choices"]
    (alone,) = speaking.post(COMPLETION, **asked, max_tokens=0).json()["choices"]
    assert alone["text"] == "hens may sit"
    assert alone["finish_reason"] == "length"
    assert alone["collm"]["token_ids"] == []
    assert whole["text"].startswith("hens may sit")
    found = alone["logprobs"]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx([one.logprob for one in expected[1:] if one], abs=1e-4)
    assert "".join(found["tokens"]) == "hens may sit"
    assert found["text_offset"][0] == 0
    count = len(prompt)
    assert len(whole["logprobs"]["tokens"]) == count + 3
    assert whole["logprobs"]["tokens"][:count] == found["tokens"]
    plain = speaking.post(COMPLETION, model="pair", prompt=prompt, logprobs=2, max_tokens=3).json()["choices"][0]
    assert whole["logprobs"]["token_logprobs"][count:] == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-5)
    offsets = [len("hens may sit") + offset for offset in plain["logprobs"]["text_offset"]]
    assert whole["logprobs"]["text_offset"][count:] == offsets
    streamed = speaking.post(COMPLETION, **asked, max_tokens=3, stream=True).text.split("\n\n")
    pieces = [json.loads(event[6:])["choices"][0] for event in streamed if event.startswith("data: {")]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [token for piece in pieces for token in piece["logprobs"]["tokens"]] == whole["logprobs"]["tokens"]


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
def test_prompt_logprobs_have_vllm_s_form(speaking: Running, path: str) -> None:
    reply = speaking.post(path, **ASKED[path], prompt_logprobs=2).json()
    found = reply["prompt_logprobs"] if path == CHAT else reply["choices"][0]["prompt_logprobs"]
    assert len(found) == reply["usage"]["prompt_tokens"]
    assert found[0] is None
    for one in found[1:]:
        assert len(one) in (2, 3)
        assert [entry["rank"] for entry in one.values()][:2] == [1, 2]
        assert all(set(entry) == {"logprob", "rank", "decoded_token"} for entry in one.values())


def test_tokens_and_their_text(speaking: Running) -> None:
    model = speaking.models["pair"]
    found = speaking.post("/tokenize", prompt="the cat", return_token_strs=True).json()
    assert found["tokens"] == model.tokenizer.encode("the cat")
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 2048
    assert speaking.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": "the cat"}
    assert speaking.post("/detokenize", tokens=[5000]).status_code == 400
    chat = speaking.post("/tokenize", model="pair", messages=QUESTION, tools=[WEATHER]).json()
    text = speaking.post("/detokenize", model="pair", tokens=chat["tokens"]).json()["prompt"]
    assert "weather" in text
    assert text.endswith("<assistant>")
    assert speaking.post("/tokenize", model="pair").status_code == 400


def test_other_ways_to_knock(speaking: Running) -> None:
    body = json.dumps(ASKED[CHAT]).encode()
    headers = {"Content-Type": "application/json"}
    for extra in ({"Authorization": "Bearer x"}, {"OpenAI-Organization": "x", "X-Stainless-Lang": "python"}):
        assert speaking.client.post(CHAT, content=body, headers={**headers, **extra}).status_code == 200
    charset = {"Content-Type": "application/json; charset=utf-8"}
    assert speaking.client.post(CHAT, content=body, headers=charset).status_code == 200
    packed = speaking.client.post(CHAT, content=gzip.compress(body), headers={**headers, "Content-Encoding": "gzip"})
    assert packed.status_code in (400, 415)
    slashed = httpx.post(f"{speaking.url}{CHAT}/", content=body, headers=headers, follow_redirects=True)
    assert slashed.status_code == 200
    assert speaking.client.options(CHAT).status_code == 405
    assert speaking.client.head("/health").status_code in (200, 405)
