"""Builds collaborations, and says by the slow loops what they write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from collm import CoLLM, DeferralHead, ModelSpec, SamplingParams, ToolSpec
from collm.core.head import author_logprobs
from collm.core.types import Completion
from collm.models.loading import load_model
from collm.models.tools import ToolModel
from collm.text.template import Prompt, PromptTemplate
from tests.crossings.cases import CHAT, Asked, Case
from tests.engine.slow import Reading, slow_decode
from tests.engine.slow_segments import SlowSegments
from tests.engine.test_engine import random_head
from tests.two_tokenizers import two_tokenizers, writing_model


def knows(text: str) -> str | None:
    """What a tool says after a vowel."""
    return " km away" if text[-1:] in "aeiou" else None


@dataclass
class Members:
    """A collaboration's parts, and the modules that slow loops read."""

    base: Any
    assistants: list[Any]
    head: DeferralHead
    tokenizers: list[Any]
    slow: list[Any]

    def model(self, **more: Any) -> CoLLM:
        template = PromptTemplate(chat=CHAT)
        named = {} if "servers" in more else {"tokenizers": self.tokenizers[1:]}
        return CoLLM(self.base, self.assistants, self.head, self.tokenizers[0], template=template, **named, **more)


class World:
    """Members, made once for all cases that share them, and what slow loops said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._members: dict[Any, Members] = {}
        self._said: dict[Any, Any] = {}

    def saved(self, name: str, tokenizer: Any, seed: int, **changes: Any) -> ModelSpec:
        path = self.folder / name
        if not path.exists():
            writing_model(tokenizer, seed, ends=0.0, **changes).save_pretrained(path)
            tokenizer.save_pretrained(path)
        return ModelSpec(str(path))

    def members(self, case: Case) -> Members:
        if case.members not in self._members:
            self._members[case.members] = self._make(case)
        return self._members[case.members]

    def _make(self, case: Case) -> Members:
        own, other = two_tokenizers()
        spec = self.saved("base", own, 1)
        if case.quantized:
            spec = replace(spec, quantization="nf4", dtype="float32")
        base: Any = load_model(spec)
        if case.adapter:
            torch.manual_seed(0)
            base = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        models = [self.saved("assistant", own, 2, hidden_size=48), self.saved("assistant-2", own, 3)][: case.models]
        tokenizers = [own] * (1 + case.models + case.tools)
        if case.strange:
            models[0], tokenizers[1] = self.saved("stranger", other, 2, hidden_size=48), other
        tools = [ToolSpec("calculator", eps=0.05)] * case.tools
        slow = [ToolModel(tool, own, name="", vocab_size=len(own)) for tool in tools]
        modules = [base, *map(load_model, models), *slow]
        head = random_head(32, len(models) + len(tools), scale=0.6)
        return Members(base.eval(), [*models, *tools], head, tokenizers, modules)

    def said(self, case: Case, prompt: Prompt, params: SamplingParams, guess: Sequence[int]) -> Any:
        """Tokens and authors, by a slow loop."""
        key = case.members, str(prompt), str(params), case.policy
        if key not in self._said:
            self._said[key] = self._say(case, prompt, params, guess)
        return self._said[key]

    def _say(self, case: Case, prompt: Prompt, params: SamplingParams, guess: Sequence[int]) -> Any:
        members = self.members(case)
        model, slow = members.model(), members.slow
        token_ids = model.template.encode_prompt(model.tokenizer, prompt)
        if model.alignment is None:
            eos, tokenizer = model.tokenizer.eos_token_id, model.tokenizer
            return slow_decode(slow, members.head, token_ids, case.policy, params, eos, tokenizer, guess=guess)
        prompts = [token_ids, *model.assistant_prompts(prompt)]
        return SlowSegments(slow, model.alignment, members.head, prompts, case.policy, params).run()[:2]

    def prompt_logprobs(self, case: Case, token_ids: Sequence[int]) -> list[float]:
        """log sum_z P(z) P_z of each token but the first."""
        members = self.members(case)
        readings = [Reading(model, list(token_ids), torch.device("cpu")) for model in members.slow]
        found = []
        for end in range(1, len(token_ids)):
            text = list(token_ids[:end])
            with torch.no_grad():
                by_author = author_logprobs(members.head(readings[0].hidden(text)))[0]
                said = [reading.logits(text) for reading in readings]  # None where a tool abstains: the base stands in
                each = [float((said[0] if row is None else row)[0].log_softmax(-1)[token_ids[end]]) for row in said]
            found.append(float(torch.logsumexp(by_author + torch.tensor(each), 0)))
        return found


def check(world: World, case: Case, asked: Sequence[Asked], found: Sequence[Completion]) -> None:
    """Completions against the slow loop."""
    for (prompt, params), one in zip(asked, found, strict=True):
        if params.temperature and case.steps & {"servers", "one engine"}:
            continue  # vLLM has other random numbers
        token_ids, authors = world.said(case, prompt, params, one.token_ids)
        text = two_tokenizers()[0].decode(token_ids, skip_special_tokens=True)
        if ends := [text.find(stop) for stop in params.stop if stop in text]:
            text, token_ids, authors = text[: min(ends)], *(each[: len(one.token_ids)] for each in (token_ids, authors))
        assert (one.text, one.token_ids, one.authors) == (text, token_ids, authors)
        if params.prompt_logprobs is not None:
            logprobs = [each.logprob for each in one.prompt_logprobs[1:] if each is not None]
            assert logprobs == pytest.approx(world.prompt_logprobs(case, one.prompt_token_ids), abs=1e-4)
