"""A live server whose models speak bytes, with random weights: what has a form has it by the server's doing."""

from __future__ import annotations

import asyncio
import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import openai
import pytest

from collm import CoLLM, ToolSpec
from collm.text.template import PromptTemplate
from collm.tools.calls import in_process
from tests.engine.test_engine import random_head
from tests.serving.conftest import CALIBRATION, Running, serve  # noqa: F401
from tests.tiny_models import make_model, tiny_config
from tests.tokenizers import merging_tokenizer

CHAT = (
    "{%- if tools %}tools: {{ tools | tojson }}, called as <tool_call>\n"
    '{"name": .., "arguments": ..}\n</tool_call>\n{% endif %}'
    "{%- for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "{%- endfor %}{%- if add_generation_prompt %}<assistant>{% endif %}"
)
BYTES = merging_tokenizer(
    '{"name": "weather", "arguments": {"city": "Paris", "days": 3}}',
    "<tool_call>\n</tool_call>",
    "the cat sat on a mat",
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of some days.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
QUESTION: list[Any] = [{"role": "user", "content": "the cat?"}]


def make_speaking_pair(**options: Any) -> CoLLM:
    """A pair over bytes, with a chat template that shows tools."""
    config = {"vocab_size": len(BYTES), "max_position_embeddings": 2048, "eos_token_id": BYTES.eos_token_id}
    models = make_model(tiny_config(**config), 0), make_model(tiny_config(hidden_size=48, **config), 1)
    head = random_head(32, 1, scale=1.0)
    return CoLLM(models[0], [models[1]], head, BYTES, template=PromptTemplate(chat=CHAT), **options)


CALL = 'so: <tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'


def make_pair_with_caller() -> CoLLM:
    """A base with a tool that writes CALL as the beginning of every answer."""
    config = tiny_config(vocab_size=len(BYTES), max_position_embeddings=2048, eos_token_id=BYTES.eos_token_id)

    def knows(prompt: str) -> str | None:
        return CALL if prompt.endswith("<assistant>") else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collm.models.tools.open_tool", lambda spec: in_process(knows))
        spec = ToolSpec("calculator", eps=0.01, max_answer=200)
        model = CoLLM(make_model(config, 0), [spec], random_head(32, 1), BYTES, template=PromptTemplate(chat=CHAT))
        assert model.members
    return model


@pytest.fixture(scope="session")
def speaking(serve: Callable[..., Any]) -> Iterator[Running]:  # noqa: F811
    """`pair`, calibrated; `caller`, which calls a function."""
    models = {"pair": make_speaking_pair(calibration=CALIBRATION)}
    models["caller"] = make_pair_with_caller()
    with serve(models) as running:
        yield running


@pytest.fixture(autouse=True)
def _libraries_clean_up() -> Iterator[None]:
    """Connections and event loops that client libraries leave behind are gone before another test's turn."""
    with closing(asyncio.new_event_loop()) as loop:  # a library that asks for the current one gets one that is closed
        asyncio.set_event_loop(loop)
        yield
        asyncio.set_event_loop(None)
    if litellm := sys.modules.get("litellm"):
        litellm.in_memory_llm_clients_cache.flush_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def client(speaking: Running) -> Iterator[openai.OpenAI]:
    with speaking.openai() as client:
        yield client
