"""Tokens as OpenAI's two kinds of answers, whole and in chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from collm.core.types import TokenStep, deferral_rate
from collm.serving.spelling import Speller

Json = dict[str, Any]

_FINISHED = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass
class Part:
    """Tokens of one completion: all of them, or those of a chunk."""

    index: int
    steps: list[TokenStep] = field(default_factory=list)
    finish_reason: str | None = None
    first: bool = True

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def finished(self) -> str | None:
        """The finish reason in OpenAI's words."""
        return _FINISHED[self.finish_reason] if self.finish_reason else None

    @property
    def authorship(self) -> Json:
        return {
            "texts": [step.text for step in self.steps],
            "token_ids": [step.token_id for step in self.steps],
            "authors": [step.author for step in self.steps],
            "defer_probs": [step.defer_prob for step in self.steps],
            "stood_in": [step.stood_in for step in self.steps],
        }


class Shape:
    """Writes one request's answer.

    Args:
        model: as the client named it.
        author_names: the base's first.
        spellers: of each completion, where log-probabilities are wanted.
    """

    prefix: str
    whole: str
    chunk: str

    def __init__(self, model: str, author_names: Sequence[str], spellers: Sequence[Speller] | None) -> None:
        self.author_names = author_names
        self._spellers = spellers
        identity = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._head = {**identity, "collm": {"author_names": list(author_names)}}

    def reply(self, parts: Sequence[Part], usage: Json) -> bytes:
        """The whole answer."""
        choices = [self.choice(part) for part in parts]
        return _encoded({**self._head, "object": self.whole, "choices": choices, "usage": usage})

    def event(self, part: Part, *, usage: bool) -> bytes:
        """A chunk of a stream; `usage` tells clients that the last will say it."""
        body = {**self._head, "object": self.chunk, "choices": [self.chunk_choice(part)]}
        return sse({**body, "usage": None} if usage else body)

    def usage_event(self, usage: Json) -> bytes:
        """The last chunk of a stream with usage."""
        return sse({**self._head, "object": self.chunk, "choices": [], "usage": usage})

    def choice(self, part: Part) -> Json:
        raise NotImplementedError

    def chunk_choice(self, part: Part) -> Json:
        raise NotImplementedError

    def _speller(self, part: Part) -> Speller | None:
        return self._spellers[part.index] if self._spellers else None


class CompletionShape(Shape):
    """/v1/completions.

    Args:
        echoed: of each completion, the prompt that its text begins with.
    """

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        model: str,
        author_names: Sequence[str],
        spellers: Sequence[Speller] | None,
        echoed: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, author_names, spellers)
        self._echoed = echoed

    def choice(self, part: Part) -> Json:
        speller = self._speller(part)
        echo = self._echoed[part.index] if self._echoed and part.first else ""
        return {
            "index": part.index,
            "text": echo + part.text,
            "logprobs": speller.completion_logprobs(part.steps) if speller else None,
            "finish_reason": part.finished,
            "collm": part.authorship,
        }

    def chunk_choice(self, part: Part) -> Json:
        return self.choice(part)


class ChatShape(Shape):
    """/v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, part: Part) -> Json:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"index": part.index, "message": message, **self._rest(part)}

    def chunk_choice(self, part: Part) -> Json:
        role = {"role": "assistant"} if part.first else {}
        return {"index": part.index, "delta": {**role, "content": part.text}, **self._rest(part)}

    def _rest(self, part: Part) -> Json:
        speller = self._speller(part)
        return {
            "logprobs": {"content": speller.chat_logprobs(part.steps), "refusal": None} if speller else None,
            "finish_reason": part.finished,
            "collm": part.authorship,
        }


def usage_of(prompt_tokens: int, authors: Sequence[int], author_names: Sequence[str]) -> Json:
    """Tokens read and written, and by whom."""
    by_author = {name: authors.count(author) for author, name in enumerate(author_names)}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(authors),
        "total_tokens": prompt_tokens + len(authors),
        "collm": {**by_author, "deferral_rate": deferral_rate(authors)},
    }


DONE = b"data: [DONE]\n\n"


def sse(body: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + _encoded(body) + b"\n\n"


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def _encoded(body: Mapping[str, Any]) -> bytes:
    return _ENCODER.encode(body).encode()
