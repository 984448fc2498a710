"""Penalties, biases and constraints that a request applies to every author's logits.

The edits of a row depend only on the request and the tokens before it. Draft tokens are therefore processed exactly
like final ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from collm.core.params import SamplingParams
from collm.core.sampling import penalised
from collm.models.language_model import to_device
from collm.text.grammars import Grammar, bit_row, forbidden
from collm.text.template import tokenize
from collm.text.token_ids import common_prefix

Array = np.ndarray[Any, np.dtype[Any]]


class LogitsProcessors:
    """The logits processors of one request, with their state.

    Args:
        params: sampling parameters of the request.
        prompt_ids: prompt of the request.
        tokenizer: the author's tokenizer.
        end_ids: tokens that end the text.
        grammar: the structured output constraint, in its initial state.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        grammar: Grammar | None,
    ) -> None:
        self.params = params
        self._end_ids = sorted(end_ids)
        self._bad_words: dict[tuple[int, ...], list[int]] = {}  # tokens -> the last tokens that are bad after them
        for *before, last in bad_word_tokens(tokenizer, tuple(params.bad_words)):
            self._bad_words.setdefault(tuple(before), []).append(last)
        self._lengths = {len(before) for before in self._bad_words if before}
        self._fixed: dict[torch.device, _Fixed] = {}
        self._counts = _TokenCounts(prompt_ids) if params.penalises else None
        self._grammar = grammar

    def add_edits(self, edits: Edits, row: int, generated: Sequence[int], *, length: int | None = None) -> None:
        """Add the edits of `row`, whose logits follow the tokens generated so far.

        Args:
            length: number of tokens that count towards `min_tokens`; defaults to all.

        Raises:
            RequestError: the grammar has become too complex.
        """
        if edits.device not in self._fixed:
            self._fixed[edits.device] = self._make_fixed(edits)
        fixed = self._fixed[edits.device]
        if fixed.bias is not None:
            edits.bias(row, fixed.bias)
        if self._counts is not None:
            edits.penalise(row, self._counts.of(generated), self.params)
        if fixed.forbidden is not None:
            edits.forbid(row, fixed.forbidden)
        if (len(generated) if length is None else length) < self.params.min_tokens:
            edits.forbid(row, fixed.ends)
        for count in self._lengths:
            if count <= len(generated):
                edits.ban(row, self._bad_words.get(tuple(generated[len(generated) - count :]), ()))
        if self._grammar is not None:
            self._grammar.go_to(generated)
            edits.constrain(row, self._grammar)

    def permitted(self, generated: Sequence[int], draft: Sequence[int]) -> int:
        """Number of leading draft tokens that the grammar allows."""
        if self._grammar is None:
            return len(draft)
        self._grammar.go_to(generated)
        return self._grammar.allows(draft)

    def is_complete(self, generated: Sequence[int]) -> bool:
        """Whether the grammar allows nothing but the end of the text."""
        if self._grammar is None:
            return False
        self._grammar.go_to(generated)
        return self._grammar.complete

    def _make_fixed(self, edits: Edits) -> _Fixed:
        bias = forbidden = None
        if self.params.logit_bias:
            bias = torch.zeros(edits.vocab_size)
            bias[list(self.params.logit_bias)] = torch.tensor(list(self.params.logit_bias.values()))
        allowed, banned = self.params.allowed_token_ids, self._bad_words.get((), [])
        if allowed is not None or banned:
            forbidden = torch.zeros(edits.vocab_size, dtype=torch.bool)
            if allowed is not None:
                forbidden.fill_(True)[list(allowed)] = False
            forbidden[banned] = True
        ends = torch.zeros(edits.vocab_size, dtype=torch.bool)
        ends[self._end_ids] = True
        moved = (None if one is None else one.to(edits.device) for one in (bias, forbidden))
        return _Fixed(next(moved), next(moved), ends.to(edits.device))


class _Fixed(NamedTuple):
    """What a request changes at every token: a bias, forbidden tokens, and the tokens that end the text, each (V,)."""

    bias: Tensor | None
    forbidden: Tensor | None
    ends: Tensor


@lru_cache(maxsize=64)
def bad_word_tokens(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...]) -> list[list[int]]:
    """Tokens of each text without and, if it has as many tokens, with a leading space, as in vLLM.

    Raises:
        RequestError: the tokenizer fails on a text.
    """
    found = []
    for text in texts:
        bare, spaced = (tokenize(tokenizer, space + text.lstrip(), special=False) for space in ("", " "))
        found += [bare] if bare else []
        if len(spaced) == len(bare) and spaced[:1] != bare[:1]:
            found.append(spaced)
    return found


class _TokenCounts:
    """The distinct tokens of prompt and output, with their counts in the output."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = list(dict.fromkeys(prompt_ids))
        self._places = {token_id: place for place, token_id in enumerate(distinct)}
        self._token_ids = np.array(distinct, dtype=np.int64)
        self._times = np.zeros(len(distinct), dtype=np.float32)
        self._counted_ids: list[int] = []
        self._in_prompt = len(distinct)

    def of(self, generated: Sequence[int]) -> tuple[Array, Array]:
        """Token ids and counts after these tokens."""
        same = common_prefix(self._counted_ids, generated)
        while len(self._counted_ids) > same:
            self._pop()
        for token_id in generated[same:]:
            self._add(token_id)
        distinct = len(self._places)
        return self._token_ids[:distinct], self._times[:distinct].copy()

    def _add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._token_ids):  # double the capacity
            self._token_ids = np.concatenate([self._token_ids, np.zeros(place + 1, dtype=np.int64)])
            self._times = np.concatenate([self._times, np.zeros(place + 1, dtype=np.float32)])
        self._token_ids[place] = token_id
        self._times[place] += 1
        self._counted_ids.append(token_id)

    def _pop(self) -> None:
        token_id = self._counted_ids.pop()
        place = self._places[token_id]
        self._times[place] -= 1
        if place >= self._in_prompt and self._times[place] == 0:
            del self._places[token_id]  # always the last place, as tokens are removed in reverse order


class Edits:
    """Edits of logits (R, V), collected row by row and applied together in vLLM's order."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self.vocab_size = vocab_size
        self._biased: list[tuple[int, Tensor]] = []
        self._penalties: list[Array] = []  # (6, tokens): row, token, count, and the three penalties
        self._banned: list[tuple[int, int]] = []
        self._forbidden: list[tuple[int, Tensor]] = []
        self._grammar_rows: list[int] = []
        self._bits: list[Array] = []

    def bias(self, row: int, bias: Tensor) -> None:
        """Add a bias, shape (V,), on the device of the logits."""
        self._biased.append((row, bias))

    def penalise(self, row: int, counts: tuple[Array, Array], params: SamplingParams) -> None:
        token_ids, times = counts
        each = np.empty((6, len(token_ids)))
        each[0], each[1], each[2] = row, token_ids, times
        each[3:] = [[params.repetition_penalty], [params.presence_penalty], [params.frequency_penalty]]
        self._penalties.append(each)

    def ban(self, row: int, token_ids: Iterable[int]) -> None:
        self._banned += [(row, token_id) for token_id in token_ids]

    def forbid(self, row: int, mask: Tensor) -> None:
        """Exclude the tokens of a mask, bool, shape (V,), on the device of the logits."""
        self._forbidden.append((row, mask))

    def constrain(self, row: int, grammar: Grammar) -> None:
        bits = bit_row(self.vocab_size)
        grammar.fill(bits)
        self._grammar_rows.append(row)
        self._bits.append(bits)

    def apply(self, logits: Tensor) -> Tensor:
        """Return a copy of the logits with all edits applied."""
        logits = logits.clone()
        if self._biased:
            rows, biases = zip(*self._biased, strict=True)
            logits[to_device(rows, logits.device)] += torch.stack(biases).to(logits.dtype)
        if self._penalties:
            columns = torch.from_numpy(np.concatenate(self._penalties, axis=1)).to(logits.device)
            at = columns[:2].long()
            counts, *penalties = columns[2:].to(logits.dtype)
            logits[tuple(at)] = penalised(logits[tuple(at)], counts, *penalties)
        if self._banned:
            logits[tuple(to_device(self._banned, logits.device).T)] = -torch.inf
        for row, mask in self._forbidden:
            logits[row].masked_fill_(mask, -torch.inf)
        if self._bits:
            mask = forbidden(np.stack(self._bits), self.vocab_size).to(logits.device)
            at = to_device(self._grammar_rows, logits.device)
            logits[at] = logits[at].masked_fill(mask, -torch.inf)
        return logits
