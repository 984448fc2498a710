"""Requests as users of such servers report them, and what comes of each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from collm.serving.settings import Settings
from tests.clients.conftest import QUESTION, WEATHER, make_speaking_pair
from tests.serving.conftest import Running

CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
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
    (CHAT, {"temperature": "0.7"}, "temperature"),
    (CHAT, {"max_tokens": "6"}, "max_tokens"),
    (CHAT, {"stream": "true"}, "stream"),
    (CHAT, {"foo": "bar"}, "foo"),
    (COMPLETION, {"guided_json": {}}, "guided_json"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0]"),
    (CHAT, {"messages": "the cat?"}, "messages"),
    (CHAT, {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "tree"}}}},
        "response_format",
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "no"}}]}]},
        "messages[0]",
    ),
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
def test_what_cannot_be_done_names_the_field(
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


def test_without_a_threshold_the_error_says_what_to_do(serve: Callable[..., Any]) -> None:
    assert Settings().threshold is None
    with serve({"pair": make_speaking_pair()}) as server:
        error = server.post(CHAT, **ASKED[CHAT]).json()["error"]
        assert "--threshold" in error["message"]
        assert server.post(CHAT, **{**ASKED[CHAT], "model": "pair/base"}).status_code == 200


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
