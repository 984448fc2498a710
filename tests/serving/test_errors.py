"""Every refusal has OpenAI's shape and names the parameter, and what the schema at /openapi.json allows is answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from collm.errors import ConfigError
from collm.serving.settings import Settings
from tests.serving.conftest import Running
from tests.serving.test_generation import of_choice

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "w5"}]
ASKED: dict[str, dict[str, Any]] = {
    COMPLETION: {"model": "pair", "prompt": "w5"},
    CHAT: {"model": "pair", "messages": MESSAGES},
    "/v1/collm/candidates": {"model": "pair", "token_ids": [5]},
}


def refused(reply: httpx.Response, status: int, param: str | None, *, said: str = "") -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert said in error["message"]
    assert "Traceback" not in reply.text


WRONG_IN_BOTH: list[tuple[dict[str, Any], str | None, str]] = [
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
    ({"seed": 1 << 70, "temperature": 1}, "seed", "less than"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 17}, "n", "17 completions, this server gives 16"),
    ({"max_tokens": 4097}, "max_tokens", "at most 4096"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"stop": ""}, "stop", "at least 1 character"),
    ({"stop": ["a"] * 65}, "stop", "at most 64"),
    ({"stop": [""]}, "stop", "at least 1 character"),
    ({"stop": "\ud800"}, "stop", "unicode"),
    ({"user": "\ud800"}, "user", "surrogate"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
    ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "greater than or equal to -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"logit_bias": {"five": 1}}, "logit_bias", "pattern"),
    ({"logit_bias": {"97": 1}}, "logit_bias", "outside the vocabulary of 97"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "0 to 4"),
    ({"stop_token_ids": [97]}, "stop_token_ids", "outside the vocabulary of 97"),
    ({"skip_special_tokens": False}, "skip_special_tokens", "special tokens have no text; collm.token_ids"),
    ({"use_beam_search": True}, "use_beam_search", "beam search is not supported"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "without a schema"),
    (
        {"structured_outputs": {}},
        "structured_outputs",
        "exactly one of json, json_object, regex, choice and grammar, got none",
    ),
    ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "no parameter"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs", "both"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "byte-level BPE"),
    ({"foo": 1}, "foo", "foo is no parameter of this server"),
    ({"collm": {"threshold": 2}}, "collm.threshold", "less than or equal to 1"),
    ({"collm": {"threshold": 0.5, "budget": 0.5}}, "collm.budget", "give one of them"),
    ({"collm": {"budget": -1}}, "collm.budget", "greater than or equal to 0"),
    ({"collm": {"policy": "best"}}, "collm.policy", "policy is 'best', expected one of"),
    ({"collm": {"policy": "single:writer=7"}}, None, "asks for author 7"),
    ({"collm": {"policy": "proxy:model=5,tuned=0,untuned=1"}}, None, "asks for author 5"),
    ({"collm": {"policy": "joint", "threshold": 0.5}}, "collm.policy", "no effect"),
    ({"collm": {"price": 0.7}}, "collm.price", "predicts no gains to compare it with"),
    ({"collm": {"price": 0.7, "threshold": 0.5}}, "collm.price", "give one of them"),
    ({"collm": {"price": []}}, "collm.price", "at least 1"),
    ({"collm": {"eta": 0.5}}, "collm.eta", "no parameter"),
    ({"model": "pair/base", "collm": {"threshold": 0.5}}, "collm", "one author alone"),
    ({"model": "three"}, "collm.threshold", "not calibrated; send collm.threshold, start the server with --threshold"),
    ({"model": "three", "collm": {"budget": 0.5}}, "collm.budget", "a budget needs a calibration"),
]
WRONG_ALONE: dict[str, list[tuple[dict[str, Any], str, str]]] = {
    COMPLETION: [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "   "}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [[]]}, "prompt", "at least 1 item"),
        ({"prompt": ["w5", ""]}, "prompt", "at least 1 character"),
        ({"prompt": [5, "w5"]}, "prompt", "valid"),
        ({"prompt": [97]}, "prompt", "outside the vocabulary of 97"),
        ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        ({"prompt": 5}, "prompt", "valid string"),
        ({"prompt": [5] * 128}, "prompt", "is 128 tokens including its output"),
        ({"prompt": [[5]] * 17}, "prompt", "17 completions"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"max_tokens": 0}, "max_tokens", "without echo"),
        ({"best_of": 2}, "best_of", "expected 1, as n"),
        ({"suffix": "w1"}, "suffix", "Input should be ''"),
        ({"max_completion_tokens": 4}, "max_completion_tokens", "no parameter"),
        ({"messages": MESSAGES}, "messages", "no parameter"),
    ],
    CHAT: [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "", "content": "w1"}]}, "messages[0]", "at least 1 character"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "'content' is None"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]", "'content' is None"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]", "'image_url'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0]", "a call is"),
        ({"messages": [{"role": "user", "content": "w1 " * 200}]}, "messages", "is 128 tokens including its output"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": 5000}, "max_tokens", "at most 4096"),
        ({"top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "missing"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "has no known format of tools"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"modalities": ["audio"]}, "modalities", "text alone"),
        ({"audio": {"voice": "x"}}, "audio", "text alone"),
        ({"chat_template": "x"}, "chat_template", "as in training"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "reserved variable"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt", "both true"),
        ({"prompt": "w5"}, "prompt", "no parameter"),
    ],
    "/v1/collm/candidates": [
        ({}, "prompt", "either prompt or messages"),
        ({"prompt": "w1", "messages": MESSAGES}, "prompt", "either prompt or messages"),
        ({"prompt": "w1", "token_ids": [97]}, "token_ids", "outside the vocabulary"),
        ({"prompt": "w1", "token_ids": [5] * 127}, "token_ids", "is 128 tokens including its output"),
        ({"prompt": "w1", "most": 11}, "most", "less than or equal to 10"),
        ({"prompt": ["w1"]}, "prompt", "valid"),
    ],
}
WRONG = [(path, *one) for path, found in WRONG_ALONE.items() for one in found]
WRONG += [(path, *one) for path in (COMPLETION, CHAT) for one in WRONG_IN_BOTH]


@pytest.mark.parametrize(("path", "wrong", "param", "said"), WRONG, ids=lambda value: ascii(value)[:50])
def test_what_is_wrong(server: Running, path: str, wrong: dict[str, Any], param: str | None, said: str) -> None:
    streams = [{}] if path == "/v1/collm/candidates" or "stream" in wrong else [{"stream": False}, {"stream": True}]
    for stream in streams:
        refused(server.post(path, **{**ASKED[path], **stream, **wrong}), 400, param, said=said)


def test_what_official_clients_send_without_meaning_it(client: openai.OpenAI) -> None:
    nothing: dict[str, Any] = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "temperature": 0}
    nothing |= {"top_p": 0.9, "n": 1, "user": "me", "stop": None, "seed": 1234, "stream": False}
    plain = client.completions.create(model="pair", prompt="w5", max_tokens=5)
    more: dict[str, Any] = {"best_of": 1, "suffix": None, "echo": False}
    reply = client.completions.create(model="pair", prompt="w5", max_tokens=5, **more, **nothing)
    assert of_choice(reply.choices[0]) == of_choice(plain.choices[0])
    plain_chat = client.chat.completions.create(model="pair", messages=MESSAGES, max_tokens=5)
    nothing |= {"max_tokens": 5, "max_completion_tokens": 5, "tools": [], "tool_choice": "none"}
    nothing |= {"response_format": {"type": "text"}, "modalities": ["text"], "parallel_tool_calls": False}
    nothing |= {"store": True, "metadata": {"run": "1"}, "service_tier": "auto", "reasoning_effort": "low"}
    nothing |= {"verbosity": "low", "prompt_cache_key": "a", "safety_identifier": "b"}
    nothing |= {"prediction": {"type": "content", "content": "the"}}
    chat = client.chat.completions.create(model="pair", messages=[{**MESSAGES[0], "name": "ada"}], **nothing)
    assert of_choice(chat.choices[0]) == of_choice(plain_chat.choices[0])


def test_models_routes_and_methods_that_do_not_exist(server: Running) -> None:
    refused(server.post("/v1/completions", model="other", prompt="w5"), 404, "model", said="pair/assistant")
    refused(server.post("/v1/collm/candidates", model="x", prompt="w5", token_ids=[]), 404, "model")
    refused(server.client.get("/v1/nothing"), 404, None, said="GET /v1/nothing")
    refused(server.client.get("/v1/completions"), 405, None)
    for page in ("/docs", "/redoc"):  # they would run scripts of other servers beside the playground's key
        refused(server.client.get(page), 404, None)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b'{"model": NaN}', b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_request(server: Running, body: bytes) -> None:
    reply = server.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    as_text = server.client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert as_text.status_code == 400


def test_a_body_that_is_too_long(server: Running) -> None:
    refused(server.post("/v1/completions", model="pair", prompt="w" * (4 << 20)), 413, None, said="4194304 bytes")

    def chunks() -> Any:
        for _ in range(5):
            yield b"w" * (1 << 20)

    refused(server.client.post("/v1/completions", content=chunks()), 413, None)


def test_the_key(serve_pair: Any) -> None:
    with serve_pair(api_key="secret") as server:
        with server.openai(api_key="secret") as client:
            assert client.models.list().data
        for authorization in ("Bearer secret", "bearer secret", "BEARER  secret"):
            headers = {"Host": "evil.example", "Authorization": authorization}  # any name is answered
            assert server.client.get("/v1/models", headers=headers).status_code == 200
        wrong = ["Bearer other", "Bearer", "Bearer secret2", "Basic secret", "secret"]
        for header in ({}, *({"Authorization": one} for one in wrong)):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/collm/info"):
                reply = server.client.get(path, headers=header)
                refused(reply, 401, None, said="API key")
                assert reply.headers["WWW-Authenticate"] == "Bearer"
                assert "secret" not in reply.text
        odd = server.client.get("/v1/models", headers={"Authorization": "Bearer \xe9".encode("latin-1")})
        assert odd.status_code == 401
        assert server.client.get("/health").status_code == server.client.get("/ready").status_code == 200


ADDED = ["x-stainless-os, x-stainless-lang", "user-agent", "openai-organization, authorization, content-type"]


def test_other_origins_are_let_in_only_by_name(server: Running, serve_pair: Any) -> None:
    origin = {"Origin": "https://example.org"}
    assert "access-control-allow-origin" not in server.client.get("/v1/models", headers=origin).headers
    with serve_pair(allow_origins=["https://example.org"], api_key="k") as open_to:
        preflight = {**origin, "Access-Control-Request-Method": "POST"}
        reply = open_to.client.options("/v1/completions", headers=preflight)
        assert reply.headers["access-control-allow-origin"] == "https://example.org"
        for added in ADDED:  # by client libraries
            asked = {**preflight, "Access-Control-Request-Headers": added}
            assert open_to.client.options("/v1/completions", headers=asked).status_code == 200
        shown = open_to.client.get("/v1/models", headers={**origin, "Authorization": "Bearer k"})
        assert "X-Request-Id" in shown.headers["Access-Control-Expose-Headers"]
        other = open_to.client.options("/v1/completions", headers={**preflight, "Origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers


CHECKS: list[Callable[..., Any]] = [not_a_server_error, status_code_conformance, content_type_conformance]
POSTED = [COMPLETION, CHAT, "/v1/responses", "/v1/collm/candidates", "/tokenize", "/detokenize"]
READ = ["/v1/models", "/v1/models/{name}", "/v1/collm/info", "/tokenizer_info", "/health", "/ready", "/metrics"]
OPERATIONS = [*(("POST", path) for path in POSTED), *(("GET", path) for path in READ)]


def test_every_operation_is_fuzzed(server: Running) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (*one, mode)
        for one in OPERATIONS
        for mode in schemathesis.GenerationMode
        if one[0] == "POST" or mode.is_positive
    ],
)
def test_answers_are_as_the_schema_says(server: Running, method: str, path: str, mode: Any) -> None:
    document = server.client.get("/openapi.json").json()
    _aim(document)
    cases = schemathesis.openapi.from_dict(document)[path][method].as_strategy(generation_mode=mode)

    @seed(0)
    @settings(
        max_examples=15, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=cases)
    def check(case: Any) -> None:
        case.call_and_validate(base_url=server.url, checks=CHECKS)

    check()


def _aim(document: dict[str, Any]) -> None:
    """Models that exist, and few tokens, so that what is generated reaches the models."""
    schemas = document["components"]["schemas"]
    for name in ("Completion", "Chat", "Responses", "Candidates", "Tokenize", "Detokenize"):
        properties = schemas[f"{name}Request"]["properties"]
        properties["model"] = {"type": "string", "enum": ["pair", "pair/base", "three"]}
        for limit in {"max_tokens", "max_completion_tokens", "max_output_tokens"} & set(properties):
            properties[limit] = {"type": "integer", "minimum": 1, "maximum": 5}


def test_a_proxy_shows_it_under_a_path_which_it_removes_or_not(serve_pair: Any) -> None:
    body = {"model": "pair", "prompt": "w1", "max_tokens": 1}
    with serve_pair(root_path="/collm", api_key="k") as server:
        assert server.client.get("/collm/v1/models").status_code == 401
        assert server.client.get("/collm", follow_redirects=True).headers["Content-Type"].startswith("text/html")
        server.client.headers["Authorization"] = "Bearer k"
        for root in ("/collm", ""):
            assert server.client.get(f"{root}/health").status_code == 200
            assert server.post(f"{root}/v1/completions", **body).status_code == 200
            assert server.client.get(f"{root}/openapi.json").json()["servers"] == [{"url": "/collm"}]
        assert server.client.get("/other/v1/models").status_code == 404
        counted = 'collm_requests_total{model="pair",route="/v1/completions",status="200"} 2.0'
        assert counted in server.client.get("/metrics").text


@pytest.mark.parametrize("path", ["collm", "/collm/", "/"])
def test_a_root_path_has_one_form(path: str) -> None:
    with pytest.raises(ConfigError, match="expected a path such as /collm"):
        Settings(root_path=path)


def test_models_say_how_long_a_prompt_may_be(serve_pair: Any) -> None:
    with serve_pair() as server:
        longest = server.post("/tokenize", model="pair", prompt="w1").json()["max_model_len"]
        listed = server.client.get("/v1/models").json()["data"]
        assert [one["max_model_len"] for one in listed] == [longest] * 3
        assert server.client.get("/v1/models/pair").json()["max_model_len"] == longest
        assert server.post("/v1/completions", model="pair", prompt=[5] * longest, max_tokens=1).status_code == 400
