"""lm-evaluation-harness asking the server gets what it gets from the collaboration itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from collm.core.policies import SingleAuthorPolicy
from collm.evaluation.harness import HarnessLM
from tests.clients.conftest import BYTES
from tests.serving.conftest import Running

PAIRS = [
    ("hens may sit", " upon eggs"),
    ("hens may sit", " on straw"),
    ("who? ", "you."),
    ("x", "yyy zzz"),
    ("hum, " * 20, "dee"),
]
UNTIL = [("the cat", {"until": ["t", "zz"], "max_gen_toks": 12}), ("a mat", {"until": [], "max_gen_toks": 7})]


def asked(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture
def tokenizer_path(tmp_path: Path) -> str:
    BYTES.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def api(speaking: Running, **options: Any) -> LocalCompletionsAPI:
    options = {"model": "pair", "base_url": f"{speaking.url}/v1/completions", "max_retries": 1, **options}
    return LocalCompletionsAPI(**options)


@pytest.mark.parametrize("backend", ["huggingface", "remote", "auto"])
def test_likelihoods_are_those_of_the_collaboration(speaking: Running, backend: str, tokenizer_path: str) -> None:
    local = HarnessLM(speaking.models["pair"])
    expected = local.loglikelihood(asked("loglikelihood", PAIRS))
    named = {"tokenizer": tokenizer_path} if backend == "huggingface" else {}
    remote = api(speaking, tokenizer_backend=backend, batch_size=2, **named)
    found = remote.loglikelihood(asked("loglikelihood", PAIRS))
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-4)
    rolling = [("the cat sat on a mat",), ("x",)]
    by_server = remote.loglikelihood_rolling(asked("loglikelihood_rolling", rolling))
    by_itself = local.loglikelihood_rolling(asked("loglikelihood_rolling", rolling))
    assert by_server == pytest.approx(by_itself, abs=1e-4)


def test_an_author_alone_has_likelihoods_of_its_own(speaking: Running, tokenizer_path: str) -> None:
    model = speaking.models["pair"]
    base = api(speaking, model="pair/base", tokenizer_backend="huggingface", tokenizer=tokenizer_path)
    found = base.loglikelihood(asked("loglikelihood", PAIRS[:2]))
    for (context, continuation), (total, _) in zip(PAIRS[:2], found, strict=True):
        before, whole = BYTES.encode(context), BYTES.encode(context) + BYTES.encode(continuation)
        scored = model.prompt_logprobs(whole, policy=SingleAuthorPolicy(0))[len(before) :]
        assert total == pytest.approx(sum(one.logprob for one in scored if one), abs=1e-4)


def test_generated_texts_are_those_of_the_collaboration(speaking: Running, tokenizer_path: str) -> None:
    expected = HarnessLM(speaking.models["pair"]).generate_until(asked("generate_until", UNTIL))
    remote = api(speaking, tokenizer_backend="huggingface", tokenizer=tokenizer_path)
    found = remote.generate_until(asked("generate_until", UNTIL))
    assert [text.partition(BYTES.eos_token)[0] for text in found] == expected


def test_chats_are_answered(speaking: Running) -> None:
    chat = LocalChatCompletion(model="pair", base_url=f"{speaking.url}/v1/chat/completions", max_retries=1)
    message = chat.apply_chat_template([{"role": "user", "content": "the cat?"}])
    (found,) = chat.generate_until(asked("generate_until", [(message, {"until": ["zz"], "max_gen_toks": 9})]))
    body = {"model": "pair", "messages": [{"role": "user", "content": "the cat?"}], "max_tokens": 9, "stop": ["zz"]}
    reply = speaking.post("/v1/chat/completions", **body)
    assert found == reply.json()["choices"][0]["message"]["content"]
