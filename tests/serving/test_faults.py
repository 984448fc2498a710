"""What goes wrong stays where it went wrong: clients that leave, models that break, full queues, servers that stop."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from collm import CoLLM
from collm.core.named import POLICIES
from collm.core.policies import Policy, StepView
from collm.errors import ConfigError, LoadError
from collm.models.loading import ModelSpec
from collm.serving.run import APIServer, run
from collm.serving.settings import Settings
from collm.serving.worker import Worker
from tests.serving.conftest import CALIBRATION, Running, Steps, make_pair

LONG = {"model": "pair", "prompt": "w5 w6", "max_tokens": 100}


@contextmanager
def held(worker: Worker) -> Iterator[None]:
    """The worker does nothing until the block ends."""
    gate = threading.Event()
    worker.commands.put(lambda: gate.wait(60))
    try:
        yield
    finally:
        gate.set()


@pytest.fixture
def alone(serve: Any, tokenizer: PreTrainedTokenizerFast) -> Iterator[Running]:
    """A server of one's own, whose engine reads nothing ahead: about a token for each step."""
    pair = make_pair(tokenizer, calibration=CALIBRATION)
    with serve({"pair": pair}, max_batch=2, max_waiting=2, drain_s=20) as running:
        yield running
        running.until(running.idle)


def next_event(lines: Iterator[str]) -> dict[str, Any]:
    line = next(line for line in lines if line)
    return json.loads(line.removeprefix("data: "))  # type: ignore[no-any-return]


def written(reply: httpx.Response) -> list[tuple[str, list[int]]]:
    assert reply.status_code == 200, reply.text
    return [(choice["text"], choice["collm"]["token_ids"]) for choice in reply.json()["choices"]]


# Clients that leave


def test_a_stream_that_nobody_reads_any_more_gives_its_slots_back(alone: Running) -> None:
    steps = Steps(alone.worker())
    steps.allow(3)
    with alone.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as reply:
        lines = reply.iter_lines()  # dropping it would close the connection
        assert next_event(lines)["choices"][0]["collm"]["token_ids"]
        assert alone.open_slots > 0
    alone.until(lambda: alone.worker().outstanding == 0)
    steps.allow(1)  # the one that it is in
    alone.until(alone.idle)
    steps.allow(1000)
    assert alone.post("/v1/completions", **LONG).status_code == 200


@contextmanager
def asking(server: Running, **body: Any) -> Iterator[None]:
    """A client that asks, and leaves when the block ends."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}"
    with server.connect() as connection:
        connection.sendall(head.encode() + b"\r\nContent-Type: application/json\r\n\r\n" + content)
        yield


def test_a_request_that_nobody_waits_for_gives_its_slots_back(alone: Running) -> None:
    steps = Steps(alone.worker())
    with asking(alone, **LONG, n=2):
        alone.until(lambda: len(alone.worker().running) == 2)
        steps.allow(1)
        alone.until(lambda: alone.open_slots >= 2)
    alone.until(lambda: alone.worker().outstanding == 0)
    steps.allow(1)
    alone.until(alone.idle)
    steps.allow(1000)
    assert 'status="499"' in alone.client.get("/metrics").text


def test_a_client_that_leaves_the_queue_makes_room(alone: Running, later: Any) -> None:
    worker = alone.worker()
    with held(worker):
        with asking(alone, **LONG, n=4):
            alone.until(lambda: worker.outstanding == 4)
            assert alone.post("/v1/completions", **LONG).status_code == 429
        alone.until(lambda: worker.outstanding == 0)
        asked = later(lambda: alone.post("/v1/completions", **LONG, n=4))
        alone.until(lambda: worker.outstanding == 4)
    assert asked.result().status_code == 200


# Queues that fill


def test_a_full_queue_refuses_until_there_is_room(alone: Running, later: Any) -> None:
    with held(alone.worker()):
        asked = [later(lambda: alone.post("/v1/completions", **LONG).status_code) for _ in range(4)]
        alone.until(lambda: alone.worker().outstanding == 4)
        refused = [
            alone.post("/v1/completions", **LONG),
            alone.post("/v1/completions", **LONG, stream=True),
            alone.post("/v1/collm/candidates", model="pair", prompt="w1", token_ids=[5]),
        ]
        assert alone.client.get("/health").status_code == 200
        with alone.openai() as client, pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(**LONG)
    for reply in refused:
        assert (reply.status_code, reply.headers["Retry-After"]) == (429, "1")
        assert reply.json()["error"]["code"] == "queue_full"
    assert raised.value.code == "queue_full"
    assert [one.result() for one in asked] == [200] * 4
    assert alone.post("/v1/completions", **LONG).status_code == 200


def test_a_request_takes_no_longer_than_it_may(serve: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    pair = make_pair(tokenizer, calibration=CALIBRATION)
    with serve({"pair": pair}, time_limit_s=1.0) as server:
        steps = Steps(server.worker())
        whole = server.post("/v1/completions", **LONG)
        assert whole.status_code == 504
        assert whole.json()["error"]["code"] == "time_limit"
        steps.allow(1)
        server.until(server.idle)
        steps.allow(2)
        reply = server.post("/v1/completions", **LONG, stream=True)
        assert reply.status_code == 200
        *_, chunk, error, end = reply.text.split("\n\n")
        assert json.loads(chunk.removeprefix("data: "))["choices"][0]["finish_reason"] is None
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "time_limit"
        assert end == ""
        steps.allow(1)
        server.until(server.idle)


def test_a_stream_that_is_not_read_is_held_no_longer_than_it_may(serve_pair: Any) -> None:
    with serve_pair(time_limit_s=0.5) as server:
        server.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with asking(server, **LONG, n=16, logprobs=20, stream=True):
            server.until(lambda: 'status="504"' in server.client.get("/metrics").text)
            server.until(server.idle)


def test_a_body_that_does_not_come_is_waited_for_no_longer_than_it_may(serve_pair: Any) -> None:
    with serve_pair(time_limit_s=0.05) as server, server.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\nhalf")
        answer = HTTPResponse(connection)
        answer.begin()
        assert (answer.status, json.load(answer)["error"]["code"]) == (408, "body_timeout")


# Requests, models and policies that break


@dataclass(frozen=True)
class BadPolicy(Policy):
    """Raises at its fourth token."""

    def author(self, step: StepView) -> int:
        if step.position == 3:
            raise ZeroDivisionError("secret thing")
        return step.position % 2


def test_a_policy_that_raises_ends_its_request_alone(
    alone: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, later: Any
) -> None:
    monkeypatch.setitem(POLICIES, "bad", BadPolicy)
    expected = written(alone.post("/v1/completions", **LONG))
    with held(alone.worker()):
        bad = later(lambda: alone.post("/v1/completions", **LONG, collm={"policy": "bad"}))
        good = later(lambda: alone.post("/v1/completions", **LONG))
        streamed = later(lambda: alone.post("/v1/completions", **LONG, collm={"policy": "bad"}, stream=True))
        alone.until(lambda: alone.worker().outstanding == 3)
    assert written(good.result()) == expected
    assert bad.result().status_code == 500
    assert bad.result().json()["error"]["code"] == "internal_error"
    assert "error" in json.loads(streamed.result().text.strip().split("\n\n")[-1].removeprefix("data: "))
    for reply in (bad.result(), streamed.result()):
        assert "secret thing" not in reply.text
        assert '"finish_reason":"' not in reply.text
        assert "[DONE]" not in reply.text
    assert "secret thing" in caplog.text


def test_a_client_sees_a_stream_break_off(alone: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "bad", BadPolicy)
    steps = Steps(alone.worker())
    steps.allow(1)
    with alone.openai() as client:
        stream = client.completions.create(**LONG, stream=True, extra_body={"collm": {"policy": "bad"}})  # type: ignore[call-overload]
        assert next(stream).choices[0].collm["token_ids"]
        steps.allow(100)
        with pytest.raises(openai.APIError, match="the server failed"):
            list(stream)


def test_nan_ends_one_request_and_spoils_no_other(alone: Running, later: Any) -> None:
    expected = written(alone.post("/v1/completions", **LONG))
    base: Any = alone.models["pair"].base
    poison = next(token for token in range(10, 97) if token not in expected[0][1])
    base.model.embed_tokens.weight.data[poison] = torch.nan
    with held(alone.worker()):
        bad = later(lambda: alone.post("/v1/completions", **{**LONG, "prompt": [7, poison]}))
        good = later(lambda: alone.post("/v1/completions", **LONG))
        alone.until(lambda: alone.worker().outstanding == 2)
    assert bad.result().status_code == 500
    assert "NaN" not in bad.result().text
    assert written(good.result()) == expected
    assert written(alone.post("/v1/completions", **LONG)) == expected


def test_a_loop_that_breaks_down_fails_what_runs(alone: Running, caplog: pytest.LogCaptureFixture, later: Any) -> None:
    expected = written(alone.post("/v1/completions", **LONG))
    worker = alone.worker()
    engine, step, count = worker._engine, worker._engine.step, iter(range(100))

    def breaking() -> Any:
        if next(count) == 3:
            raise RuntimeError("out of something")
        return step()

    with held(worker):
        engine.step = breaking
        asked = [later(lambda: alone.post("/v1/completions", **LONG)) for _ in range(4)]
        alone.until(lambda: worker.outstanding == 4)
    replies = [one.result() for one in asked]
    assert sorted(reply.status_code for reply in replies) == [200, 200, 500, 500]  # two ran, two waited
    assert all(written(reply) == expected for reply in replies if reply.status_code == 200)
    assert not any("out of something" in reply.text for reply in replies)
    assert "out of something" in caplog.text
    assert worker._engine is not engine


def test_a_defect_of_ours_is_an_answer_with_an_id_and_no_details(
    alone: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any) -> Any:
        raise ZeroDivisionError("secret thing")

    monkeypatch.setattr(alone.models["pair"], "candidates_in_chunks", broken)
    reply = alone.post("/v1/collm/candidates", model="pair", prompt="w1", token_ids=[5])
    assert reply.status_code == 500
    assert "secret thing" not in reply.text
    assert reply.json()["error"]["code"] == "internal_error"
    assert reply.headers["X-Request-Id"] in caplog.text
    assert "secret thing" in caplog.text


# Servers that start and stop


def test_a_server_that_stops_finishes_what_runs_and_takes_nothing_new(alone: Running, later: Any) -> None:
    expected = written(alone.post("/v1/completions", **LONG))
    with held(alone.worker()):
        asked = [later(lambda: alone.post("/v1/completions", **LONG)) for _ in range(3)]
        alone.until(lambda: alone.worker().outstanding == 3)
        alone.server.handle_exit(15, None)
        alone.until(lambda: not alone.worker().accepting)
        refused = alone.post("/v1/completions", **LONG)
        unready = alone.client.get("/ready")
        assert alone.client.get("/health").status_code == 200
    for reply in (refused, unready):
        assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
        assert reply.json()["error"]["code"] == "stopping"
    assert [written(one.result()) for one in asked] == [expected] * 3
    alone.thread.join(20)
    assert not alone.thread.is_alive()


def test_a_server_waits_no_longer_than_it_may(serve_pair: Any, later: Any) -> None:
    with serve_pair(drain_s=0) as server:
        steps = Steps(server.worker())
        asked = later(lambda: server.post("/v1/completions", **LONG))
        server.until(lambda: server.worker().outstanding == 1)
        server.server.handle_exit(15, None)
        assert asked.result().status_code == 503
        assert asked.result().json()["error"]["code"] == "stopping"
        steps.allow(1)
        server.thread.join(20)
        assert server.idle()


def test_while_models_are_loaded_the_server_is_not_ready(pair: CoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, engine = threading.Event(), CoLLM.engine

    def slow(self: CoLLM, *arguments: Any) -> Any:
        loading.wait(60)
        return engine(self, *arguments)

    monkeypatch.setattr(CoLLM, "engine", slow)
    server = Running({"pair": pair}, Settings())
    starting = ThreadPoolExecutor(1)
    started = starting.submit(server.start)
    server.until(lambda: hasattr(server, "url"))
    try:
        assert server.client.get("/health").status_code == 200
        for reply in (server.client.get("/ready"), server.post("/v1/completions", **LONG)):
            assert (reply.status_code, reply.headers["Retry-After"]) == (503, "5")
            assert reply.json()["error"]["code"] == "loading"
        assert server.client.get("/v1/models").status_code == 200
        loading.set()
        started.result()
        assert server.client.get("/ready").status_code == 200
    finally:
        loading.set()
        starting.shutdown()
        server.stop()


def test_models_that_cannot_be_loaded_end_the_server(pair: CoLLM, tmp_path: Path) -> None:
    pair.tokenizer.save_pretrained(tmp_path)  # and no weights
    without = CoLLM(pair.base, [ModelSpec(str(tmp_path))], pair.head, pair.tokenizer)
    server = APIServer({"pair": without}, Settings(), host="127.0.0.1", port=0)
    server.run()
    assert isinstance(server.service.failure, LoadError)


def test_an_open_address_needs_a_key(pair: CoLLM) -> None:
    with pytest.raises(Exception, match=r"0\.0\.0\.0, which others can reach, and there is no API key"):
        run({"pair": pair}, Settings(), host="0.0.0.0")


def test_an_address_that_cannot_be_listened_on_is_said(pair: CoLLM) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = APIServer({"pair": pair}, Settings(), host="127.0.0.1", port=port)
        with pytest.raises(ConfigError, match=rf":{port}: .*in use; give another --host or --port"):
            server.run()


def test_a_server_starts_again_where_it_was(pair: CoLLM) -> None:
    models = {"pair": pair}
    first = Running(models, Settings()).start()
    expected = written(first.post("/v1/completions", **LONG))
    port = int(first.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)):  # the server is the one who closes it
        first.stop()
        again = Running(models, Settings(), port).start()
        assert written(again.post("/v1/completions", **LONG)) == expected
        again.stop()


def test_an_idle_worker_sleeps(alone: Running) -> None:
    """It waits for commands, so nothing calls the engine."""
    worker = alone.worker()
    calls: list[int] = []
    fill = worker._fill
    worker._fill = lambda: (calls.append(1), fill())[1]
    alone.post("/v1/completions", **{**LONG, "max_tokens": 1})
    alone.until(alone.idle)
    threading.Event().wait(0.05)
    before = len(calls)
    threading.Event().wait(0.1)
    assert len(calls) == before > 0
