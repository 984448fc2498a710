"""Tools as authors: their answers as next-token distributions, for scoring and decoding."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import count

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from collm.core.types import ModelUsage
from collm.errors import ToolFailure
from collm.models.assistant import ModelOutput
from collm.text.template import continuation_ids
from collm.text.token_text import TokenText
from collm.tools.calls import Answer, open_tool
from collm.tools.spec import ToolSpec

_LOG = logging.getLogger(__name__)

CALLS_PER_TOKEN = 4
"""Time limit of all calls of a tool for one token, in time limits of one call."""


class ToolModel:
    """A tool as a distribution over the base's vocabulary.

    If the tool has an answer, the answer's next token has probability 1 - eps and all other tokens share eps. If it has
    none, all tokens are equally probable. The answer is the one to the text so far, or the remainder of an answer at an
    earlier character that the text has begun with. The latest such answer wins.

    All methods raise a ToolFailure if the tool raises, hangs or returns something other than text.

    Args:
        tokenizer, vocab_size: those of the base.

    Attributes:
        logprobs: in nats: of the answer's next token, of another token, of any token without an answer.
    """

    max_length = None

    def __init__(self, spec: ToolSpec, tokenizer: PreTrainedTokenizerBase, *, name: str, vocab_size: int) -> None:
        self.spec = spec
        self.name = name
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.logprobs = math.log1p(-spec.eps), math.log(spec.eps / max(vocab_size - 1, 1)), -math.log(vocab_size)
        self._tool = open_tool(spec)
        self._tokens = lru_cache(1 << 16)(partial(continuation_ids, tokenizer))

    def next_token(self, read: TokenText, length: int, answers: dict[int, Answer]) -> int | None:
        """The token after the first `length` tokens of `read`, as `remainder`; None if the tool abstains."""
        whole = next(n for n in range(length, -1, -1) if read.whole(n))
        left = self.remainder(read.text[: read.end(whole)], answers)
        if left is None:
            return None
        token_ids, begun = self._tokens(left), read.token_ids[whole:length]  # tokens of an incomplete character
        fits = len(token_ids) > len(begun) and token_ids[: len(begun)] == begun
        is_known = self.tokenizer.unk_token_id not in token_ids
        return token_ids[len(begun)] if fits and is_known else None

    def next_tokens(self, token_ids: Sequence[int], lengths: Sequence[int]) -> list[int | None]:
        """The token after each prefix of a sequence, given by length; None where the tool abstains."""
        read, answers = TokenText(self.tokenizer, token_ids), dict[int, Answer]()
        return [self.next_token(read, length, answers) for length in lengths]

    def remainder(self, text: str, answers: dict[int, Answer]) -> str | None:
        """The text that follows `text` according to the tool; None if it abstains.

        `answers` has the tool's answers by length of the prefix. New ones are added, so a tool that is too slow for
        one token gets further at the next.
        """
        limit = CALLS_PER_TOKEN * self.spec.seconds
        due = time.monotonic() + limit
        for at in range(len(text), max(len(text) - self.spec.max_answer, -1), -1):
            if at not in answers:
                if time.monotonic() > due:
                    late = f"took longer than {limit:g} s for one token"
                    raise ToolFailure(
                        f"{self.spec} {late}; make it faster, or lower max_answer, which bounds its calls"
                    )
                (answers[at],) = self._tool(text, [at])
            if left := self._left(text, at, answers[at]):
                return left
        return None

    def _left(self, text: str, at: int, answer: Answer) -> str | None:
        """What is left of the answer to text[:at], if the text goes on with its beginning."""
        if isinstance(answer, ToolFailure):
            raise answer
        answer, begun = (answer or "")[: self.spec.max_answer], text[at:]
        return answer.removeprefix(begun) or None if answer.startswith(begun) else None

    def logits(self, next_tokens: Sequence[int | None]) -> Tensor:
        """Log-probabilities of all tokens, shape (R, V), fp32."""
        hit, miss, unknown = self.logprobs
        logits = torch.full((len(next_tokens), self.vocab_size), unknown)
        for row, token_id in enumerate(next_tokens):
            if token_id is not None:
                logits[row], logits[row, token_id] = miss, hit
        return logits

    def score(self, token_ids: Sequence[int], is_target: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """Training scores (nats) of target tokens, whether each is the answer's next, and whether the tool abstains.

        A token is the answer's next if it has the next characters of the answer, or all of its remainder and more,
        regardless of how the tokenizer would split the answer. So several tokens at one place may score 1 - eps: a head
        should learn that the tool knows the text, however the data spells it. A score is therefore no probability.
        Likelihoods are those of `logits`, with the base's where the tool abstains. Shape (n,) each.
        """
        read = TokenText(self.tokenizer, token_ids)
        targets = [t for t in range(1, len(token_ids)) if is_target[t]]
        first = max(read.end(targets[0]) - self.spec.max_answer, 0)
        ends = range(first, read.end(targets[-1]) + 1)
        answers = dict(zip(ends, self._tool(read.text, ends), strict=True))
        scores = dict(zip((True, False, None), self.logprobs, strict=True))
        known = {at: answer for at, answer in reversed(answers.items()) if answer}
        matches = [self._matches(read, t, answers, known) for t in targets]
        correct, abstained = (torch.tensor([each is kind for each in matches]) for kind in (True, None))
        return torch.tensor([scores[each] for each in matches]), correct, abstained

    def _matches(self, read: TokenText, t: int, answers: dict[int, Answer], known: Mapping[int, Answer]) -> bool | None:
        """Whether token t is the answer's next; None without an answer. `known` has the answers that are not empty."""
        start, end = read.end(t), read.end(t + 1)
        if not (read.whole(t) and read.whole(t + 1) and end > start):
            token_id = self.next_token(read, t, answers)
            return None if token_id is None else token_id == read.token_ids[t]
        text, written = read.text[:start], read.text[start:end]
        near = (self._left(text, at, known[at]) for at in known if start - self.spec.max_answer < at <= start)
        left = next(filter(None, near), None)
        return None if left is None else left.startswith(written) or written.startswith(left)


class ToolRunner:
    """An `Assistant` that calls a tool. A failed call is logged and counted, and the tool abstains.

    A slot holds a text and the tool's answers by length of the text.
    """

    max_length = None
    may_abstain = True
    capacity = None
    most_slots = None

    def __init__(self, model: ToolModel) -> None:
        self.model = model
        self.name = model.name
        self.usage = ModelUsage()
        self._slots: dict[int, tuple[TokenText, dict[int, Answer]]] = {}
        self._numbers = count()

    def open(self, token_ids: Sequence[int] = ()) -> int:
        slot = next(self._numbers)
        self._slots[slot] = TokenText(self.model.tokenizer), {}
        return slot

    def close(self, slot: int, *, wipe: bool = False) -> None:
        del self._slots[slot]

    def forget(self) -> None:
        """Do nothing, because closed slots keep no content."""

    def length(self, slot: int) -> int:
        return len(self._slots[slot][0])

    def rollback(self, slot: int, length: int) -> None:
        read, answers = self._slots[slot]
        read.cut(length)
        for end in [end for end in answers if end > len(read.text)]:
            del answers[end]

    def extend(self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int] | None = None) -> ModelOutput:
        """Append tokens to each slot. Returns the output after its last `keep` tokens, by default 1, slot by slot."""
        next_tokens = []
        for slot, token_ids in unseen.items():
            read, answers = self._slots[slot]
            for token_id in token_ids:
                read.push(token_id)
            first = len(read) - (keep[slot] if keep else 1) + 1
            next_tokens += [self._next_token(read, length, answers) for length in range(first, len(read) + 1)]
        return ModelOutput(self.model.logits(next_tokens), abstained=[token_id is None for token_id in next_tokens])

    def _next_token(self, read: TokenText, length: int, answers: dict[int, Answer]) -> int | None:
        self.usage.calls += 1
        try:
            token_id = self.model.next_token(read, length, answers)
        except ToolFailure as failure:
            _LOG.warning("%s", failure)
            self.usage.failed += 1
            return None
        self.usage.abstained += token_id is None
        return token_id
