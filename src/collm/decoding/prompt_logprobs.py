"""Log-probabilities of a given text under a collaboration, or under one of its authors."""

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
"""Positions whose distributions are in memory at once."""


@torch.inference_mode()
def prompt_logprobs(
    runners: Sequence[ModelRunner | ToolRunner],
    head: DeferralHead,
    prompt_ids: Sequence[int],
    most: int = 0,
    author: int | None = None,
) -> list[PromptLogprob | None]:
    """For each token but the first, for which it is None: log sum_z P(z | x_<t) P_z(x_t | x_<t), in nats.

    Args:
        runners: of the authors, the base first.
        most: how many of the most probable tokens to list at each position.
        author: take log P_author instead, and the base's where that author abstains.

    Raises:
        ModelFailure: an author's logits hold NaN.
        ToolFailure: a tool raised, hung or returned no text.
    """
    found: list[PromptLogprob | None] = [None]
    for logprobs, start in _laws(runners, head, prompt_ids, author):
        gold = torch.tensor(prompt_ids[start : start + len(logprobs)], device=logprobs.device).unsqueeze(-1)
        of_gold = logprobs.gather(-1, gold)
        if of_gold.isnan().any():
            raise ModelFailure(
                f"a model returned NaN logits behind the prompt's first {start} tokens; check its weights"
            )
        ranks = (logprobs >= of_gold).sum(-1).tolist()
        values, token_ids = (each.tolist() for each in logprobs.topk(min(most, logprobs.shape[-1])))
        rows = zip(gold.squeeze(-1).tolist(), of_gold.squeeze(-1).tolist(), ranks, token_ids, values, strict=True)
        for token_id, logprob, rank, ids, tops in rows:
            found.append(PromptLogprob(token_id, logprob, rank, tuple(zip(ids, tops, strict=True))))
    return found


def _laws(
    runners: Sequence[ModelRunner | ToolRunner], head: DeferralHead, prompt_ids: Sequence[int], author: int | None
) -> Iterator[tuple[Tensor, int]]:
    """Log-probabilities of all tokens, shape (T, V), for T tokens of the prompt from a position on."""
    reading = [runners[each] for each in (range(len(runners)) if author is None else sorted({BASE, author}))]
    scores = {runner: _scores(runner, prompt_ids) for runner in reading if isinstance(runner, ToolRunner)}
    slots = {runner: runner.open() for runner in reading}
    try:
        for start in range(1, len(prompt_ids), _CHUNK_TOKENS):
            unseen = prompt_ids[start - 1 : min(start - 1 + _CHUNK_TOKENS, len(prompt_ids) - 1)]
            laws: list[Tensor] = []
            for runner in reading:
                read = runner.extend({slots[runner]: unseen}, keep={slots[runner]: len(unseen)})
                law = torch.log_softmax(read.logits.float(), dim=-1)
                if isinstance(runner, ToolRunner):
                    gold = torch.tensor(prompt_ids[start : start + len(unseen)]).unsqueeze(-1)
                    law.scatter_(-1, gold, scores[runner][start - 1 : start - 1 + len(unseen), None])
                    if author is not None:
                        abstained = torch.tensor(read.abstained).unsqueeze(-1)
                        law = torch.where(abstained, laws[0].to(law.device), law)
                elif runner is runners[BASE]:
                    assert read.hidden is not None
                    by_author = author_logprobs(head(read.hidden))  # (T, K + 1)
                laws.append(law)
            if author is not None:
                yield laws[-1], start
                continue
            joint = torch.stack([law.to(by_author.device) for law in laws])  # (K + 1, T, V)
            yield torch.logsumexp(joint + by_author.T.unsqueeze(-1), dim=0), start
    finally:
        for runner, slot in slots.items():
            runner.close(slot)


def _scores(runner: ToolRunner, prompt_ids: Sequence[int]) -> Tensor:
    """What the tool says of the tokens as they are cut, as in training: shape (T - 1,)."""
    if len(prompt_ids) < 2:
        return torch.zeros(0)
    return runner.model.score(prompt_ids, [place > 0 for place in range(len(prompt_ids))])[0]
