"""The one decoding loop: any number of sequences and assistants, joining and leaving between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from collm.core.head import DeferralHead
from collm.core.objective import author_logprobs, defer_probs
from collm.core.policies import StepView
from collm.core.sampling import sample, token_probs
from collm.core.types import BASE, TokenStep
from collm.decoding.request import Request, Sequence
from collm.errors import ConfigError, RequestError
from collm.models.runner import Assistant, ModelRunner, Reading


@dataclass(frozen=True)
class Emitted:
    """A step of the sequence that `Engine.add` numbered `number`."""

    number: int
    step: TokenStep
    sequence: Sequence


class Engine:
    """Decodes requests together.

    Args:
        base: runner of the base.
        assistants: authors 1..K.
        head: the deferral head, K outputs.
        tokenizer: of all models.
        eos_ids: tokens that end a sequence.
        max_batch: most sequences decoded at once; further ones wait.
    """

    def __init__(
        self,
        base: ModelRunner,
        assistants: ListOf[Assistant],
        head: DeferralHead,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_ids: frozenset[int],
        max_batch: int = 16,
    ) -> None:
        self.authors: list[Assistant] = [base, *assistants]
        self.head = head
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.max_batch = max_batch
        self._vocab_size = base.model.vocab_size
        self._waiting: deque[tuple[int, Sequence]] = deque()
        self._active: dict[int, Sequence] = {}
        self._count = 0

    @property
    def has_work(self) -> bool:
        return bool(self._active or self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request; its number tells its steps from others'.

        Raises:
            RequestError: the prompt is empty, holds unknown token ids or leaves no room in a model's context.
        """
        self._check_prompt(request.prompt_ids)
        number, self._count = self._count, self._count + 1
        limits = [author.max_length for author in self.authors if author.max_length is not None]
        self._waiting.append((number, Sequence(request, self.tokenizer, self.eos_ids, min(limits, default=None))))
        return number

    def cancel(self, number: int) -> None:
        """Drop a request, running or waiting; its slots are free at once."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != number)
        if number in self._active:
            self._leave(number)

    def close(self) -> None:
        """Drop all requests."""
        self._waiting.clear()
        for number in list(self._active):
            self._leave(number)

    def step(self) -> list[Emitted]:
        """Write the next token of every active sequence.

        Raises:
            ModelFailure: a model returned NaN.
            ConfigError: a policy named an author that does not exist.
        """
        self._admit()
        numbers, sequences = list(self._active), list(self._active.values())
        base = self._read(BASE, sequences)
        logits: list[dict[int, Tensor]] = [dict(enumerate(base.logits)), *({} for _ in self.authors[1:])]
        views = self._views(base, sequences)
        self._consult(sequences, views, logits)
        chosen = [self._choose(sequence, view) for sequence, view in zip(sequences, views, strict=True)]
        emitted: dict[int, Emitted] = {}
        for author, rows in enumerate(logits):
            writing = [i for i, name in enumerate(chosen) if name == author]
            self._read_missing(author, writing, sequences, rows)
            for i, (token_id, logprob) in zip(writing, _draw(writing, rows, sequences), strict=True):
                step = sequences[i].append(token_id, author, views[i].defer_prob, logprob)
                emitted[i] = Emitted(numbers[i], step, sequences[i])
            self.authors[author].usage.tokens_written += len(writing)
        for number, sequence in zip(numbers, sequences, strict=True):
            if sequence.finish_reason is not None:
                self._leave(number)
        return [emitted[i] for i in range(len(sequences))]

    def _check_prompt(self, prompt_ids: ListOf[int]) -> None:
        if not prompt_ids:
            raise RequestError("the prompt is empty; expected at least one token")
        outside = [token for token in prompt_ids if not 0 <= token < self._vocab_size]
        if outside:
            raise RequestError(f"token id {outside[0]} is outside the vocabulary of {self._vocab_size} tokens")
        for author in self.authors:
            if author.max_length is not None and len(prompt_ids) >= author.max_length:
                raise RequestError(
                    f"the prompt has {len(prompt_ids)} tokens, but {author.name} reads at most {author.max_length} "
                    "including what it writes; shorten the prompt"
                )

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self.max_batch:
            number, sequence = self._waiting.popleft()
            self._active[number] = sequence

    def _leave(self, number: int) -> None:
        for author, slot in self._active.pop(number).slots.items():
            self.authors[author].close(slot)

    def _read(self, author: int, sequences: ListOf[Sequence]) -> Reading:
        """Let an author read what it has not seen of each sequence: one row of logits each."""
        runner = self.authors[author]
        unseen: dict[int, ListOf[int]] = {}
        for sequence in sequences:
            if author not in sequence.slots:
                sequence.slots[author] = runner.open()
            slot = sequence.slots[author]
            unseen[slot] = sequence.token_ids[runner.length(slot) :]
        return runner.extend(unseen)

    def _read_missing(
        self, author: int, wanted: ListOf[int], sequences: ListOf[Sequence], rows: dict[int, Tensor]
    ) -> None:
        """Complete `rows` (sequence index -> logits) for the sequences `wanted`."""
        missing = [i for i in wanted if i not in rows]
        if missing:
            reading = self._read(author, [sequences[i] for i in missing])
            rows.update(zip(missing, reading.logits, strict=True))

    @torch.inference_mode()
    def _views(self, base: Reading, sequences: ListOf[Sequence]) -> list[StepView]:
        assert base.hidden is not None
        u = self.head(base.hidden)  # (B, K)
        numbers = torch.cat([defer_probs(u).unsqueeze(-1), author_logprobs(u).exp()], dim=-1).tolist()
        return [
            StepView(
                position=len(sequence.steps),
                author_probs=author_probs,
                defer_prob=defer_prob,
                temperature=sequence.request.params.temperature,
                rng=sequence.rng,
            )
            for sequence, (defer_prob, *author_probs) in zip(sequences, numbers, strict=True)
        ]

    def _choose(self, sequence: Sequence, view: StepView) -> int:
        author = sequence.request.policy.author(view)
        if not 0 <= author < len(self.authors):
            raise ConfigError(f"{sequence.request.policy} named author {author}, expected 0 to {len(self.authors) - 1}")
        return author

    def _consult(self, sequences: ListOf[Sequence], views: list[StepView], logits: ListOf[dict[int, Tensor]]) -> None:
        """Let every assistant read the sequences whose policy looks at all of them before it decides."""
        consulting = [i for i, sequence in enumerate(sequences) if sequence.request.policy.consults_assistants]
        for author, rows in enumerate(logits):
            self._read_missing(author, consulting, sequences, rows)
        for i in consulting:
            views[i] = replace(views[i], top_tokens=[int(rows[i].argmax()) for rows in logits])


@torch.inference_mode()
def _draw(writing: ListOf[int], rows: dict[int, Tensor], sequences: ListOf[Sequence]) -> list[tuple[int, float]]:
    """The next token of each sequence in `writing` and its log-probability, from its author's logits."""
    if not writing:
        return []
    logits = torch.stack([rows[i] for i in writing]).float()  # (n, V)
    token_ids = logits.argmax(-1)
    for row, i in enumerate(writing):
        params, rng = sequences[i].request.params, sequences[i].rng
        if params.temperature > 0:
            probs = token_probs(logits[row], params.temperature, params.top_p, params.top_k)
            token_ids[row] = sample(probs, probs.new_tensor(rng.random(), dtype=torch.float64))
    logprobs = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return list(zip(token_ids.tolist(), logprobs.tolist(), strict=True))
