"""Decoding over different tokenizers as the law says it: every model reads the whole text again for every token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from collm import DeferralHead, SamplingParams
from collm.core.head import author_logprobs, defer_probs, doubt_of
from collm.core.policies import Policy, StepView
from collm.core.sampling import sample, token_probs
from collm.models.tools import ToolModel
from collm.text.alignment import ANYTHING, Alignment
from collm.text.token_text import TokenText
from tests.engine.slow import _processed


@dataclass
class SlowSegments:
    """Decodes one prompt.

    Attributes:
        logprobs: log-probabilities of the tokens under the law, nats, after `run`.
    """

    models: Sequence[PreTrainedModel | ToolModel]
    alignment: Alignment
    head: DeferralHead
    prompts: Sequence[list[int]]
    policy: Policy
    params: SamplingParams
    logprobs: list[float] = field(default_factory=list)

    @torch.no_grad()
    def run(self) -> tuple[list[int], list[int], bytes]:
        """The base's tokens, their authors, and the text."""
        rng = random.Random(self.params.seed)
        self._seed = rng.getrandbits(64)
        uniforms: list[tuple[float, float]] = []
        tokens, authors, answer, deferred, ended = list[int](), list[int](), b"", 0, 0.0
        while True:
            ids = self._ids(0, answer)
            hidden, logits = self._read(0, ids)
            u = self.head(hidden, doubt_of(logits))
            while len(uniforms) <= len(tokens):
                uniforms.append((rng.random(), rng.random()))
            view = StepView(
                position=len(tokens),
                deferred=deferred,
                author_probs=author_logprobs(u)[0].exp().tolist(),
                defer_prob=float(defer_probs(u)),
                temperature=self.params.temperature,
                uniform=uniforms[len(tokens)][0],
            )
            author, new, values, whole = self.policy.author(view), list[int](), list[float](), False
            asked = author != 0
            if author:
                written, logprobs, log_end = self._segment(author, answer, [])
                if not written:  # a tool that abstains
                    author = 0
                elif written[-1] in self._ends(author):
                    new, values, whole = [self._end_id], [sum(logprobs)], True
                else:
                    text = answer + self._spell(author, written)
                    every = self._ids(0, text)[len(ids) :]
                    allowed = [n for n in range(2, len(every) + 1) if self.policy.allows(len(tokens), deferred, n)]
                    new, whole = every[: max(allowed, default=1)], max(allowed, default=1) == len(every)
                    values = [sum(logprobs) + log_end] + [0.0] * (len(new) - 1)
                deferred += len(new)
            writers = [author] * len(new)
            if not whole:  # the base writes, or continues what was cut
                written, logprobs, log_end = self._segment(0, answer, new)
                writers += [0] * (len(written) - len(new))
                deferred += asked and not new
                new, text, values = (
                    written,
                    answer + (self.alignment.tokenizers[0].spell(written) or b""),
                    values + logprobs,
                )
            values[0] += ended
            ended = 0.0 if whole else log_end
            for token, writer, value in zip(new, writers, values, strict=True):
                tokens.append(token)
                authors.append(writer)
                self.logprobs.append(value)
                if len(tokens) == self.params.max_tokens or token in self._ends(0):
                    return tokens, authors, answer if token in self._ends(0) else text
            answer = text

    def _segment(self, author: int, answer: bytes, begun: list[int]) -> tuple[list[int], list[float], float]:
        """What the author writes up to the next boundary, its log-probabilities, and log P that a segment begins there.

        `begun` are tokens that it continues.
        """
        ids, written, logprobs = self._ids(author, answer), list(begun), list[float]()
        while not (written and written[-1] in self._ends(author)) and len(written) <= self.params.max_tokens:
            text = answer + self._spell(author, written)
            row = self.alignment.row(text)
            if written:
                token, logprob, log_start = self._token(author, [*ids, *written], ANYTHING, row, len(text))
            else:
                token, logprob, log_start = self._token(author, ids, row, row, len(text))
            if token is None:
                return written, logprobs, 0.0
            if written and self.alignment.is_opening(author, row, token):
                return written, logprobs, log_start
            written.append(token)
            logprobs.append(logprob)
        return written, logprobs, 0.0

    def _token(self, author: int, ids: list[int], allowed: int, row: int, at: int) -> tuple[int | None, float, float]:
        """A token that the row `allowed` allows, its log-probability, and log P that a segment begins in `row`.

        None where a tool abstains.
        """
        model = self.models[author]
        if not isinstance(model, ToolModel):
            raw = self._read(author, ids)[1]
        elif (said := model.next_token(TokenText(model.tokenizer, ids), len(ids), {})) is None:
            return None, 0.0, 0.0
        else:
            raw = model.logits([said])
        follows, opens = (self.alignment.opening_mask(author, one, raw.device) for one in (allowed, row))
        law = raw[0].masked_fill(~follows, -torch.inf).log_softmax(-1)
        logits = _processed(raw, self.params, self.prompts[author], ids, min(self._ends(author)), None)[0]
        logits = logits.masked_fill(~follows, -torch.inf)
        if isinstance(model, ToolModel) and logits.argmax() != raw.argmax():
            return None, 0.0, 0.0
        if not self.params.temperature:
            token = int(logits.argmax())
        else:
            params = self.params
            probs = token_probs(logits[None], params.temperature, params.top_p, params.top_k, params.min_p)
            uniform = random.Random(f"{self._seed} {at} {allowed == row}").random()
            token = int(sample(probs, torch.tensor([uniform], dtype=torch.float64)))
        ends = sorted(self._ends(author))
        logprob = law[ends].logsumexp(-1) if token in ends else law[token]
        return token, float(logprob), float(law[opens].logsumexp(-1))

    def _read(self, author: int, ids: list[int]) -> tuple[Tensor, Tensor]:
        out = self.models[author](torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1][:, -1], out.logits[:, -1].float()

    def _ids(self, author: int, answer: bytes) -> list[int]:
        encoded = self.alignment.tokenizers[author].encode_after(self.prompts[author], answer.decode())
        assert encoded is not None
        return [*self.prompts[author], *encoded.ids]

    def _spell(self, author: int, token_ids: list[int]) -> bytes:
        spelled = self.alignment.tokenizers[author].spell(token_ids)
        assert spelled is not None
        return spelled

    def _ends(self, author: int) -> frozenset[int]:
        return self.alignment.tokenizers[author].eos_ids

    @property
    def _end_id(self) -> int:
        """The base's token for the end of a text that an assistant ends."""
        own = self.alignment.tokenizers[0].tokenizer.eos_token_id
        return own if own in self._ends(0) else min(self._ends(0))
