"""OpenAI's library through LiteLLM's proxy, which stands in front of the server."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.clients.conftest import QUESTION, WEATHER
from tests.serving.conftest import Running

pytestmark = pytest.mark.clients


class Answer(BaseModel):
    """What a structured answer is."""

    agreed: bool


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


def test_tools_structured_answers_and_responses_pass_through(proxied: openai.OpenAI) -> None:
    called = proxied.chat.completions.create(
        model="pair",
        messages=QUESTION,
        tools=[WEATHER],
        tool_choice="required",
        max_tokens=300,
        parallel_tool_calls=False,
    )
    (call,) = called.choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")  # type: ignore[union-attr]
    parsed = proxied.chat.completions.parse(model="pair", messages=QUESTION, response_format=Answer, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    assert proxied.responses.create(model="pair", input="the cat?", max_output_tokens=8).output_text
