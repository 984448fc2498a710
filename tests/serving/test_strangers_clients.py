"""What browsers, proxies and clients of vLLM expect of a server."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from collm.serving import answering
from tests.serving.conftest import CALIBRATION, Running, Steps, make_pair
from tests.serving.test_faults import LONG, held, written

ASKED: dict[str, Any] = {"model": "pair", "prompt": "w5 w6", "max_tokens": 4}


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def written_ids(text: str) -> list[int]:
    """The tokens of a stream of any route."""
    parts = [event["choices"][0] if event.get("choices") else event for event in events(text)]
    deltas = [
        part["collm"] for part in parts if "collm" in part and part.get("type") in (None, "response.output_text.delta")
    ]
    return [token_id for delta in deltas for token_id in delta["token_ids"]]


@pytest.mark.parametrize(
    "headers", ["x-stainless-os, x-stainless-lang", "user-agent", "openai-organization, authorization, content-type"]
)
def test_browsers_may_send_what_client_libraries_add(
    headers: str, serve: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    with serve({"pair": make_pair(tokenizer)}, allow_origins=["https://example.org"]) as server:
        asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
        reply = server.client.options("/v1/completions", headers={**asked, "Access-Control-Request-Headers": headers})
        assert reply.status_code == 200, reply.text
        shown = server.client.get("/v1/models", headers={"Origin": "https://example.org"})
        assert "X-Request-Id" in shown.headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_stream_begins_and_goes_on_while_nothing_is_written(
    path: str, serve: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_HEAD_S", 0.05)
    monkeypatch.setattr(answering, "_COMMENT_S", 0.05)
    body: dict[str, Any] = {"model": "pair", "stream": True}
    body |= {"messages": [{"role": "user", "content": "w5"}]} if "chat" in path else {}
    body |= {"input": "w5"} if "responses" in path else {}
    body |= {"prompt": "w5"} if path == "/v1/completions" else {}
    with serve({"pair": make_pair(tokenizer, calibration=CALIBRATION)}) as server:
        expected = written_ids(server.post(path, **body).text)
        with held(server.worker()), server.client.stream("POST", path, json=body) as reply:
            lines = reply.iter_lines()
            assert reply.status_code == 200
            found = [next(lines) for _ in range(12)]
        assert sum(line.startswith(": ") for line in found) >= 2
        server.until(server.idle)
        steps = Steps(server.worker())
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(server.post, path, **body)
            for _ in range(3):
                threading.Event().wait(0.1)
                steps.allow(1)
            steps.allow(1000)
            text = slow.result().text
        assert ": nothing new" in text
        assert written_ids(text) == expected


def test_a_failure_after_the_head_is_an_event(
    serve: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_HEAD_S", 0.02)
    with serve({"pair": make_pair(tokenizer, calibration=CALIBRATION)}, time_limit_s=0.3) as server:
        with held(server.worker()):
            reply = server.post("/v1/completions", **LONG, stream=True)
        assert reply.status_code == 200
        assert events(reply.text)[-1]["error"]["code"] == "time_limit"


def test_usage_is_in_every_chunk_if_asked(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(server.post("/v1/completions", **ASKED, stream=True, stream_options=options).text)
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == 4
    plain = server.post("/v1/completions", **ASKED, stream=True, stream_options={"continuous_usage_stats": True}).text
    assert not any("usage" in event for event in events(plain))


def test_tokens_are_named_by_their_ids_if_asked(server: Running) -> None:
    reply = server.post("/v1/completions", **ASKED, logprobs=2, return_tokens_as_token_ids=True).json()["choices"][0]
    names = [f"token_id:{token_id}" for token_id in reply["collm"]["token_ids"]]
    assert reply["logprobs"]["tokens"] == names
    assert all(name in top for name, top in zip(names, reply["logprobs"]["top_logprobs"], strict=True))
    chat = {"model": "pair", "messages": [{"role": "user", "content": "w5"}], "max_tokens": 3}
    reply = server.post(
        "/v1/chat/completions", **chat, logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True
    ).json()["choices"][0]
    entries = reply["logprobs"]["content"]
    assert [one["token"] for one in entries] == [f"token_id:{token_id}" for token_id in reply["collm"]["token_ids"]]
    assert all(top["token"].startswith("token_id:") for one in entries for top in one["top_logprobs"])


@pytest.mark.parametrize("prompt", [[5] * 128, [5] * 3000, "w5 " * 200, "w5 " * 100_000])
def test_a_prompt_that_is_too_long_has_openais_code(prompt: Any, server: Running) -> None:
    for path, body in [
        ("/v1/completions", {"prompt": prompt}),
        ("/v1/collm/candidates", {"prompt": prompt, "token_ids": [5]}),
    ]:
        reply = server.post(path, model="pair", **body)
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "context_length_exceeded", reply.text


def test_an_empty_prompt_gets_no_hint_of_another_route(server: Running) -> None:
    error = server.post("/v1/completions", model="pair", prompt="").json()["error"]
    assert "at least 1 character" in error["message"]
    assert "stored prompts" not in error["message"]
    stored = server.post("/v1/responses", model="pair", input="w5", prompt={"id": "x"}).json()["error"]
    assert "there are no stored prompts" in stored["message"]


def test_the_page_works_under_a_prefix(server: Running) -> None:
    page = server.client.get("/").text
    assert 'fetch("/' not in page
    assert "fetch(path.slice(1)" in page
    assert written(server.post("/v1/completions", **ASKED))
