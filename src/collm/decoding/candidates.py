"""What each author would have written at every token of an answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from collm.models.runner import ModelRunner
from collm.models.token_text import TokenText
from collm.models.tools import ToolRunner

Candidates = Sequence[tuple[str, float]]
"""Tokens by their text, with the probability an author gave them, the most probable first."""

Likely = list[tuple[int, float]]
"""Token ids with their probabilities."""


@torch.inference_mode()
def top_candidates(
    runners: Sequence[ModelRunner | ToolRunner],
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    most: int = 5,
) -> list[list[Candidates]]:
    """For each token of an answer, and each author in their order, its most probable tokens there.

    Every author reads prompt and answer at once. A program that has nothing to say at a place has no candidates there,
    and elsewhere the one token that it knows.

    Args:
        runners: of the authors, the base first.
        tokenizer: of all of them.
        most: candidates of an author.

    Raises:
        RequestError: prompt and answer outgrow a model's context.
    """
    if not token_ids:
        return []
    by_author = [_likely(runner, prompt_ids, token_ids, most) for runner in runners]
    return spelled(tokenizer, prompt_ids, token_ids, by_author)


def spelled(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    by_author: Sequence[Sequence[Likely]],
) -> list[list[Candidates]]:
    """Candidates as texts: for each token of an answer, those of each author.

    Args:
        by_author: for each author, what it holds likely at each token.
    """
    read = TokenText(tokenizer, prompt_ids)
    texts: list[list[Candidates]] = []
    for token_id, *likely in zip(token_ids, *by_author, strict=True):
        texts.append([[(read.spelling(one), prob) for one, prob in of_author] for of_author in likely])
        read.push(token_id)
    return texts


def _likely(
    runner: ModelRunner | ToolRunner, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int
) -> list[Likely]:
    slot = runner.open()
    try:
        reading = runner.extend({slot: [*prompt_ids, *token_ids[:-1]]}, keep={slot: len(token_ids)})
    finally:
        runner.close(slot)
    probs, ids = reading.logits.float().softmax(-1).topk(min(most, reading.logits.shape[-1]))
    found = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), probs.tolist(), strict=True)]
    if isinstance(runner, ToolRunner):
        return [[] if silent else likely[:1] for likely, silent in zip(found, reading.silent, strict=True)]
    return found
