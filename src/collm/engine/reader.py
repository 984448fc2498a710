"""Runs one author on sequences: owns their slots, shares prefixes, draws the author's tokens and isolates failures."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from collm.core.head import DeferralHead, author_logprobs, defer_probs, doubt_of
from collm.core.params import SamplingParams
from collm.core.sampling import redraw, sample, token_probs
from collm.engine.decision import Draw, Logits
from collm.engine.logits_processors import Edits
from collm.engine.sequence import Sequence, Unit
from collm.engine.slot_table import MIN_SHARED
from collm.errors import CollmError, ModelFailure, PolicyFailure, RequestError
from collm.models.assistant import Assistant, ModelOutput
from collm.models.language_model import to_device
from collm.text.alignment import Masks

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


@dataclass(frozen=True)
class Ahead:
    """What an author has read in a pass with others: the sequences, their output, and how many seconds this took."""

    sequences: ListOf[Sequence]
    output: ModelOutput
    seconds: float


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
        self._ends: dict[Sequence, int] = {}  # tokens in the slot after the current call
        self._head = head
        self._num_tokens = 0  # read in the current call

    def close(self, sequence: Sequence, *, wipe: bool = False) -> None:
        """Close the sequence's slot, if it has one. `wipe` is necessary after NaN."""
        slot = self.slots.pop(sequence, None)
        sequence.num_computed[self.author] = 0
        self._lengths.pop(sequence, None)
        self._ends.pop(sequence, None)
        if slot is not None:
            self.runner.close(slot, wipe=wipe)

    def would_copy(self, wanted: Mapping[Sequence, range]) -> bool:
        """Whether new sequences would copy a prefix from each other."""
        new = [sequence for sequence in wanted if sequence not in self.slots]
        return len(new) > 1 and bool(_followers(self.author, new))

    def read(self, wanted: Mapping[Sequence, range], ahead: Ahead | None = None) -> AuthorOutput | None:
        """Read the unread tokens of sequences, and draw the author's tokens. Return None if none could be read.

        New sequences with a common prefix copy it from the first. A tool abstains where constraints change its token.

        Args:
            wanted: sequence -> the decisions for which the author's output is needed, without gaps.
            ahead: what has been read of them in a pass with others.
        """
        start, self._num_tokens = time.perf_counter() - (ahead.seconds if ahead else 0.0), 0
        new = [sequence for sequence in wanted if sequence not in self.slots]
        groups = _leaders_first(self.author, list(wanted), new) if len(new) > 1 else [list(wanted)]
        parts = [(ahead.sequences, ahead.output)] if ahead else []
        parts += [part for group in groups if not ahead for part in self._extend(group, wanted)]
        if not parts:
            return None
        output = parts[0][1] if len(parts) == 1 else _joined([output for _, output in parts])
        rows, params, uniforms = dict[Sequence, range](), list[SamplingParams](), list[float]()
        for sequence in [sequence for sequences, _ in parts for sequence in sequences]:
            end = self._ends[sequence]
            self._num_tokens += end - sequence.num_computed[self.author]
            sequence.num_computed[self.author] = self._lengths[sequence] = end
            rows[sequence] = range(len(params), len(params) + len(wanted[sequence]))
            params += [sequence.request.params] * len(wanted[sequence])
            draws_at = wanted[sequence] if sequence.request.params.temperature else None
            uniforms += sequence.token_uniforms(self.author, draws_at) if draws_at else [0.0] * len(wanted[sequence])
        said = output.logits.float()
        units = [sequence.segments for sequence in rows if sequence.segments is not None]  # one row each
        masks = Masks.stacked([unit.masks(self.author, said.device) for unit in units]) if units else None
        raw = logits = said if masks is None else said + masks.follows.log()  # NaN remains
        numbers, by_author = list[Tensor](), None
        if self._head is not None:
            u = self._head(cast(Tensor, output.hidden), doubt_of(said) if self._head.doubt else None)  # (R, K)
            by_author = author_logprobs(u)
            numbers += [defer_probs(u).unsqueeze(-1), by_author.exp()]
        if any(sequence.edits_logits for sequence in rows):
            logits = self._edited(raw, rows, wanted)
            best, best_token = logits.max(-1)
            numbers += [torch.stack([best, best_token != said.argmax(-1)], dim=-1)]
        draw = draw_tokens if masks is None else partial(_draw_in_segments, masks, units, self.author)
        draws, fetched = draw(logits, params, uniforms, *numbers, raw=raw)
        seconds = time.perf_counter() - start  # the results are on the host
        abstained = {row for row, abstains in enumerate(output.abstained) if abstains}
        if logits is not raw:
            fetched = self._check_edits(rows, fetched, abstained)
        if any(math.isnan(draw.logprob + sum(row)) for draw, row in zip(draws, fetched, strict=True)):
            self._fail_invalid(rows, draws, fetched)
        rows = {sequence: at for sequence, at in rows.items() if sequence not in self.failures}
        written = [None if row in abstained else draw for row, draw in enumerate(draws)]
        return AuthorOutput(rows, written, raw, logits, fetched, by_author, self._num_tokens, seconds)

    def _extend(
        self, sequences: ListOf[Sequence], wanted: Mapping[Sequence, range]
    ) -> list[tuple[ListOf[Sequence], ModelOutput]]:
        """Extend all sequences at once. If the model raises, retry them one by one so that only faulty ones fail."""
        try:
            unseen, keep = self.unread(sequences, wanted)
            output = self.runner.extend(unseen, keep)
        except Exception as error:
            if len(sequences) > 1:
                name, count = self.runner.name, len(sequences)
                _LOG.warning("%s failed on %d sequences (%r); retrying them one by one", name, count, error)
                return [part for each in sequences for part in self._extend([each], wanted)]
            self.failures[sequences[0]] = as_failure(error, ModelFailure, self.runner.name)
            return []
        return [(sequences, output)]

    def unread(
        self, sequences: ListOf[Sequence], wanted: Mapping[Sequence, range]
    ) -> tuple[dict[int, list[int]], dict[int, int]]:
        """The arguments of `extend`: the unread tokens of each slot, which is opened or rolled back for them, and how
        many of them need an output.
        """
        unseen, keep = {}, {}
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
            self._ends[sequence] = len(text)
        return unseen, keep

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

    def _check_edits(
        self, rows: Mapping[Sequence, range], numbers: ListOf[list[float]], abstained: set[int]
    ) -> list[list[float]]:
        """Add the rows at which constraints make a tool abstain, fail what no token is left to; the other numbers."""
        edits = [row[-2:] for row in numbers]
        if self.runner.may_abstain:
            abstained |= {row for row, (_, is_changed) in enumerate(edits) if is_changed}
        else:
            self._fail_without_tokens(rows, [best for best, _ in edits])
        return [row[:-2] for row in numbers]

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


def _leaders_first(author: int, wanted: ListOf[Sequence], new: ListOf[Sequence]) -> list[list[Sequence]]:
    """The sequences, and after them the new ones that copy a prefix of theirs."""
    followers = _followers(author, new)
    leaders = [sequence for sequence in wanted if sequence not in followers]
    return [leaders, followers] if followers else [leaders]


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


class Draft(NamedTuple):
    """The tokens that the base drew at R rows, for a draw from another distribution in their place.

    Attributes:
        token_ids: shape (R,).
        logits: what they were drawn from, shape (R, V).
        kept: which of them stand, shape (R,), if that is decided; by default as `sampling.redraw` says.
    """

    token_ids: Tensor
    logits: Tensor
    kept: Tensor | None = None

    def redrawn(self, at: Any, probs: Tensor, arguments: tuple[float, float, int, float], uniforms: Tensor) -> Tensor:
        """Draw from probabilities at some rows, by these arguments of `token_probs`."""
        kept = None if self.kept is None else self.kept[at]
        return redraw(probs, token_probs(self.logits[at], *arguments), self.token_ids[at], uniforms, kept)


def draw_tokens(
    logits: Tensor,
    params: ListOf[SamplingParams],
    uniforms: ListOf[float],
    *others: Tensor,
    raw: Tensor,
    draft: Draft | None = None,
) -> tuple[list[Draw], list[list[float]]]:
    """Draw a token from each row of logits, and transfer tokens and other numbers to the host together.

    Args:
        logits: shape (R, V), fp32.
        params, uniforms: sampling parameters and a random number from [0, 1) for each row.
        *others: numbers to transfer along, shape (R, n) each. They come back as one list per row.
        raw: logits from which log-probabilities are computed, shape (R, V).
        draft: the base's tokens, if they may stand.
    """
    # NumPy is ten times faster
    on_cpu = logits.device.type == "cpu"
    token_ids = torch.from_numpy(logits.numpy().argmax(-1)) if on_cpu else logits.argmax(-1)
    if draft is not None and draft.kept is not None:
        token_ids = torch.where(draft.kept, draft.token_ids, token_ids)
    sampled: dict[tuple[float, float, int, float], list[int]] = {}  # arguments of `token_probs` -> rows
    for row, one in enumerate(params):
        if one.temperature:
            sampled.setdefault((one.temperature, one.top_p, one.top_k, one.min_p), []).append(row)
    for arguments, rows in sampled.items():
        at = slice(None) if len(rows) == len(params) else to_device(rows, logits.device)
        drawn_from = to_device([uniforms[row] for row in rows], logits.device, torch.float64)
        probs = token_probs(logits[at], *arguments)
        token_ids[at] = sample(probs, drawn_from) if draft is None else draft.redrawn(at, probs, arguments, drawn_from)
    logprobs = raw.log_softmax(-1)
    columns = [token_ids.unsqueeze(-1), logprobs.gather(-1, token_ids.unsqueeze(-1)), *others]
    most = min(max([one.logprobs or 0 for one in params]), raw.shape[-1])
    if most:
        values, indices = logprobs.topk(most)
        columns += [indices, values]
    width = sum([other.shape[-1] for other in others])
    draws, numbers = [], []
    for one, row_numbers in zip(params, torch.cat([each.double() for each in columns], dim=-1).tolist(), strict=True):
        token_id, logprob, rest, wanted = int(row_numbers[0]), row_numbers[1], row_numbers[2:], one.logprobs or 0
        pairs = zip(rest[width : width + wanted], rest[width + most :], strict=False)
        draws.append(Draw(token_id, logprob, tuple((int(top), value) for top, value in pairs if value > -math.inf)))
        numbers.append(rest[:width])
    return draws, numbers


def _draw_in_segments(
    masks: Masks,
    units: ListOf[Unit],
    author: int,
    logits: Tensor,
    params: ListOf[SamplingParams],
    uniforms: ListOf[float],
    *others: Tensor,
    raw: Tensor,
) -> tuple[list[Draw], list[list[float]]]:
    """Like `draw_tokens`, with the tokens that open a segment if one begins in these R rows.

    A token that ends the text has the log-probability of all of them.

    Args:
        masks: shape (R, V) each.
        units: the segments of each row.
    """
    count, opens, end_ids = len(params), masks.opens.log(), units[0].alignment.tokenizers[author].eos_ids
    uniforms = [*uniforms, *(unit.uniform(author, opening=True) for unit in units)]
    logits, raw = (torch.cat([one, one + opens]) for one in (logits, raw))
    norm = raw.logsumexp(-1)
    log_end = (raw + masks.ends.log().repeat(2, 1)).logsumexp(-1) - norm
    added = torch.stack([(norm[count:] - norm[:count]).repeat(2), log_end], dim=-1)
    numbers = [*(one.repeat(2, 1) for one in others), added]
    draws, fetched = draw_tokens(logits, [*params] * 2, uniforms, *numbers, raw=raw)
    law = [
        replace(draw, logprob=log_end if draw.token_id in end_ids else draw.logprob, log_start=log_start)
        for draw, (*_, log_start, log_end) in zip(draws, fetched, strict=True)
    ]
    openings = zip(law[:count], law[count:], strict=True)
    return [replace(draw, opening=opening) for draw, opening in openings], [row[:-2] for row in fetched[:count]]


def as_failure(error: Exception, kind: type[CollmError], raiser: object) -> CollmError:
    """An error of the package as it is; another one as a failure of what raised it."""
    if isinstance(error, CollmError):
        return error
    failure = kind(f"{raiser} raised {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
