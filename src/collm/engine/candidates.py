"""Each author's most probable tokens at every position of an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from collm.engine.chunks import Chunks, Runner, Runners, chunks, read_chunk
from collm.errors import RequestError
from collm.models.assistant import ModelOutput
from collm.text.alignment import Alignment
from collm.text.token_text import TokenText

Candidates = Sequence[tuple[str, float]]  # token texts with an author's probabilities, most probable first
Likely = list[tuple[int, float]]  # token ids with probabilities, most probable first


def top_candidates(
    runners: Runners,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    most: int = 5,
) -> Chunks[list[Candidates]]:
    """For each token of an answer, list each author's most probable tokens. Yields chunks of tokens.

    A tool has one candidate, or none where it abstains.

    Args:
        runners: runners of the authors, the base first.
        most: number of candidates per author.
    """
    text = [*prompt_ids, *token_ids]
    for start, end in chunks(len(prompt_ids), len(text), runners[0].model.vocab_size):
        by_author = [_top_tokens(read_chunk(runner, text, start, end), slice(None), most) for runner in runners]
        yield spelled(tokenizer, text[:start], text[start:end], by_author)


def spelled(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    by_author: Sequence[Sequence[Likely]],
) -> list[list[Candidates]]:
    """Convert candidates of each author at each token of an answer to texts, token by token."""
    read = TokenText(tokenizer, prompt_ids)
    texts: list[list[Candidates]] = []
    for token_id, *likely in zip(token_ids, *by_author, strict=True):
        texts.append([[(read.spelling(one), prob) for one, prob in author_candidates] for author_candidates in likely])
        read.push(token_id)
    return texts


def aligned_candidates(
    runners: Runners, alignment: Alignment, prompts: Sequence[list[int]], token_ids: Sequence[int], most: int = 5
) -> Chunks[list[Candidates]]:
    """Like `top_candidates`, for authors with different tokenizers. Assistants have candidates at boundaries only.

    Args:
        prompts: the prompt in each author's tokens.
        token_ids: the answer in the base's tokens. A character that is incomplete at its end is left out.
    """
    base = alignment.tokenizers[0]
    spelled = [base.token_bytes[token_id] or b"" for token_id in token_ids]
    starts = {at: place for place, at in reversed(list(enumerate(accumulate(map(len, spelled), initial=0))))}
    answer = b"".join(spelled).decode(errors="ignore").encode()
    boundaries = {starts[at]: at for at in alignment.boundaries(answer) if starts[at] < len(token_ids)}
    by_author = [
        _opening_candidates(runner, alignment, author, prompts[author], answer, list(boundaries.values()), most)
        for author, runner in enumerate(runners[1:], start=1)
    ]
    place = 0
    for of_base in top_candidates(runners[:1], base.tokenizer, prompts[0], token_ids, most):
        for (likely,) in of_base:
            yield [[likely, *(next(each) if place in boundaries else [] for each in by_author)]]
            place += 1


def _opening_candidates(
    runner: Runner,
    alignment: Alignment,
    author: int,
    prompt: list[int],
    answer: bytes,
    boundaries: Sequence[int],
    most: int,
) -> Iterator[Candidates]:
    """An author's most probable first tokens of the segments that begin at these boundaries."""
    tokenizer = alignment.tokenizers[author]
    encoded = tokenizer.encode_after(prompt, answer.decode())
    if encoded is None:
        raise RequestError(f"the tokenizer of {tokenizer.name} cannot encode the answer; pass another answer")
    text, ends = [*prompt, *encoded.ids], [0, *encoded.ends]
    wanted = {len(prompt) + ends.index(at): at for at in boundaries}
    for start, end in chunks(len(prompt), len(text) + 1, runner.model.vocab_size):
        output = read_chunk(runner, text, start, end)
        for position in [at for at in range(start, end) if at in wanted]:
            mask = alignment.opening_mask(author, alignment.row(answer[: wanted[position]]), output.logits.device)
            (likely,) = _top_tokens(output, slice(position - start, position - start + 1), most, mask)
            yield [(tokenizer.shown(one), prob) for one, prob in likely if prob]


def _top_tokens(output: ModelOutput, rows: slice, most: int, mask: Tensor | None = None) -> list[Likely]:
    """The most probable tokens of some rows, of those in the mask; one of a tool, and none where it abstains."""
    logits = output.logits[rows].float()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    probs, ids = logits.softmax(-1).topk(min(most, logits.shape[-1]))
    found = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), probs.tolist(), strict=True)]
    if not output.abstained:
        return found
    return [[] if abstained else likely[:1] for likely, abstained in zip(found, output.abstained[rows], strict=True)]
