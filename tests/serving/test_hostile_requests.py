"""A request costs what it may: no body, connection or client that leaves takes the server from the others."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from contextlib import closing, suppress
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from benchmarks.bodies import BODIES, MAX_BODY, send
from collm.engine import chunks
from collm.errors import ConfigError
from collm.serving import run
from collm.serving.run import allow_connections, quiet_accept_errors
from collm.serving.service import MAX_THREADS, Target
from tests.clients.conftest import make_speaking_pair
from tests.serving.conftest import CALIBRATION, Running, Steps, make_pair
from tests.serving.test_faults import LONG, asking, written

CHAT: dict[str, Any] = {"model": "pair", "messages": [{"role": "user", "content": "w5"}]}


@pytest.mark.slow
@pytest.mark.parametrize("shape", BODIES)
def test_a_body_of_any_shape_is_answered_soon_and_holds_up_nobody(shape: str, server: Running) -> None:
    assert len(BODIES[shape][1]) <= MAX_BODY
    found = send(server.url, shape)
    assert found["status"] in (200, 400, 413)
    assert found["status"] == 200 or found["reply_bytes"] < 1000
    assert found["seconds"] < 5  # generous: `benchmarks.serve` measures at most 1 s on a quiet machine
    assert found["longest_health_s"] < 2


@pytest.mark.parametrize("param", ["bad_words", "stop_token_ids", "messages", "tools", "stop"])
def test_long_lists_are_refused_by_their_length_or_their_first_fault(param: str, server: Running) -> None:
    for items in ([1.5] * 5000, [{"type": "function"}] * 5000, ["w5"] * 5000):
        reply = server.post("/v1/chat/completions", **{**CHAT, param: items})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize("depth", [300, 900, 5000])
@pytest.mark.parametrize("field", ["metadata", "chat_template_kwargs", "tools", "response_format", "messages", "stop"])
def test_nesting_is_no_failure_of_the_server(field: str, depth: int, server: Running) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    values = {
        "tools": f'[{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}]',
        "response_format": f'{{"type": "json_schema", "json_schema": {{"name": "a", "schema": {deep}}}}}',
        "messages": f'[{{"role": "user", "content": "w5", "more": {deep}}}]',
    }
    body = {**CHAT, "tool_choice": "required" if field == "tools" else "none", field: "HERE"}
    content = json.dumps(body).replace('"HERE"', values.get(field, deep))
    reply = server.client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code in (200, 400), reply.text


# Hosts and connections


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1", 200),
        ("10.0.0.7:80", 200),
        ("[::1]:8000", 200),
        ("models.lan", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("", 421),
    ],
)
def test_without_a_key_only_own_names_are_answered(host: str, status: int, serve_pair: Any) -> None:
    with serve_pair(allow_hosts=["models.lan"]) as server:
        reply = server.client.get("/v1/models", headers={"Host": host})
        assert reply.status_code == status
        assert server.client.get("/health", headers={"Host": host}).status_code == 200
        if status == 421:
            assert reply.json()["error"]["code"] == "unknown_host"
            assert "--allow-host" in reply.json()["error"]["message"]


def closed(connection: socket.socket) -> bool:
    """Wait until the server has closed a connection."""
    with suppress(ConnectionResetError):
        while connection.recv(1000):
            pass
    return True  # recv would raise a time-out


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_late_head_closes_the_connection(sent: bytes, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEAD_S", 0.1)
    with server.connect() as late:
        late.sendall(sent)
        assert closed(late)
    with server.connect() as again:  # also after a first request
        again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert again.recv(1000).startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /he")
        assert closed(again)
    assert server.client.get("/health").status_code == 200


def test_connections_beyond_the_limit_are_closed(serve_pair: Any) -> None:
    with serve_pair(max_connections=3) as server:
        server.client.get("/health")
        server.client.close()
        server.until(lambda: not server.server.server_state.connections)
        held_open = [server.connect() for _ in range(3)]
        server.until(lambda: len(server.server.server_state.connections) == 3)
        with server.connect() as another:
            assert closed(another)
        held_open[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert held_open[0].recv(1000).startswith(b"HTTP/1.1 200")
        for one in held_open:
            one.close()


def test_connections_need_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", lambda kind: (64, 1000))
    monkeypatch.setattr("resource.setrlimit", lambda kind, limit: limits.append(limit))
    allow_connections(500)
    assert limits == [(756, 1000)]
    with pytest.raises(ConfigError, match=r"allows 1000 open files, expected at least 1256; lower"):
        allow_connections(1000)


def test_connections_that_cannot_be_accepted_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with closing(asyncio.new_event_loop()) as loop:
        loop.set_exception_handler(quiet_accept_errors())
        for _ in range(100):
            loop.call_exception_handler({"message": "accept", "exception": OSError(24, "Too many open files")})
        assert [record.getMessage() for record in caplog.records] == [
            "connections cannot be accepted: Too many open files"
        ]
        loop.call_exception_handler({"message": "another thing", "exception": ValueError("of ours")})
        assert "another thing" in caplog.text


def test_a_body_has_one_length(server: Running) -> None:
    with server.connect() as smuggling:
        smuggling.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n"
        )
        assert smuggling.recv(1000).startswith(b"HTTP/1.1 400")


# One deadline, one owner


def busy_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "collm request"]


@pytest.fixture
def slow_encoding(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Prompts are encoded when the event is set."""
    gate, encode = threading.Event(), Target.encode

    def waiting(self: Target, *arguments: Any, **options: Any) -> Any:
        gate.wait(30)
        return encode(self, *arguments, **options)

    monkeypatch.setattr(Target, "encode", waiting)
    return gate


@pytest.mark.parametrize("stream", [True, False])
def test_the_time_limit_includes_encoding(stream: bool, slow_encoding: threading.Event, serve_pair: Any) -> None:
    with serve_pair(time_limit_s=0.2) as server:
        reply = server.post("/v1/completions", **LONG, stream=stream)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "time_limit")
        slow_encoding.set()
        server.until(lambda: server.idle() and not busy_threads())


def test_a_client_that_leaves_while_its_prompt_is_encoded_submits_nothing(
    slow_encoding: threading.Event, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Any] = []
    monkeypatch.setattr(server.worker(), "submit", submitted.append)
    with asking(server, **LONG):
        server.until(lambda: bool(busy_threads()))
    server.until(lambda: not server.service.requests)
    slow_encoding.set()
    server.until(lambda: not busy_threads())
    assert submitted == []


class Panic(BaseException):
    """As native code raises it."""


def test_panics_of_native_code_end_their_requests(serve_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def panics(*arguments: Any, **options: Any) -> Any:
        raise Panic("index out of bounds")

    with serve_pair() as server:
        expected = written(server.post("/v1/completions", **LONG))
        for place in ("encode", "detokenize"):
            with monkeypatch.context() as patch:
                patch.setattr(Target, place, panics)
                for _ in range(MAX_THREADS + 1):  # no thread is lost
                    reply = server.post("/v1/completions", **{**LONG, "prompt": [5, 6]}, echo=True)
                    assert reply.status_code == 500
        with monkeypatch.context() as patch:
            patch.setattr("collm.engine.prompt_logprobs.read_chunk", panics)
            assert server.post("/v1/completions", **SCORED).status_code == 500
        with monkeypatch.context() as patch:
            patch.setattr(server.worker()._engine, "step", panics)
            assert server.post("/v1/completions", **LONG).status_code == 500
        assert written(server.post("/v1/completions", **LONG)) == expected
        server.until(server.idle)


def test_a_client_that_does_not_read_loses_its_connection(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "UNREAD_S", 0.2)
    server.until(lambda: not server.service.requests)
    with server.connect() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        silent.sendall(host * 200)  # more than the buffers hold
        name = silent.getsockname()
        open_ones = server.server.server_state.connections
        server.until(lambda: any(one.client == name for one in open_ones))
        server.until(lambda: not any(one.client == name for one in open_ones))
    assert server.client.get("/health").status_code == 200


SCORED = {"model": "pair", "prompt": [5, 6, 7] * 20, "max_tokens": 0, "echo": True, "logprobs": 1}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/collm/candidates"])
def test_jobs_and_steps_alternate_and_jobs_end_with_their_clients(
    path: str, serve_pair: Any, monkeypatch: pytest.MonkeyPatch, later: Any
) -> None:
    monkeypatch.setattr(chunks, "MAX_POSITIONS", 1)
    job = SCORED if path == "/v1/completions" else {"model": "pair", "prompt": [5], "token_ids": [6] * 60}
    read_chunk, read = chunks.read_chunk, list[str]()
    for module in ("candidates", "prompt_logprobs"):
        monkeypatch.setattr(
            f"collm.engine.{module}.read_chunk", lambda *arguments: (read.append("chunk"), read_chunk(*arguments))[1]
        )
    with serve_pair() as server:
        expected = server.post(path, **job).json()
        alone = written(server.post("/v1/completions", **LONG))
        steps = Steps(server.worker())
        monkeypatch.setattr(steps.engine, "step", lambda step=steps.engine.step: (read.append("step"), step())[1])
        read.clear()
        writing = later(server.post, "/v1/completions", **LONG)
        server.until(lambda: len(server.worker().running) == 1)
        working = later(server.post, path, **job)
        server.until(lambda: server.worker().outstanding == 2)
        steps.allow(1000)
        assert written(writing.result()) == alone
        reply = working.result().json()
        for one in (reply, expected):
            one.pop("id", None), one.pop("created", None)
        assert reply == expected
        assert "step chunk chunk step" in " ".join(read)  # a chunk is of both authors
        gate = threading.Event()
        for module in ("candidates", "prompt_logprobs"):
            monkeypatch.setattr(
                f"collm.engine.{module}.read_chunk", lambda *arguments: (gate.wait(0.05), read_chunk(*arguments))[1]
            )
        with httpx.Client(base_url=server.url, timeout=0.3) as leaving, pytest.raises(httpx.ReadTimeout):
            leaving.post(path, json=job)
        server.until(lambda: not server.worker()._jobs, seconds=2)
        server.until(server.idle)


def test_a_prompt_that_is_scored_waits_for_memory_with_a_retry(
    serve: Any, tokenizer: PreTrainedTokenizerFast, later: Any
) -> None:
    pair = make_pair(tokenizer, calibration=CALIBRATION, cache_memory=None)
    with serve({"pair": pair}) as server:
        for runner in pair.runners:
            runner.set_capacity(64)  # type: ignore[union-attr]
        steps = Steps(server.worker())
        writing = later(server.post, "/v1/completions", **{**LONG, "prompt": [5] * 40, "max_tokens": 20})
        server.until(lambda: len(server.worker().running) == 1)
        scoring = later(server.post, "/v1/completions", **{**SCORED, "prompt": [7] * 30})
        server.until(lambda: server.worker().outstanding == 2)
        steps.allow(3)
        reply = scoring.result()
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "cache_full")
        assert reply.headers["Retry-After"] == "1"
        steps.allow(1000)
        assert writing.result().status_code == 200
        too_long = server.post("/v1/completions", **{**SCORED, "prompt": [7] * 70})
        assert (too_long.status_code, too_long.json()["error"]["type"]) == (400, "invalid_request_error")
        assert server.post("/v1/completions", **{**SCORED, "prompt": [7] * 30}).status_code == 200


def test_a_server_that_stops_waits_for_no_thread(slow_encoding: threading.Event, serve_pair: Any, later: Any) -> None:
    with serve_pair(drain_s=0.2) as server:
        asked = later(server.post, "/v1/completions", **LONG)
        server.until(lambda: bool(busy_threads()))
        server.server.handle_exit(15, None)
        assert asked.result().json()["error"]["code"] == "stopping"
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert all(thread.daemon for thread in busy_threads())
        slow_encoding.set()


@pytest.mark.soak
def test_clients_that_leave_at_random_leave_nothing_behind(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MAX_POSITIONS", 4)
    rng = random.Random(0)
    requests = [
        ("/v1/completions", {**LONG, "stream": True}),
        ("/v1/completions", {**LONG, "n": 3}),
        ("/v1/completions", {**LONG, "prompt": "w5 " * 100, "echo": True, "logprobs": 2}),
        ("/v1/completions", SCORED),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/collm/candidates", {"model": "pair", "prompt": [5], "token_ids": [6] * 60}),
        ("/tokenize", {"model": "pair", "prompt": "w5 " * 10_000}),
    ]
    for count in range(40, 52):  # each is compiled, most in a tenth of a second
        properties = {f"p{i}": {"type": "string", "pattern": f"a{{{i}}}"} for i in range(count * 10)}
        schema = {"type": "object", "properties": properties}
        requests.append(("/v1/completions", {**LONG, "structured_outputs": {"json": schema}}))

    async def leave(client: httpx.AsyncClient, path: str, body: dict[str, Any], seconds: float) -> None:
        try:
            reply = await asyncio.wait_for(client.post(path, json=body), seconds)
            assert reply.status_code in (200, 429)
        except (asyncio.TimeoutError, httpx.TransportError):
            pass

    async def all_of_them(url: str) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            await asyncio.gather(*(leave(client, *rng.choice(requests), rng.random() ** 2 * 2) for _ in range(100)))

    with serve({"pair": make_speaking_pair(calibration=CALIBRATION)}, max_batch=8) as server:
        expected = written(server.post("/v1/completions", **LONG))
        for _ in range(3):
            asyncio.run(all_of_them(server.url))
            server.until(lambda: server.idle() and not server.worker()._jobs and not busy_threads())
            server.until(lambda: not server.service.requests)
        assert written(server.post("/v1/completions", **LONG)) == expected
