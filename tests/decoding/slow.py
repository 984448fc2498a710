"""Decoding as the equations say it: every model reads everything again for every token, one prompt at a time."""

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


def slow_decode(
    models: Sequence[PreTrainedModel],
    head: DeferralHead,
    prompt: Sequence[int],
    policy: Policy,
    params: SamplingParams,
    eos: int = 1,
) -> tuple[list[int], list[int]]:
    """Token ids and authors of a completion."""
    ids, authors, device = list(prompt), list[int](), models[0].device
    rng = random.Random(params.seed)
    while len(authors) < params.max_new_tokens:
        with torch.no_grad():
            text = torch.tensor([ids], device=device)
            outputs = [model(text, use_cache=False, output_hidden_states=True) for model in models]
            u = head(outputs[0].hidden_states[-1][:, -1])  # (1, K)
            logits = {author: output.logits[:, -1].float() for author, output in enumerate(outputs)}
            by_author = author_logprobs(u)
            for_author, for_token = rng.random(), rng.random()
            consulted = [0, *policy.consults(len(models) - 1)]
            if isinstance(policy, CombiningPolicy):
                logprobs = {author: logits[author].log_softmax(-1) for author in consulted}
                token = _token(policy.combine(logprobs, by_author)[0], params, for_token)
                of_token = {author: each[:, token] for author, each in logprobs.items()}
                author = int(policy.credit(of_token, by_author))
            else:
                asked = consulted if len(consulted) > 1 else []
                view = StepView(
                    position=len(authors),
                    deferred=sum(author != 0 for author in authors),
                    author_probs=by_author[0].exp().tolist(),
                    defer_prob=float(defer_probs(u)),
                    temperature=params.temperature,
                    uniform=for_author,
                    top_tokens={author: int(logits[author].argmax()) for author in asked},
                    top_probs={author: float(logits[author].softmax(-1).max()) for author in asked},
                )
                author = policy.author(view)
                token = _token(logits[author][0], params, for_token)
        ids.append(token)
        authors.append(author)
        if token == eos:
            break
    return ids[len(prompt) :], authors


def _token(logits: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    if params.temperature == 0:
        return int(logits.argmax())
    probs = token_probs(logits, params.temperature, params.top_p, params.top_k)
    return int(sample(probs, torch.tensor(uniform, dtype=torch.float64, device=probs.device)))
