"""Decoding over different tokenizers as the law says it: every model reads the whole text again for every token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from collm import DeferralHead, SamplingParams
from collm.core.head import author_logprobs, defer_probs
from collm.core.policies import Policy, StepView
from collm.core.sampling import sample, token_probs
from collm.models.tools import ToolModel
from collm.text.alignment import ANYTHING, Alignment
from collm.text.token_text import TokenText
from tests.engine.slow import _processed


@dataclass
class SlowSegments:
    """Decodes one prompt."""

    models: Sequence[PreTrainedModel | ToolModel]
    alignment: Alignment
    head: DeferralHead
    prompts: Sequence[list[int]]
    policy: Policy
    params: SamplingParams

    @torch.no_grad()
    def run(self) -> tuple[list[int], list[int], bytes]:
        """The base's tokens, their authors, and the text."""
        rng = random.Random(self.params.seed)
        self._seed = rng.getrandbits(64)
        uniforms: list[tuple[float, float]] = []
        tokens, authors, answer, kept = list[int](), list[int](), b"", None
        deferred = 0
        while True:
            ids = self._ids(0, answer)
            hidden, _ = self._read(0, ids)
            u = self.head(hidden)
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
            author = self.policy.author(view)
            written, following = self._segment(author, answer, kept[1] if kept and kept[0] == author else None)
            if author != 0:
                deferred += 1
            if not written:  # a tool that abstains
                author = 0
                written, following = self._segment(author, answer, kept[1] if kept and kept[0] == author else None)
            if written == [self._eos(author)]:
                new, text = [self._eos(0)], answer
            else:
                text = answer + self._spell(author, answer, written)
                new = written if author == 0 else self._ids(0, text)[len(ids) :]
                deferred += (len(new) - 1) * (author != 0)
            for token in new:
                tokens.append(token)
                authors.append(author)
                if len(tokens) == self.params.max_new_tokens or token == self._eos(0):
                    return tokens, authors, text
            canonical = self._ids(author, text) == [*self._ids(author, answer), *written]
            kept = (author, following) if canonical else None
            answer = text

    def _segment(self, author: int, answer: bytes, first: int | None) -> tuple[list[int], int | None]:
        """What the author writes from a boundary to the next, and what it would go on with."""
        row, ids = self.alignment.row(answer), self._ids(author, answer)
        token = first if first is not None else self._token(author, ids, row, len(answer), opening=True)
        if token is None:
            return [], None
        written = [token]
        while written[-1] != self._eos(author) and len(written) <= self.params.max_new_tokens:
            text = answer + self._spell(author, answer, written)
            token = self._token(author, [*ids, *written], ANYTHING, len(text), opening=False)
            if token is None or self.alignment.is_opening(author, self.alignment.row(text), token):
                return written, token
            written.append(token)
        return written, None

    def _token(self, author: int, ids: list[int], row: int, at: int, *, opening: bool) -> int | None:
        """None where a tool abstains."""
        model = self.models[author]
        if not isinstance(model, ToolModel):
            raw = self._read(author, ids)[1]
        elif (said := model.next_token(TokenText(model.tokenizer, ids), len(ids), {})) is None:
            return None
        else:
            raw = model.logits([said])
        logits = _processed(raw, self.params, self.prompts[author], ids, self._eos(author), None)[0]
        logits = logits.masked_fill(~self.alignment.opening_mask(author, row, logits.device), -torch.inf)
        if isinstance(model, ToolModel) and logits.argmax() != raw.argmax():
            return None
        if not self.params.temperature:
            return int(logits.argmax())
        params = self.params
        probs = token_probs(logits[None], params.temperature, params.top_p, params.top_k, params.min_p)
        uniform = random.Random(f"{self._seed} {at} {opening}").random()
        return int(sample(probs, torch.tensor([uniform], dtype=torch.float64)))

    def _read(self, author: int, ids: list[int]) -> tuple[Tensor, Tensor]:
        out = self.models[author](torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1][:, -1], out.logits[:, -1].float()

    def _ids(self, author: int, answer: bytes) -> list[int]:
        encoded = self.alignment.tokenizers[author].encode_after(self.prompts[author], answer.decode())
        assert encoded is not None
        return [*self.prompts[author], *encoded.ids]

    def _spell(self, author: int, answer: bytes, token_ids: list[int]) -> bytes:
        spelled = self.alignment.tokenizers[author].spell(token_ids)
        assert spelled is not None
        return spelled

    def _eos(self, author: int) -> int:
        (eos,) = self.alignment.tokenizers[author].eos_ids
        return eos
