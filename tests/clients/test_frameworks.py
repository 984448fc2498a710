"""LangChain, LiteLLM in this process and as a proxy, and the `llm` command against a live server."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.clients.conftest import QUESTION, WEATHER
from tests.serving.conftest import Running


class Answer(BaseModel):
    """What a structured answer is."""

    verdict: Literal["yes", "no"]
    score: int = Field(ge=0, le=9)


@tool
def weather(city: Literal["Paris", "Oslo"], days: int) -> str:
    """The weather of some days."""
    return f"rain in {city} for {days} days"


def chat(speaking: Running, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{speaking.url}/v1", api_key="none", max_retries=0, **{"model": "pair", "max_tokens": 60, **options}
    )


def said(speaking: Running, **options: Any) -> str:
    reply = speaking.post("/v1/chat/completions", model="pair", messages=QUESTION, **options)
    return str(reply.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_talks_whole_and_in_pieces(speaking: Running, responses: bool) -> None:
    model = chat(speaking, max_tokens=12, temperature=0, use_responses_api=responses)
    expected = said(speaking, max_tokens=12)
    assert model.invoke("the cat?").text == expected
    assert "".join(chunk.text for chunk in model.stream("the cat?")) == expected
    completion = OpenAI(base_url=f"{speaking.url}/v1", api_key="none", model="pair", max_tokens=8, temperature=0)
    reply = speaking.post("/v1/completions", model="pair", prompt="the cat", max_tokens=8)
    assert completion.invoke("the cat") == reply.json()["choices"][0]["text"]


def test_langchain_passes_options_of_collm_on(speaking: Running) -> None:
    alone = chat(speaking, max_tokens=12, temperature=0, model="pair/assistant").invoke("the cat?").text
    options = {"extra_body": {"collm": {"threshold": -1}}}
    model = chat(speaking, max_tokens=12, temperature=0, **options)
    assert model.invoke("the cat?").text == alone != said(speaking, max_tokens=12)
    where: dict[str, Any] = {"base_url": f"{speaking.url}/v1", "api_key": "none", "max_tokens": 8, "temperature": 0}
    completion = OpenAI(**where, model="pair", **options).invoke("the cat")
    assert completion == OpenAI(**where, model="pair/assistant").invoke("the cat")


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_calls_tools_and_hears_of_them(speaking: Running, responses: bool) -> None:
    model = chat(speaking, temperature=0, use_responses_api=responses, max_tokens=200)
    bound = model.bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
    answer = bound.invoke("the cat?")
    assert isinstance(answer, AIMessage)
    (call,) = answer.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["city"] in ("Paris", "Oslo")
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    follow = model.bind_tools([weather]).invoke([HumanMessage("the cat?"), answer, result])
    assert isinstance(follow, AIMessage)
    assert follow.usage_metadata is not None
    assert follow.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]  # type: ignore[index]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_structured_answers(speaking: Running, method: Any) -> None:
    model = chat(speaking, temperature=1, seed=4, max_tokens=200)
    assert isinstance(model.with_structured_output(Answer, method=method).invoke("the cat?"), Answer)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # litellm's own
def test_litellm_in_this_process(speaking: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    import litellm

    where: dict[str, Any] = {"model": "openai/pair", "api_base": f"{speaking.url}/v1", "api_key": "none"}
    plain = litellm.completion(**where, messages=QUESTION, max_tokens=9, temperature=0)
    assert plain.choices[0].message.content == said(speaking, max_tokens=9)
    pieces = litellm.completion(**where, messages=QUESTION, max_tokens=9, temperature=0, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said(speaking, max_tokens=9)
    called = litellm.completion(
        **where, messages=QUESTION, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=200
    )
    (call,) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
    formed = litellm.completion(**where, messages=QUESTION, response_format=Answer, max_tokens=200)
    assert Answer.model_validate_json(formed.choices[0].message.content)


@pytest.mark.soak
def test_the_llm_command(speaking: Running, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: collm\n  model_name: pair\n  api_base: {speaking.url}/v1\n  api_key_name: collm\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    for flags in ([], ["--no-stream"]):
        options = ["-m", "collm", "-o", "max_tokens", "9", "--key", "none", *flags]
        asked = [sys.executable, "-m", "llm", "the cat?", *options]
        done = subprocess.run(asked, capture_output=True, env=environment, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode().rstrip("\n") == said(speaking, max_tokens=9).rstrip("\n")


@pytest.fixture(scope="module")
def proxied(speaking: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of the proxy."""
    where = tmp_path_factory.mktemp("proxy")
    served = {"model": "openai/pair", "api_base": f"{speaking.url}/v1", "api_key": "none"}
    key = f"sk-{secrets.token_hex(32)}"
    settings = {"general_settings": {"master_key": key}}
    models = {"model_list": [{"model_name": "pair", "litellm_params": served}]}
    (where / "config.yaml").write_text(json.dumps({**models, **settings}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(os.environ["COLLM_CLIENTS_PYTHON"]).parent / "litellm"
    command = [str(program), "--config", str(where / "config.yaml"), "--port", str(port), "--host", "127.0.0.1"]
    with (where / "log").open("wb") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, cwd=where)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/health/liveliness", running, where / "log")
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
            yield client
    finally:
        running.terminate()
        running.wait(30)


def _wait(url: str, running: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert running.poll() is None, log.read_text()[-2000:]
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


@pytest.mark.clients
def test_chats_and_completions_pass_through(proxied: openai.OpenAI, speaking: Running) -> None:
    reply = proxied.chat.completions.create(model="pair", messages=QUESTION, max_tokens=9, temperature=0)
    direct = speaking.post("/v1/chat/completions", model="pair", messages=QUESTION, max_tokens=9).json()
    text = direct["choices"][0]["message"]["content"]
    assert reply.choices[0].message.content == text
    pieces = proxied.chat.completions.create(model="pair", messages=QUESTION, max_tokens=9, temperature=0, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
    completion = proxied.completions.create(model="pair", prompt="the cat", max_tokens=7, temperature=0)
    same = speaking.post("/v1/completions", model="pair", prompt="the cat", max_tokens=7).json()
    assert completion.choices[0].text == same["choices"][0]["text"]


@pytest.mark.clients
def test_tools_structured_answers_and_responses_pass_through(proxied: openai.OpenAI) -> None:
    forced: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    called = proxied.chat.completions.create(model="pair", messages=QUESTION, max_tokens=300, **forced)
    (call,) = called.choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")  # type: ignore[union-attr]
    parsed = proxied.chat.completions.parse(model="pair", messages=QUESTION, response_format=Answer, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    assert proxied.responses.create(model="pair", input="the cat?", max_output_tokens=8).output_text
