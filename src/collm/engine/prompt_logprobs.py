"""Log-probabilities of a given text under a collaboration or one of its authors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collm.core.head import DeferralHead, author_logprobs
from collm.core.types import BASE, PromptLogprob
from collm.engine.chunks import Chunks, Runners, chunks, read_chunk
from collm.errors import ModelFailure


def prompt_logprobs(
    runners: Runners, head: DeferralHead, prompt_ids: Sequence[int], most: int = 0, author: int | None = None
) -> Chunks[PromptLogprob | None]:
    """Compute log sum_z P(z | x_<t) P_z(x_t | x_<t) of each token, in nats; None for the first. Yields chunks.

    This is the law that decodes: the base replaces a tool that abstains or fails.

    Args:
        runners: runners of the authors, the base first.
        most: number of most probable tokens to list at each position.
        author: compute log P_author instead.

    Raises:
        CacheFull: running requests use the KV cache.
        ModelFailure: an author's logits hold NaN.
    """
    yield [None]
    for start, end in chunks(1, len(prompt_ids), runners[BASE].model.vocab_size):
        yield _chunk(_logprobs(runners, head, prompt_ids[:end], start, author), prompt_ids[start:end], most, start)


@torch.inference_mode()
def _chunk(logprobs: Tensor, token_ids: Sequence[int], most: int, start: int) -> list[PromptLogprob | None]:
    """The log-probabilities of tokens in their distributions, shape (T, V)."""
    gold = logprobs.gather(-1, torch.tensor(token_ids, device=logprobs.device).unsqueeze(-1))
    if gold.isnan().any():
        raise ModelFailure(f"a model returned NaN logits after {start} tokens of the prompt; check its weights")
    ranks = (logprobs >= gold).sum(-1).tolist()
    values, ids = (each.tolist() for each in logprobs.topk(min(most, logprobs.shape[-1])))
    rows = zip(token_ids, gold.squeeze(-1).tolist(), ranks, ids, values, strict=True)
    return [
        PromptLogprob(token_id, logprob, rank, tuple(zip(likely, tops, strict=True)))
        for token_id, logprob, rank, likely, tops in rows
    ]


@torch.inference_mode()
def _logprobs(runners: Runners, head: DeferralHead, text: Sequence[int], start: int, author: int | None) -> Tensor:
    """Log-probabilities of all tokens in place of the tokens of a text from `start` on, shape (T, V)."""
    by_reader: list[Tensor] = []
    for runner in [runners[each] for each in (range(len(runners)) if author is None else sorted({BASE, author}))]:
        read = read_chunk(runner, text, start, len(text))
        logprobs = torch.log_softmax(read.logits.float(), dim=-1)
        if read.abstained:
            abstained = torch.tensor(read.abstained).unsqueeze(-1)
            logprobs = torch.where(abstained, by_reader[0].to(logprobs.device), logprobs)
        elif runner is runners[BASE]:
            assert read.hidden is not None
            by_author = author_logprobs(head.read(read.hidden, read.logits))  # (T, K + 1)
        by_reader.append(logprobs)
    if author is not None:
        return by_reader[-1]
    joint = torch.stack([logprobs.to(by_author.device) for logprobs in by_reader])  # (K + 1, T, V)
    return torch.logsumexp(joint + by_author.T.unsqueeze(-1), dim=0)
