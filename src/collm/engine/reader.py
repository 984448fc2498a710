"""Runs one author on sequences: owns their slots, shares prefixes, draws the author's tokens and isolates failures."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import torch
from torch import Tensor

from collm.core.head import DeferralHead, author_logprobs, defer_probs
from collm.core.params import SamplingParams
from collm.core.sampling import sample, token_probs
from collm.engine.logits_processors import Edits
from collm.engine.sequence import Draw, Logits, Sequence
from collm.engine.slot_table import MIN_SHARED
from collm.errors import CollmError, ModelFailure, PolicyFailure, RequestError
from collm.models.assistant import Assistant, ModelOutput
from collm.models.language_model import to_device

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class AuthorOutput:
    """An author's output for R positions.

    Attributes:
        rows: sequence -> its rows; sequences that failed are missing.
        draws: the token that the author writes at each row; None where it abstains.
        raw: the author's logits, shape (R, V), fp32.
        logits: logits after the requests' logits processors, shape (R, V), fp32.
        numbers: for each row of the base, the defer prob and P(author 0..K).
        author_logprobs: log P(Z) at each row of the base, shape (R, K + 1); None for an assistant.
        num_tokens: number of tokens that were read.
        seconds: how long this took.
    """

    rows: dict[Sequence, range]
    draws: list[Draw | None]
    raw: Tensor
    logits: Tensor
    numbers: list[list[float]]
    author_logprobs: Tensor | None
    num_tokens: int
    seconds: float

    def at(self, row: int) -> Logits:
        """One row of the logits."""
        return Logits(self.raw[row], self.logits[row])


class Reader:
    """Runs one author. It alone opens, rolls back and closes the author's slots.

    Args:
        head: the deferral head, for the reader of the base.

    Attributes:
        slots: sequence -> its KV slot, from its first read until `close`.
        failures: sequences that failed, with the error; the caller removes them.
    """

    def __init__(self, author: int, runner: Assistant, head: DeferralHead | None = None) -> None:
        self.author = author
        self.runner = runner
        self.slots: dict[Sequence, int] = {}
        self.failures: dict[Sequence, CollmError] = {}
        self._lengths: dict[Sequence, int] = {}  # tokens in the slot, some of which may be cut
        self._head = head
        self._num_tokens = 0  # read in the current call

    def close(self, sequence: Sequence, *, wipe: bool = False) -> None:
        """Close the sequence's slot, if it has one. `wipe` is necessary after NaN."""
        slot = self.slots.pop(sequence, None)
        sequence.num_computed[self.author] = 0
        self._lengths.pop(sequence, None)
        if slot is not None:
            self.runner.close(slot, wipe=wipe)

    def read(self, wanted: Mapping[Sequence, range]) -> AuthorOutput | None:
        """Read the unread tokens of sequences, and draw the author's tokens. Return None if none could be read.

        If several new sequences share a prefix, one is read first and the others copy its cache. A tool abstains where
        a request's constraints change its token.

        Args:
            wanted: sequence -> the decisions for which the author's output is needed, without gaps.
        """
        start, self._num_tokens = time.perf_counter(), 0
        new = [sequence for sequence in wanted if sequence not in self.slots]
        followers = _followers(self.author, new) if len(new) > 1 else []
        parts = self._extend([sequence for sequence in wanted if sequence not in followers], wanted)
        if followers:
            parts += self._extend(followers, wanted)
        if not parts:
            return None
        output = parts[0][1] if len(parts) == 1 else _joined([output for _, output in parts])
        rows, params, uniforms = dict[Sequence, range](), list[SamplingParams](), list[float]()
        for sequence in [sequence for sequences, _ in parts for sequence in sequences]:
            rows[sequence] = range(len(params), len(params) + len(wanted[sequence]))
            params += [sequence.request.params] * len(wanted[sequence])
            places, is_greedy = wanted[sequence], not sequence.request.params.temperature
            uniforms += [0.0] * len(places) if is_greedy else sequence.token_uniforms(self.author, places)
        raw = logits = output.logits.float()
        numbers, by_author = list[Tensor](), None
        if self._head is not None:
            u = self._head(output.hidden)  # (R, K)
            by_author = author_logprobs(u)
            numbers += [defer_probs(u).unsqueeze(-1), by_author.exp()]
        if any(sequence.edits_logits for sequence in rows):
            logits = self._edited(raw, rows, wanted)
            best, argmax = logits.max(-1)
            numbers += [torch.stack([best, argmax != raw.argmax(-1)], dim=-1)]
        draws, fetched = draw_tokens(logits, params, uniforms, *numbers, raw=raw)
        seconds = time.perf_counter() - start  # the results are on the host
        abstained = {row for row, abstains in enumerate(output.abstained) if abstains}
        if logits is not raw:
            edits, fetched = [row[-2:] for row in fetched], [row[:-2] for row in fetched]
            if self.runner.may_abstain:
                abstained |= {row for row, (_, is_changed) in enumerate(edits) if is_changed}
            else:
                self._fail_without_tokens(rows, [best for best, _ in edits])
        if any(math.isnan(draw.logprob + sum(row)) for draw, row in zip(draws, fetched, strict=True)):
            self._fail_invalid(rows, draws, fetched)
        rows = {sequence: at for sequence, at in rows.items() if sequence not in self.failures}
        written = [None if row in abstained else draw for row, draw in enumerate(draws)]
        return AuthorOutput(rows, written, raw, logits, fetched, by_author, self._num_tokens, seconds)

    def _extend(
        self, sequences: ListOf[Sequence], wanted: Mapping[Sequence, range]
    ) -> list[tuple[ListOf[Sequence], ModelOutput]]:
        """Extend all sequences at once. If the model raises, retry them one by one so that only faulty ones fail."""
        unseen, keep, ends = {}, {}, []
        try:
            for sequence in sequences:
                text, places = sequence.text_of(self.author), wanted[sequence]
                text = text[: len(text) - len(sequence.draft) + places[-1]]
                if sequence not in self.slots:
                    # A shared prefix must end before the first token that needs an output.
                    slot = self.slots[sequence] = self.runner.open(text[: len(text) - len(places) + 1])
                    self._lengths[sequence] = sequence.num_computed[self.author] = self.runner.length(slot)
                slot, length = self.slots[sequence], sequence.num_computed[self.author]
                if length < self._lengths[sequence]:
                    self.runner.rollback(slot, length)
                    self._lengths[sequence] = length
                unseen[slot], keep[slot] = text[length:], len(places)
                ends.append(len(text))
            output = self.runner.extend(unseen, keep)
        except Exception as error:
            if len(sequences) > 1:
                name, count = self.runner.name, len(sequences)
                _LOG.warning("%s failed on %d sequences (%r); retrying them one by one", name, count, error)
                return [part for each in sequences for part in self._extend([each], wanted)]
            self.failures[sequences[0]] = as_failure(error, ModelFailure, self.runner.name)
            return []
        for sequence, end in zip(sequences, ends, strict=True):
            sequence.num_computed[self.author] = self._lengths[sequence] = end
        self._num_tokens += sum(map(len, unseen.values()))
        return [(sequences, output)]

    def _edited(self, raw: Tensor, rows: Mapping[Sequence, range], wanted: Mapping[Sequence, range]) -> Tensor:
        """A copy of the logits after the requests' processors."""
        edits = Edits(raw.shape[-1], raw.device)
        for sequence, at in rows.items():
            if sequence.edits_logits:
                try:
                    sequence.add_edits(edits, self.author, at, wanted[sequence].start)
                except Exception as error:
                    self.failures[sequence] = as_failure(error, PolicyFailure, sequence.request.policy)
        return edits.apply(raw)

    def _fail_without_tokens(self, rows: Mapping[Sequence, range], best: ListOf[float]) -> None:
        """Fail sequences whose constraints allow no token, so that the best logit of a row is -inf."""
        for sequence, at in rows.items():
            if sequence.edits_logits and sequence not in self.failures and any(best[row] == -math.inf for row in at):
                self.failures[sequence] = RequestError(
                    "the request's constraints allow no next token; loosen one of them"
                )

    def _fail_invalid(self, rows: Mapping[Sequence, range], draws: ListOf[Draw], numbers: ListOf[list[float]]) -> None:
        """Fail sequences with NaN."""
        for sequence, at in rows.items():
            found = any(math.isnan(draws[row].logprob) or any(map(math.isnan, numbers[row])) for row in at)
            if found and sequence not in self.failures:
                self.failures[sequence] = ModelFailure(
                    f"{self.runner.name} returned NaN logits after {len(sequence.token_ids)} tokens; "
                    "check its weights and dtype"
                )
                self.close(sequence, wipe=True)


def _followers(author: int, new: ListOf[Sequence]) -> list[Sequence]:
    """New sequences whose first tokens are those of another new sequence."""
    leaders, followers = set(), []
    for sequence in new:
        text = sequence.text_of(author)
        beginning = tuple(text[:MIN_SHARED])
        if len(text) > MIN_SHARED and beginning in leaders:
            followers.append(sequence)
        leaders.add(beginning)
    return followers


def _joined(outputs: ListOf[ModelOutput]) -> ModelOutput:
    """The rows of several outputs of one author."""
    hidden = [output.hidden for output in outputs if output.hidden is not None]
    return ModelOutput(
        torch.cat([output.logits for output in outputs]),
        torch.cat(hidden) if hidden else None,
        [abstains for output in outputs for abstains in output.abstained],
    )


def draw_tokens(
    logits: Tensor, params: ListOf[SamplingParams], uniforms: ListOf[float], *others: Tensor, raw: Tensor
) -> tuple[list[Draw], list[list[float]]]:
    """Draw a token from each row of logits, and transfer tokens and other numbers to the host together.

    Args:
        logits: shape (R, V), fp32.
        params, uniforms: sampling parameters and a random number from [0, 1) for each row.
        *others: numbers to transfer along, shape (R, n) each.
        raw: logits from which log-probabilities are computed, shape (R, V).

    Returns:
        R draws, and the numbers of `others` as one list per row.
    """
    token_ids = logits.argmax(-1)
    sampled: dict[tuple[float, float, int, float], list[int]] = {}  # arguments of `token_probs` -> rows
    for row, one in enumerate(params):
        if one.temperature:
            sampled.setdefault((one.temperature, one.top_p, one.top_k, one.min_p), []).append(row)
    for arguments, rows in sampled.items():
        at = slice(None) if len(rows) == len(params) else to_device(rows, logits.device)
        drawn_from = to_device([uniforms[row] for row in rows], logits.device, torch.float64)
        token_ids[at] = sample(token_probs(logits[at], *arguments), drawn_from)
    norms = raw.logsumexp(-1, keepdim=True)
    logprobs = raw.gather(-1, token_ids.unsqueeze(-1)) - norms
    columns = [token_ids.unsqueeze(-1), logprobs, *others]
    most = min(max([one.logprobs or 0 for one in params]), raw.shape[-1])
    if most:
        values, indices = raw.topk(most)
        columns += [indices, values - norms]
    width = sum([other.shape[-1] for other in others])
    draws, numbers = [], []
    for one, row_numbers in zip(params, torch.cat([each.double() for each in columns], dim=-1).tolist(), strict=True):
        token_id, logprob, rest, wanted = int(row_numbers[0]), row_numbers[1], row_numbers[2:], one.logprobs or 0
        pairs = zip(rest[width : width + wanted], rest[width + most :], strict=False)
        draws.append(Draw(token_id, logprob, tuple((int(top), value) for top, value in pairs if value > -math.inf)))
        numbers.append(rest[:width])
    return draws, numbers


def as_failure(error: Exception, kind: type[CollmError], raiser: object) -> CollmError:
    """An error of the package as it is; another one as a failure of what raised it."""
    if isinstance(error, CollmError):
        return error
    failure = kind(f"{raiser} raised {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
