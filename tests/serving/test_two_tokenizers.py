"""Models with different tokenizers behind the server: the same answers as from Python, and refusals in a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from collm import CoLLM, SamplingParams
from collm.serving.settings import Settings
from collm.text.chats import Chat
from collm.text.template import PromptTemplate
from tests.engine.test_segments import random_head
from tests.serving.conftest import Running
from tests.two_tokenizers import two_tokenizers, writing_model

ASK = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}answer:"
TURNS = "{% for message in messages %}[{{ message.role }}] {{ message.content }} {% endfor %}[answer]"
CHAT = [{"role": "user", "content": "what is the capital of it?"}]


@pytest.fixture(scope="module")
def pair() -> CoLLM:
    base, assistant = two_tokenizers()
    assistant.chat_template = {"default": TURNS, "tool_use": "can call it " + TURNS}  # each model has its own
    model = CoLLM(
        writing_model(base, 1),
        [writing_model(assistant, 2, hidden_size=48)],
        random_head(32, 1),
        base,
        tokenizers=[assistant],
        template=PromptTemplate(chat=ASK),
    )
    assistant.chat_template = None
    return model


@pytest.fixture(scope="module")
def served(pair: CoLLM) -> Iterator[Running]:
    running = Running({"pair": pair}, Settings()).start()
    yield running
    running.stop()


def test_each_model_reads_a_chat_by_its_own_template(pair: CoLLM) -> None:
    assert pair.alignment is not None
    (ids,) = pair.assistant_prompts(CHAT)
    assert pair.author_tokenizers[1].decode(ids) == "[user] what is the capital of it? [answer]"
    (ids,) = pair.assistant_prompts(Chat(CHAT, [{"type": "function", "function": {"name": "f"}}]))
    assert pair.author_tokenizers[1].decode(ids) == "can call it [user] what is the capital of it? [answer]"
    assert pair.tokenizer.decode(pair.template.encode_prompt(pair.tokenizer, CHAT)).endswith("it? answer:")


@pytest.mark.parametrize("stream", [False, True])
def test_chats_are_answered_as_from_python(pair: CoLLM, served: Running, stream: bool) -> None:
    (wanted,) = pair.generate([CHAT], SamplingParams(max_tokens=20), threshold=0.4)
    assert {0, 1} == set(wanted.authors)
    asked: dict[str, Any] = {"model": "pair", "messages": CHAT, "max_tokens": 20, "temperature": 0, "logprobs": True}
    client = served.openai()
    made = client.chat.completions.create(**asked, stream=stream, extra_body={"collm": {"threshold": 0.4}})
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in made if chunk.choices)
    else:
        text = made.choices[0].message.content
        assert len(made.choices[0].logprobs.content) == len(wanted.token_ids)
    assert text == wanted.text


def test_prompts_and_truncated_prompts_are_continued(pair: CoLLM, served: Running) -> None:
    params = SamplingParams(max_tokens=12)
    (wanted,) = pair.generate("Sure, the capital", params, threshold=0.4)
    body = {"model": "pair", "prompt": "Sure, the capital", "max_tokens": 12, "temperature": 0}
    said = served.post("/v1/completions", **body, collm={"threshold": 0.4}).json()
    assert said["choices"][0]["text"] == wanted.text
    (wanted,) = pair.generate([wanted.prompt_token_ids[-3:]], params, threshold=0.4)
    said = served.post("/v1/completions", **body, collm={"threshold": 0.4}, truncate_prompt_tokens=3).json()
    assert said["choices"][0]["text"] == wanted.text


def test_candidates_of_both_authors(pair: CoLLM, served: Running) -> None:
    (done,) = pair.generate([CHAT], SamplingParams(max_tokens=8), threshold=0.4)
    body = {"model": "pair", "messages": CHAT, "token_ids": done.token_ids, "most": 2}
    found = served.post("/v1/collm/candidates", **body).json()["candidates"]
    assert [[len(each) for each in token] for token in found] == [
        [len(each) for each in token] for token in pair.candidates(CHAT, done.token_ids, 2)
    ]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"logit_bias": {"3": 1}}, "one vocabulary"),
        ({"response_format": {"type": "json_object"}}, "one vocabulary"),
        ({"collm": {"policy": "mixture"}}, "have different tokenizers"),
        ({"collm": {"threshold": 0.4}, "prompt_logprobs": 1}, "different tokenizers"),
    ],
)
def test_what_needs_one_vocabulary_is_refused(served: Running, options: dict[str, Any], part: str) -> None:
    body = {"model": "pair", "messages": CHAT, "max_tokens": 5, "collm": {"threshold": 0.4}, **options}
    answer = served.post("/v1/chat/completions", **body)
    assert answer.status_code == 400, answer.text
    assert part in json.dumps(answer.json())
