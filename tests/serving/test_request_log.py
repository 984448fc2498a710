"""One line of the log for each request, and metrics that count what happened."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

from collm import CoLLM
from collm.serving.run import log_as_json
from collm.tools.spec import ToolSpec
from tests.engine.test_engine import random_head
from tests.serving.conftest import Running
from tests.tiny_models import make_model, tiny_config

ASKED = {"model": "pair", "prompt": "w61 w62", "max_tokens": 12}


def samples(server: Running) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names) -> value."""
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_requests_tokens_and_times(serve_pair: Any) -> None:
    with serve_pair() as server:
        replies = [server.post("/v1/completions", **ASKED, n=n).json() for n in (1, 2)]
        assert "[DONE]" in server.post("/v1/completions", **ASKED, stream=True).text
        alone = server.post("/v1/completions", **{**ASKED, "model": "pair/base"}).json()
        server.post("/v1/completions", **ASKED, best_of=3)
        server.post("/v1/completions", **{**ASKED, "model": "no such\nmodel"})
        server.client.get("/nowhere")
        found = samples(server)
        route = "/v1/completions"
        assert found["collm_requests_total", "pair", route, "200"] == 3
        assert found["collm_requests_total", "pair/base", route, "200"] == 1
        assert found["collm_requests_total", "pair", route, "400"] == 1
        assert found["collm_requests_total", "", route, "404"] == 1
        assert found["collm_requests_total", "", "other", "404"] == 1
        assert sum(value for (name, *_), value in found.items() if name == "collm_requests_total") == 7
        used = [reply["usage"]["collm"] for reply in [*replies, replies[0]]]  # the stream was that of the first
        for author in ("base", "assistant"):
            assert found["collm_tokens_total", author, "pair"] == sum(one[author] for one in used)
        assert found["collm_tokens_total", "base", "pair/base"] == alone["usage"]["completion_tokens"]
        assert found["collm_deferral_rate_count", "pair"] == 3
        assert found["collm_deferral_rate_sum", "pair"] == pytest.approx(sum(one["deferral_rate"] for one in used))
        assert found["collm_time_to_first_token_seconds_count", "pair"] == 3
        assert found["collm_time_per_token_seconds_count", "pair"] == 3
        assert (
            0
            < found["collm_time_per_token_seconds_sum", "pair"]
            < found["collm_time_to_first_token_seconds_sum", "pair"] * 100
        )
        assert found["collm_queue_length", "pair"] == found["collm_running", "pair"] == 0


def test_two_servers_count_apart(serve_pair: Any, server: Running) -> None:
    before = samples(server)
    with serve_pair() as other:
        other.post("/v1/completions", **ASKED)
        assert samples(other)["collm_requests_total", "pair", "/v1/completions", "200"] == 1
    assert samples(server) == before


@pytest.mark.parametrize("log_prompts", [False, True])
def test_each_request_has_a_log_line(serve_pair: Any, caplog: pytest.LogCaptureFixture, log_prompts: bool) -> None:
    caplog.set_level(logging.INFO)
    chat = [{"role": "user", "content": "w61 w62"}]
    with serve_pair(log_prompts=log_prompts) as server:
        reply = server.post("/v1/completions", **ASKED)
        server.post("/v1/chat/completions", model="pair", messages=chat, max_tokens=3, stream=True)
        server.post("/v1/completions", **ASKED, best_of=3)
        server.client.get("/health")
        server.client.get("/ready")
    lines = [json.loads(one.message) for one in caplog.records if one.name == "collm.serving.requests"]
    assert [(line["route"], line["model"], line["status"], line["tokens"]) for line in lines] == [
        ("/v1/completions", "pair", 200, reply.json()["usage"]["completion_tokens"]),
        ("/v1/chat/completions", "pair", 200, 3),
        ("/v1/completions", "pair", 400, 0),
    ]
    assert lines[0]["id"] == reply.headers["X-Request-Id"]
    assert lines[0]["deferral_rate"] == pytest.approx(reply.json()["usage"]["collm"]["deferral_rate"], abs=1e-4)
    assert all(line["seconds"] >= 0 for line in lines)
    if log_prompts:
        assert [line["prompt"] for line in lines] == ["w61 w62", chat, "w61 w62"]
    else:
        assert "w61" not in caplog.text


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize("log_prompts", [False, True])
def test_what_a_failing_tool_says_of_the_text_is_logged_only_if_asked(
    serve: Any, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str], log_prompts: bool
) -> None:
    log_as_json(log_prompts=log_prompts)
    tool = ToolSpec("tests.tools.functions:failing")
    model = CoLLM(make_model(tiny_config(), 0), [tool], random_head(32, 1), tokenizer)
    with serve({"pair": model}, log_prompts=log_prompts) as server:
        server.post("/v1/completions", **{**ASKED, "max_tokens": 1}, collm={"threshold": -1})
    log = capsys.readouterr().err
    (said,) = [one for one in map(json.loads, log.splitlines()) if one["level"] == "WARNING"]
    assert said["message"].startswith("tool:tests.tools.functions:failing ")
    assert ("w61" in log) == ("ValueError: always" in log) == log_prompts


@pytest.mark.usefixtures("own_logging")
def test_every_line_of_the_log_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    log_as_json()
    logging.getLogger("collm.serving.requests").info('{"id": "1", "status": 200}')
    try:
        raise ZeroDivisionError("why")
    except ZeroDivisionError:
        logging.getLogger("other").exception("two\nlines")
    request, failure = map(json.loads, capsys.readouterr().err.splitlines())
    assert (request["id"], request["status"], request["level"]) == ("1", 200, "INFO")
    assert failure["message"] == "two\nlines"
    assert "ZeroDivisionError: why" in failure["traceback"]
