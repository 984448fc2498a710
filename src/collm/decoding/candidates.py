"""Each author's most probable tokens at every position of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from transformers import PreTrainedTokenizerBase

from collm.errors import RequestError
from collm.models.alignment import Alignment
from collm.models.runner import ModelRunner
from collm.models.token_text import TokenText
from collm.models.tools import ToolRunner

Candidates = Sequence[tuple[str, float]]
"""Token texts with an author's probabilities, most probable first."""

Likely = list[tuple[int, float]]
"""Token ids with probabilities, most probable first."""


@torch.inference_mode()
def top_candidates(
    runners: Sequence[ModelRunner | ToolRunner],
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    most: int = 5,
) -> list[list[Candidates]]:
    """For each token of an answer, list each author's most probable tokens, in author order.

    Every author reads prompt and answer in one pass. A tool has one candidate, or none where it abstains.

    Args:
        runners: runners of the authors, the base first.
        tokenizer: the tokenizer of all authors.
        most: number of candidates per author.

    Raises:
        RequestError: prompt and answer exceed a model's context.
    """
    if not token_ids:
        return []
    by_author = [_top_tokens(runner, prompt_ids, token_ids, most) for runner in runners]
    return spelled(tokenizer, prompt_ids, token_ids, by_author)


def spelled(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    by_author: Sequence[Sequence[Likely]],
) -> list[list[Candidates]]:
    """Convert candidates from token ids to texts: for each token of an answer, those of each author.

    Args:
        by_author: for each author, its candidates at each token.
    """
    read = TokenText(tokenizer, prompt_ids)
    texts: list[list[Candidates]] = []
    for token_id, *likely in zip(token_ids, *by_author, strict=True):
        texts.append([[(read.spelling(one), prob) for one, prob in author_candidates] for author_candidates in likely])
        read.push(token_id)
    return texts


@torch.inference_mode()
def aligned_candidates(
    runners: Sequence[ModelRunner | ToolRunner],
    alignment: Alignment,
    prompts: Sequence[list[int]],
    token_ids: Sequence[int],
    most: int = 5,
) -> list[list[Candidates]]:
    """Like `top_candidates`, for authors with different tokenizers. Assistants have candidates at boundaries only.

    Args:
        prompts: the prompt in each author's tokens.
        token_ids: the answer in the base's tokens.

    Raises:
        RequestError: prompt and answer exceed a model's context, or the answer ends within a character.
    """
    base = alignment.tokenizers[0]
    base_candidates = top_candidates(runners[:1], base.tokenizer, prompts[0], token_ids, most)
    spelled = [base.token_bytes[token_id] or b"" for token_id in token_ids]
    answer = b"".join(spelled)
    starts = {at: place for place, at in reversed(list(enumerate(accumulate(map(len, spelled), initial=0))))}
    boundaries = [at for at in alignment.boundaries(answer) if starts[at] < len(token_ids)]
    texts = [[likely, *([] for _ in runners[1:])] for (likely,) in base_candidates]
    for author, runner in enumerate(runners[1:], start=1):
        found = _opening_candidates(runner, alignment, author, prompts[author], answer, boundaries, most)
        for at, likely in zip(boundaries, found, strict=True):
            texts[starts[at]][author] = likely
    return texts


def _opening_candidates(
    runner: ModelRunner | ToolRunner,
    alignment: Alignment,
    author: int,
    prompt: list[int],
    answer: bytes,
    boundaries: Sequence[int],
    most: int,
) -> list[Candidates]:
    """An author's most probable first tokens of the segments that begin at these boundaries."""
    tokenizer = alignment.tokenizers[author]
    try:
        encoded = tokenizer.encode_after(prompt, answer.decode())
    except UnicodeDecodeError:
        encoded = None
    if encoded is None:
        raise RequestError(f"the tokenizer of {tokenizer.name} cannot encode the answer; pass the complete answer")
    slot = runner.open()
    try:
        output = runner.extend({slot: [*prompt, *encoded.ids]}, keep={slot: len(encoded.ids) + 1})
    finally:
        runner.close(slot)
    rows = [0 if at == 0 else encoded.ends.index(at) + 1 for at in boundaries]
    found = list[Candidates]()
    for at, row in zip(boundaries, rows, strict=True):
        logits = output.logits[row].float()
        mask = alignment.opening_mask(author, alignment.row(answer[:at]), logits.device)
        probs, ids = logits.masked_fill(~mask, -torch.inf).softmax(-1).topk(min(most, len(logits)))
        likely = [(tokenizer.shown(one), prob) for one, prob in zip(ids.tolist(), probs.tolist(), strict=True) if prob]
        abstained = bool(output.abstained) and output.abstained[row]
        found.append([] if abstained else likely[:1] if output.abstained else likely)
    return found


def _top_tokens(
    runner: ModelRunner | ToolRunner, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int
) -> list[Likely]:
    slot = runner.open()
    try:
        output = runner.extend({slot: [*prompt_ids, *token_ids[:-1]]}, keep={slot: len(token_ids)})
    finally:
        runner.close(slot)
    probs, ids = output.logits.float().softmax(-1).topk(min(most, output.logits.shape[-1]))
    found = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), probs.tolist(), strict=True)]
    if isinstance(runner, ToolRunner):
        return [[] if abstained else likely[:1] for likely, abstained in zip(found, output.abstained, strict=True)]
    return found
