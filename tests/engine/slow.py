"""Decoding as the equations say it: every model reads everything again for every token, one prompt at a time.

A tool is asked about the whole text again; where it abstains, the base's distribution stands in for its.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, hf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from collm import DeferralHead, SamplingParams
from collm.core.combinations import CombiningPolicy
from collm.core.head import author_logprobs, defer_probs, doubt_of
from collm.core.judges import BlendJudge, ExactJudge, Judge, RegretJudge
from collm.core.policies import Policy, StepView
from collm.core.sampling import sample, token_probs
from collm.models.tools import ToolModel
from collm.text.token_text import TokenText


def slow_decode(
    models: Sequence[PreTrainedModel | ToolModel],
    head: DeferralHead,
    prompt: Sequence[int],
    policy: Policy,
    params: SamplingParams,
    eos: int = 1,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    guess: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """Token ids and authors of a completion.

    Args:
        tokenizer: needed for bad words and structured outputs.
        guess: of the completion; as far as it is right, its tokens are read in one pass. A pass without a cache says at
            each token what it says where the text ends there.
    """
    ids, authors, asked = list(prompt), list[int](), 0
    rng, spent = random.Random(params.seed), 0.0
    readings = [Reading(model, [*prompt, *guess], models[0].device) for model in models]
    while len(authors) < params.max_tokens:
        with torch.no_grad():
            said = [reading.logits(ids) for reading in readings]
            u = head(readings[0].hidden(ids), doubt_of(said[0]))  # (1, K)
            raw, said = (
                said,
                [None if each is None else _processed(each, params, prompt, ids, eos, tokenizer) for each in said],
            )
            for author, (before, after) in enumerate(zip(raw, said, strict=True)):
                if isinstance(models[author], ToolModel) and before is not None and after.argmax() != before.argmax():
                    said[author] = None
            abstained = {author for author, each in enumerate(said) if each is None}
            logits = {author: said[0] if each is None else each for author, each in enumerate(said)}
            by_author = author_logprobs(u)
            for_author, for_token = rng.random(), rng.random()
            consulted = [0, *policy.consults(len(models) - 1)]
            if isinstance(policy, CombiningPolicy):
                logprobs = {author: logits[author].log_softmax(-1).clamp(min=-1e4) for author in consulted}
                joint = policy.combine(logprobs, by_author)[0].masked_fill(said[0][0] == -torch.inf, -torch.inf)
                token = _coupled(joint, said[0][0], params, for_token)
                of_token = {author: each[:, token] for author, each in logprobs.items()}
                author = int(policy.credit(of_token, by_author))
            else:
                seen = consulted if len(consulted) > 1 else []
                view = StepView(
                    position=len(authors),
                    deferred=asked,
                    author_probs=by_author[0].exp().tolist(),
                    defer_prob=float(defer_probs(u)),
                    temperature=params.temperature,
                    uniform=for_author,
                    top_tokens={author: int(logits[author].argmax()) for author in seen},
                    top_probs={author: float(logits[author].softmax(-1).max()) for author in seen},
                )
                author = policy.author(view)
                token = _token(logits[author][0], params, for_token)
                if policy.judge is not None and author == 0:
                    author, token, regret = _judged(policy.judge, logits, by_author[0], params, for_token, spent)
                    spent += regret
        ids.append(token)
        asked += author != 0
        authors.append(0 if author in abstained else author)
        if (token == eos and not params.ignore_eos) or token in params.stop_token_ids:
            break
        if params.structured_outputs is not None:
            matcher = _matcher(params, ids[len(prompt) :], said[0].shape[-1], eos, tokenizer)
            if matcher.is_stopped():
                break
    return ids[len(prompt) :], authors


class Reading:
    """What a model or a tool says after a text."""

    def __init__(self, model: PreTrainedModel | ToolModel, guess: list[int], device: torch.device) -> None:
        self._model, self._text, self._device = model, guess, device
        self._read: Any = None

    def logits(self, ids: list[int]) -> torch.Tensor | None:
        """Next-token logits, shape (1, V); None where a tool abstains."""
        if not isinstance(self._model, ToolModel):
            return self._after(ids).logits[:, len(ids) - 1].float()
        token_id = self._model.next_token(TokenText(self._model.tokenizer, ids), len(ids), {})
        return None if token_id is None else self._model.logits([token_id]).to(self._device)

    def hidden(self, ids: list[int]) -> torch.Tensor:
        return self._after(ids).hidden_states[-1][:, len(ids) - 1]

    def _after(self, ids: list[int]) -> Any:
        if self._text[: len(ids)] != ids:
            self._text, self._read = list(ids), None
        if self._read is None:
            text = torch.tensor([self._text], device=self._device)
            self._read = self._model(text, use_cache=False, output_hidden_states=True)
        return self._read


def _processed(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    ids: Sequence[int],
    eos: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> torch.Tensor:
    """Logits (1, V) after what vLLM's documentation says of each parameter, one token at a time."""
    row, generated = logits[0].tolist(), ids[len(prompt) :]
    for token, bias in params.logit_bias.items():
        row[token] += bias
    for token in {*prompt, *generated}:
        row[token] = (
            row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
        )
    for token in set(generated):
        row[token] -= params.presence_penalty + params.frequency_penalty * generated.count(token)
    banned = {eos, *params.stop_token_ids} if len(generated) < params.min_tokens else set()
    for word in params.bad_words:
        for text in (word, " " + word):
            *before, last = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not before or list(generated[-len(before) :]) == before:
                banned.add(last)
    if params.allowed_token_ids is not None:
        banned |= set(range(len(row))) - set(params.allowed_token_ids)
    if params.structured_outputs is not None:
        matcher = _matcher(params, generated, len(row), eos, tokenizer)
        bits = np.zeros(-(-len(row) // 32), dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        banned |= {token for token in range(len(row)) if not (int(bits[token // 32]) >> (token % 32)) & 1}
    for token in banned:
        row[token] = -math.inf
    return torch.tensor([row], device=logits.device)


def _matcher(
    params: SamplingParams,
    generated: Sequence[int],
    vocab_size: int,
    eos: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> LLMatcher:
    """A fresh matcher that has read the text."""
    wanted = params.structured_outputs
    if wanted.regex is not None:
        source = LLMatcher.grammar_from_regex(wanted.regex)
    elif wanted.json is not None:
        source = LLMatcher.grammar_from_json_schema(wanted.json)
    else:
        source = LLMatcher.grammar_from_lark(wanted.grammar)
    matcher = LLMatcher(_vocabulary(tokenizer, vocab_size, eos), source, log_level=0)
    assert matcher.consume_tokens(list(generated)), matcher.get_error()
    return matcher


@cache
def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos: int) -> LLTokenizer:
    return hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos)


def _judged(
    judge: Judge,
    logits: dict[int, torch.Tensor],
    by_author: torch.Tensor,
    params: SamplingParams,
    u: float,
    spent: float,
) -> tuple[int, int, float]:
    """Author and token where the base is to write, and the assistant's regret of the base's token if it stands."""
    likely = int(by_author[1:].argmax()) + 1
    base, assistant = logits[0][0], logits[likely][0]
    drafted = _token(base, params, u)
    probs = {author: each[0].softmax(-1) for author, each in logits.items()}
    if isinstance(judge, RegretJudge):
        regret = float(assistant.max() - assistant[drafted])
        if regret <= judge.nats and spent + regret <= judge.budget:
            return 0, drafted, regret
        if params.temperature == 0:
            return likely, int(assistant.argmax()), 0.0
        law = token_probs(base, params.temperature, params.top_p, params.top_k, params.min_p).double().tolist()
        again = (u * sum(law) - sum(law[:drafted])) / law[drafted]
        return likely, _token(assistant, params, again), 0.0
    if isinstance(judge, ExactJudge):
        law = probs[likely]
    elif isinstance(judge, BlendJudge):
        law = judge.weight * probs[likely] + (1 - judge.weight) * probs[0]
    else:
        law = sum(by_author[author].exp() * each for author, each in probs.items())
    token = _coupled(law.log().masked_fill(base == -torch.inf, -torch.inf), base, params, u)
    return 0 if token == drafted else likely, token, 0.0


def _coupled(logits: torch.Tensor, base: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """Speculative sampling: what the base draws stands with min(1, P / Q), otherwise a token of (P - Q)+ is drawn."""
    if params.temperature == 0:
        return int(logits.argmax())
    options = params.temperature, params.top_p, params.top_k, params.min_p
    law, proposal = (token_probs(each, *options).double().tolist() for each in (logits, base))
    drafted = _token(base, params, uniform)
    uniform = (uniform * sum(proposal) - sum(proposal[:drafted])) / proposal[drafted]  # again from [0, 1)
    ratio = min(1.0, law[drafted] / proposal[drafted])
    if uniform < ratio:
        return drafted
    rest = torch.tensor([max(p - q, 0) for p, q in zip(law, proposal, strict=True)])
    return int(sample(rest, torch.tensor((uniform - ratio) / (1 - ratio), dtype=torch.float64)))


def _token(logits: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    if params.temperature == 0:
        return int(logits.argmax())
    probs = token_probs(logits, params.temperature, params.top_p, params.top_k, params.min_p)
    return int(sample(probs, torch.tensor(uniform, dtype=torch.float64, device=probs.device)))
