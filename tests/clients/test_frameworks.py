"""LangChain, LiteLLM and the `llm` command against a live server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

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
        base_url=f"{speaking.url}/v1", api_key="none", model="pair", max_retries=0, **{"max_tokens": 60, **options}
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
        asked = [
            sys.executable,
            "-m",
            "llm",
            "the cat?",
            "-m",
            "collm",
            "-o",
            "max_tokens",
            "9",
            "--key",
            "none",
            *flags,
        ]
        done = subprocess.run(asked, capture_output=True, env=environment, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode().rstrip("\n") == said(speaking, max_tokens=9).rstrip("\n")
