"""Decoding as the equations say it: every model reads everything again for every token, one prompt at a time.

A tool is asked about the whole text again; where it abstains, the base's distribution stands in for its.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from collm import DeferralHead, SamplingParams
from collm.core.combinations import CombiningPolicy
from collm.core.objective import author_logprobs, defer_probs
from collm.core.policies import Policy, StepView
from collm.core.sampling import sample, token_probs
from collm.models.token_text import TokenText
from collm.models.tools import ToolModel


def slow_decode(
    models: Sequence[PreTrainedModel | ToolModel],
    head: DeferralHead,
    prompt: Sequence[int],
    policy: Policy,
    params: SamplingParams,
    eos: int = 1,
) -> tuple[list[int], list[int]]:
    """Token ids and authors of a completion."""
    ids, authors, asked, device = list(prompt), list[int](), 0, models[0].device
    rng = random.Random(params.seed)
    while len(authors) < params.max_new_tokens:
        with torch.no_grad():
            text = torch.tensor([ids], device=device)
            base = models[0](text, use_cache=False, output_hidden_states=True)
            u = head(base.hidden_states[-1][:, -1])  # (1, K)
            said = [base.logits[:, -1].float(), *(_logits(model, text) for model in models[1:])]
            silent = {author for author, each in enumerate(said) if each is None}
            logits = {author: said[0] if each is None else each for author, each in enumerate(said)}
            by_author = author_logprobs(u)
            for_author, for_token = rng.random(), rng.random()
            consulted = [0, *policy.consults(len(models) - 1)]
            if isinstance(policy, CombiningPolicy):
                logprobs = {author: logits[author].log_softmax(-1) for author in consulted}
                token = _token(policy.combine(logprobs, by_author)[0], params, for_token)
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
        ids.append(token)
        asked += author != 0
        authors.append(0 if author in silent else author)
        if token == eos:
            break
    return ids[len(prompt) :], authors


def _logits(model: PreTrainedModel | ToolModel, text: torch.Tensor) -> torch.Tensor | None:
    """Next-token logits of an assistant, shape (1, V); None where it abstains."""
    if not isinstance(model, ToolModel):
        return model(text, use_cache=False).logits[:, -1].float()
    token_ids = text[0].tolist()
    token_id = model.next_token(TokenText(model.tokenizer, token_ids), len(token_ids), {})
    return None if token_id is None else model.logits([token_id]).to(text.device)


def _token(logits: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    if params.temperature == 0:
        return int(logits.argmax())
    probs = token_probs(logits, params.temperature, params.top_p, params.top_k)
    return int(sample(probs, torch.tensor(uniform, dtype=torch.float64, device=probs.device)))
