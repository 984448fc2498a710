"""Responses of OpenAI's API, whole and in chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from collm.core.types import TokenStep, deferral_rate
from collm.serving.errors import APIError
from collm.serving.parsing import ToolChoice
from collm.serving.token_texts import TokenTexts
from collm.text.tool_calls import Delta, ToolCallReader

Json = dict[str, Any]

_FINISHED = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass
class Part:
    """Tokens of a completion: all, or those of a chunk."""

    index: int
    steps: list[TokenStep] = field(default_factory=list)
    finish_reason: str | None = None
    first: bool = True

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def finished(self) -> str | None:
        """OpenAI's finish reason."""
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


@dataclass
class Extras:
    """Optional parts of a response, with one entry for each completion. None if not requested.

    Attributes:
        spellers: the source of log-probabilities.
        echoed: the prompts that the texts begin with.
        prompt_logprobs: log-probabilities of the prompts, in vLLM's format.
        include_usage: whether the last chunk of a stream has the usage.
        usage_so_far: whether the other chunks have it too.
    """

    spellers: Sequence[TokenTexts] | None = None
    echoed: Sequence[str] | None = None
    prompt_logprobs: Sequence[Any] | None = None
    include_usage: bool = False
    usage_so_far: bool = False


class Shape:
    """Writes the response to a request.

    Args:
        model: the requested model.
        author_names: names of the authors, the base first.
        extras: optional parts.
    """

    prefix: str
    whole: str
    chunk: str

    def __init__(self, model: str, author_names: Sequence[str], extras: Extras) -> None:
        self.author_names = author_names
        self.extras = extras
        identity = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._head = {**identity, "collm": {"author_names": list(author_names)}}

    def reply(self, parts: Sequence[Part], usage: Json) -> bytes:
        """The whole response."""
        choices = [self.choice(part) for part in parts]
        return encoded({**self._head, "object": self.whole, "choices": choices, "usage": usage})

    def begin(self) -> bytes:
        """The beginning of a stream."""
        return b""

    def event(self, part: Part, usage: Json | None) -> bytes:
        """A chunk of a stream. `usage` is that so far, if it was requested."""
        body = {**self._head, "object": self.chunk, "choices": [self.chunk_choice(part)]}
        if self.extras.include_usage:
            body["usage"] = usage
        return sse(body)

    def end(self, usage: Json) -> bytes:
        """The end of a stream."""
        if not self.extras.include_usage:
            return DONE
        return sse({**self._head, "object": self.chunk, "choices": [], "usage": usage}) + DONE

    def broken_off(self, error: APIError) -> bytes:
        """The end of a failed stream."""
        return sse(error.content)

    def choice(self, part: Part) -> Json:
        raise NotImplementedError

    def chunk_choice(self, part: Part) -> Json:
        raise NotImplementedError

    def _speller(self, part: Part) -> TokenTexts | None:
        return self.extras.spellers[part.index] if self.extras.spellers else None


class CompletionShape(Shape):
    """/v1/completions."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def choice(self, part: Part) -> Json:
        speller, echoed, scored = self._speller(part), self.extras.echoed, self.extras.prompt_logprobs
        prompt = echoed[part.index] if echoed and part.first else ""
        of_prompt = {"prompt_logprobs": scored[part.index]} if scored and part.first else {}
        return {
            "index": part.index,
            "text": prompt + part.text,
            "logprobs": speller.completion_logprobs(part.steps) if speller else None,
            "finish_reason": part.finished,
            **of_prompt,
            "collm": part.authorship,
        }

    def chunk_choice(self, part: Part) -> Json:
        return self.choice(part)


class ChatShape(Shape):
    """/v1/chat/completions.

    Args:
        calls: the tools that can be called.
    """

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: str, author_names: Sequence[str], extras: Extras, calls: ToolChoice | None = None
    ) -> None:
        super().__init__(model, author_names, extras)
        self._calls = calls
        self._messages: dict[int, AssistantMessage] = {}

    def reply(self, parts: Sequence[Part], usage: Json) -> bytes:
        choices = [self.choice(part) for part in parts]
        of_prompt = {"prompt_logprobs": self.extras.prompt_logprobs[0]} if self.extras.prompt_logprobs else {}
        return encoded({**self._head, "object": self.whole, "choices": choices, "usage": usage, **of_prompt})

    def choice(self, part: Part) -> Json:
        said = self._message(part)
        said.add(part)
        message: Json = {"role": "assistant", "content": said.content or (None if said.calls else ""), "refusal": None}
        if said.calls:
            message["tool_calls"] = [_call(call) for call in said.calls]
        return {"index": part.index, "message": message, **self._rest(part, said)}

    def chunk_choice(self, part: Part) -> Json:
        said = self._message(part)
        deltas = said.add(part)
        delta: Json = {"role": "assistant"} if part.first else {}
        content = "".join(one.text for one in deltas if one.index is None)
        if content or not said.calls:
            delta["content"] = content
        calls = [_call_delta(one) for one in deltas if one.index is not None]
        if calls:
            delta["tool_calls"] = calls
        return {"index": part.index, "delta": delta, **self._rest(part, said)}

    def _message(self, part: Part) -> AssistantMessage:
        """The message of the completion that a part belongs to."""
        return self._messages.setdefault(part.index, AssistantMessage(self._calls))

    def _rest(self, part: Part, said: AssistantMessage) -> Json:
        speller = self._speller(part)
        finished = "tool_calls" if part.finished == "stop" and said.calls else part.finished
        return {
            "logprobs": {"content": speller.chat_logprobs(part.steps), "refusal": None} if speller else None,
            "finish_reason": finished,
            "collm": part.authorship,
        }


@dataclass
class Call:
    """A tool call so far. Its arguments are JSON text."""

    id: str
    name: str
    arguments: str = ""


class AssistantMessage:
    """A completion as a message: its text without tool calls, and its tool calls.

    Args:
        calls: the tools that can be called.
    """

    def __init__(self, calls: ToolChoice | None) -> None:
        self.content = ""
        self.calls: list[Call] = []
        self._choice = calls
        self._reader: ToolCallReader | None = calls.reader() if calls else None

    def add(self, part: Part) -> list[Delta]:
        """Add tokens. Return the new parts of the message."""
        deltas = self._read(part)
        if self._choice is not None and not self._choice.parallel:
            deltas = [one for one in deltas if not one.index]
        for one in deltas:
            if one.index is None:
                self.content += one.text
            elif one.name:
                self.calls.append(Call(one.id, one.name))
            else:
                self.calls[one.index].arguments += one.text
        return deltas

    def _read(self, part: Part) -> list[Delta]:
        if self._reader is None or self._choice is None:
            return [Delta(part.text)] if part.text else []
        deltas: list[Delta] = []
        for step in part.steps:
            deltas += self._reader.push(step.text or self._choice.markers.get(step.token_id, ""))
        return deltas + self._reader.finish() if part.finish_reason else deltas


def _call(call: Call) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_delta(delta: Delta) -> Json:
    if delta.name:
        return {"index": delta.index, **_call(Call(delta.id, delta.name))}
    return {"index": delta.index, "function": {"arguments": delta.text}}


def usage_of(prompt_tokens: int, authors: Sequence[int], author_names: Sequence[str]) -> Json:
    """Numbers of tokens, also by author."""
    by_author = {name: authors.count(author) for author, name in enumerate(author_names)}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(authors),
        "total_tokens": prompt_tokens + len(authors),
        "collm": {**by_author, "deferral_rate": deferral_rate(authors)},
    }


DONE = b"data: [DONE]\n\n"


def sse(body: Mapping[str, Any], event: str | None = None) -> bytes:
    """A server-sent event."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + encoded(body) + b"\n\n"


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def encoded(body: Mapping[str, Any]) -> bytes:
    """JSON."""
    return _ENCODER.encode(body).encode()
