"""Log-probabilities of a given text under a collaboration or one of its authors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from collm.core.head import DeferralHead
from collm.core.objective import author_logprobs
from collm.core.types import BASE, PromptLogprob
from collm.errors import ModelFailure
from collm.models.runner import ModelRunner
from collm.models.tools import ToolRunner

_CHUNK_TOKENS = 256
"""Number of positions processed at once, which bounds the memory for distributions."""


@torch.inference_mode()
def prompt_logprobs(
    runners: Sequence[ModelRunner | ToolRunner],
    head: DeferralHead,
    prompt_ids: Sequence[int],
    most: int = 0,
    author: int | None = None,
) -> list[PromptLogprob | None]:
    """Compute log sum_z P(z | x_<t) P_z(x_t | x_<t) of each token, in nats; None for the first.

    Args:
        runners: runners of the authors, the base first.
        most: number of most probable tokens to list at each position.
        author: compute log P_author instead, with the base replacing an author that abstains.

    Raises:
        ModelFailure: an author's logits hold NaN.
        ToolFailure: a tool raised an exception, hung or returned something other than text.
    """
    found: list[PromptLogprob | None] = [None]
    for logprobs, start in _chunk_logprobs(runners, head, prompt_ids, author):
        gold = torch.tensor(prompt_ids[start : start + len(logprobs)], device=logprobs.device).unsqueeze(-1)
        gold_logprobs = logprobs.gather(-1, gold)
        if gold_logprobs.isnan().any():
            raise ModelFailure(f"a model returned NaN logits after {start} tokens of the prompt; check its weights")
        ranks = (logprobs >= gold_logprobs).sum(-1).tolist()
        values, token_ids = (each.tolist() for each in logprobs.topk(min(most, logprobs.shape[-1])))
        rows = zip(gold.squeeze(-1).tolist(), gold_logprobs.squeeze(-1).tolist(), ranks, token_ids, values, strict=True)
        for token_id, logprob, rank, ids, tops in rows:
            found.append(PromptLogprob(token_id, logprob, rank, tuple(zip(ids, tops, strict=True))))
    return found


def _chunk_logprobs(
    runners: Sequence[ModelRunner | ToolRunner], head: DeferralHead, prompt_ids: Sequence[int], author: int | None
) -> Iterator[tuple[Tensor, int]]:
    """Yield chunks: next-token log-probabilities of shape (T, V), and the position of their first token."""
    reading = [runners[each] for each in (range(len(runners)) if author is None else sorted({BASE, author}))]
    scores = {runner: _scores(runner, prompt_ids) for runner in reading if isinstance(runner, ToolRunner)}
    slots = dict[ModelRunner | ToolRunner, int]()
    try:
        for runner in reading:
            slots[runner] = runner.open()
        for start in range(1, len(prompt_ids), _CHUNK_TOKENS):
            unseen = prompt_ids[start - 1 : min(start - 1 + _CHUNK_TOKENS, len(prompt_ids) - 1)]
            by_reader: list[Tensor] = []
            for runner in reading:
                read = runner.extend({slots[runner]: unseen}, keep={slots[runner]: len(unseen)})
                logprobs = torch.log_softmax(read.logits.float(), dim=-1)
                if isinstance(runner, ToolRunner):
                    gold = torch.tensor(prompt_ids[start : start + len(unseen)]).unsqueeze(-1)
                    logprobs.scatter_(-1, gold, scores[runner][start - 1 : start - 1 + len(unseen), None])
                    if author is not None:
                        abstained = torch.tensor(read.abstained).unsqueeze(-1)
                        logprobs = torch.where(abstained, by_reader[0].to(logprobs.device), logprobs)
                elif runner is runners[BASE]:
                    assert read.hidden is not None
                    by_author = author_logprobs(head(read.hidden))  # (T, K + 1)
                by_reader.append(logprobs)
            if author is not None:
                yield by_reader[-1], start
                continue
            joint = torch.stack([logprobs.to(by_author.device) for logprobs in by_reader])  # (K + 1, T, V)
            yield torch.logsumexp(joint + by_author.T.unsqueeze(-1), dim=0), start
    finally:
        for runner, slot in slots.items():
            runner.close(slot)


def _scores(runner: ToolRunner, prompt_ids: Sequence[int]) -> Tensor:
    """The tool's log-probabilities of the given tokens, as in training: shape (T - 1,)."""
    if len(prompt_ids) < 2:
        return torch.zeros(0)
    return runner.model.score(prompt_ids, [i > 0 for i in range(len(prompt_ids))])[0]
