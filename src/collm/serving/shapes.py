"""Responses of OpenAI's API, whole and in chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from collm.core.types import PromptLogprob, TokenStep, TopLogprobs, deferral_rate
from collm.engine.request import Request
from collm.serving.errors import APIError
from collm.serving.parsing import ParsedRequest
from collm.serving.service import Target
from collm.serving.worker import Part
from collm.text.token_text import CONTEXT_TOKENS, TokenText
from collm.text.tool_calls import Delta, ToolCallReader

Json = dict[str, Any]
Scored = list[PromptLogprob | None]


class Shape:
    """Writes the response to a request, whole (`reply`) or as a stream (`begin`, `event`, `end`).

    There is one of `requests` for each completion. `scored` are log-probabilities of each prompt, if they are needed.
    """

    prefix: str
    whole: str
    chunk: str

    def __init__(
        self, target: Target, parsed: ParsedRequest, requests: Sequence[Request], scored: Sequence[Scored]
    ) -> None:
        tokenizer, params, options, n = target.model.tokenizer, parsed.params, parsed.body.stream_options, parsed.n
        self.author_names = target.model.author_names
        self._head: Json = {
            "id": f"{self.prefix}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": target.name,
            "collm": {"author_names": list(self.author_names)},
        }
        self._calls = calls = parsed.calls
        names = {tool["function"]["name"] for tool in calls.shown} if calls else None
        self._readers = [ToolCallReader(calls.written, names) for _ in requests] if calls else []
        self._prompt_tokens = sum(len(one.prompt_ids) for one in requests[::n])
        self._include_usage = bool(options and options.include_usage)
        self._usage_so_far = self._include_usage and bool(options and options.continuous_usage_stats)
        as_ids = bool(parsed.body.return_tokens_as_token_ids)
        self._token_texts = [
            TokenTexts(tokenizer, one.prompt_ids, params.logprobs, scored[i // n] if parsed.echo else None, as_ids)
            for i, one in enumerate(requests)
            if parsed.logprobs
        ]
        most = params.prompt_logprobs
        echoed = [
            prompt if isinstance(prompt, str) else target.detokenize(cast("list[int]", prompt), special=False)
            for prompt in parsed.prompts
            if parsed.echo
        ]
        listed = [] if most is None else [named_prompt(tokenizer, one, most) for one in scored]
        self._echoed = {i: echoed[i // n] for i in range(len(requests)) if echoed}
        self._prompt_logprobs = {i: listed[i // n] for i in range(len(requests)) if listed}

    def reply(self, parts: Sequence[Part], authors: Sequence[int]) -> bytes:
        """The whole response. `authors` wrote its tokens."""
        choices = [self.choice(part, streamed=False) for part in parts]
        return encoded({**self._head, "object": self.whole, "choices": choices, "usage": self.usage(authors)})

    def begin(self) -> bytes:
        return b""

    def event(self, part: Part, authors: Sequence[int]) -> bytes:
        """A chunk of a stream. `authors` wrote the tokens so far."""
        body = {**self._head, "object": self.chunk, "choices": [self.choice(part, streamed=True)]}
        if self._include_usage:
            body["usage"] = self.usage(authors) if self._usage_so_far else None
        return sse(body)

    def end(self, authors: Sequence[int]) -> bytes:
        done = b"data: [DONE]\n\n"
        if not self._include_usage:
            return done
        return sse({**self._head, "object": self.chunk, "choices": [], "usage": self.usage(authors)}) + done

    def broken_off(self, error: APIError) -> bytes:
        """The end of a failed stream."""
        return sse(error.content)

    def choice(self, part: Part, *, streamed: bool) -> Json:
        """A completion, or what a chunk adds to it."""
        raise NotImplementedError

    def deltas(self, part: Part) -> list[Delta]:
        """The text and the tool calls of a part."""
        if self._calls is None:
            return [Delta(part.text)] if part.text else []
        reader, markers, deltas = self._readers[part.index], self._calls.markers, list[Delta]()
        for step in part.steps:
            deltas += reader.push(step.text or markers.get(step.token_id, ""))
        deltas += reader.finish() if part.finish_reason else []
        return [one for one in deltas if self._calls.parallel or not one.index]

    def usage(self, authors: Sequence[int]) -> Json:
        """Numbers of tokens, also by author."""
        by_author = {name: authors.count(author) for author, name in enumerate(self.author_names)}
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": len(authors),
            "total_tokens": self._prompt_tokens + len(authors),
            "collm": {**by_author, "deferral_rate": deferral_rate(authors)},
        }


class CompletionShape(Shape):
    """/v1/completions."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def choice(self, part: Part, *, streamed: bool) -> Json:
        index, texts = part.index, self._token_texts
        scored = {"prompt_logprobs": self._prompt_logprobs.pop(index)} if index in self._prompt_logprobs else {}
        return {
            "index": index,
            "text": self._echoed.pop(index, "") + part.text,
            "logprobs": texts[index].completion_logprobs(part.steps) if texts else None,
            "finish_reason": part.finish_reason,
            **scored,
            "collm": authorship(part.steps),
        }


class ChatShape(Shape):
    """/v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._begun: set[int] = set()

    def reply(self, parts: Sequence[Part], authors: Sequence[int]) -> bytes:
        if self._prompt_logprobs:
            self._head["prompt_logprobs"] = self._prompt_logprobs[0]
        return super().reply(parts, authors)

    def choice(self, part: Part, *, streamed: bool) -> Json:
        index, texts, deltas = part.index, self._token_texts, self.deltas(part)
        content = "".join(one.text for one in deltas if one.index is None)
        called = bool(self._readers and self._readers[index].count)
        message: Json = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        if streamed:
            message |= {"content": content} if content or not called else {}
            calls = [{"index": one.index, **_call(one)} for one in deltas if one.index is not None]
        else:
            message |= {"content": content or (None if called else ""), "refusal": None}
            calls = [_call(one) for one in deltas if one.name]
            for one in deltas:
                if one.index is not None:
                    calls[one.index]["function"]["arguments"] += one.text
        message |= {"tool_calls": calls} if calls else {}
        return {
            "index": index,
            "delta" if streamed else "message": message,
            "logprobs": {"content": texts[index].chat_logprobs(part.steps), "refusal": None} if texts else None,
            "finish_reason": "tool_calls" if called and part.finish_reason == "stop" else part.finish_reason,
            "collm": authorship(part.steps),
        }


def _call(delta: Delta) -> Json:
    if delta.name:
        return {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
    return {"function": {"arguments": delta.text}}


class TokenTexts:
    """Names the tokens of a completion and up to `most` alternatives of each, step by step.

    `scored` are log-probabilities of the prompt, if the text begins with it. `as_ids` names tokens by id, as in vLLM.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int],
        most: int,
        scored: Sequence[PromptLogprob | None] | None,
        as_ids: bool,
    ) -> None:
        self._read = TokenText(tokenizer, () if scored is not None else prompt_ids[-CONTEXT_TOKENS:])
        self._start = len(self._read.text)
        self._most = most
        self._as_ids = as_ids
        tokens = zip(prompt_ids, scored, strict=True) if scored is not None else ()
        self._prompt: list[tuple[int, float | None, TopLogprobs]] = [
            (token_id, one.logprob if one else None, one.top if one else ()) for token_id, one in tokens
        ]

    def completion_logprobs(self, steps: Sequence[TokenStep]) -> dict[str, Any]:
        """`logprobs` of /v1/completions, with offsets into the text. The chosen token is always listed."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        prompt, self._prompt = self._prompt, []
        for token_id, logprob, top in [*prompt, *((step.token_id, step.logprob, step.top_logprobs) for step in steps)]:
            token = self._name(token_id)
            likely: dict[str, float] = {}
            for one, value in top[: self._most]:
                likely.setdefault(self._name(one), value)
            found["text_offset"].append(len(self._read.text) - self._start)
            found["tokens"].append(token)
            found["token_logprobs"].append(logprob)
            found["top_logprobs"].append(None if logprob is None else likely | {token: logprob})
            self._read.push(token_id)
        return found if self._most else {**found, "top_logprobs": None}

    def chat_logprobs(self, steps: Sequence[TokenStep]) -> list[dict[str, Any]]:
        """`logprobs.content` of /v1/chat/completions."""
        found = []
        for step in steps:
            likely = [self._entry(*one) for one in step.top_logprobs[: self._most]]
            found.append({**self._entry(step.token_id, step.logprob), "top_logprobs": likely})
            self._read.push(step.token_id)
        return found

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._read.spelling(token_id)

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._read.added(token_id)
        token = text if text and not self._as_ids else self._name(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(text.encode()) if text else None}


def named_prompt(
    tokenizer: PreTrainedTokenizerBase, scored: Sequence[PromptLogprob | None], most: int
) -> list[dict[str, dict[str, Any]] | None]:
    """`prompt_logprobs` of vLLM: for each token its own entry and the most probable tokens, by token id."""
    read = TokenText(tokenizer)
    found: list[dict[str, dict[str, Any]] | None] = []
    for one in scored:
        if one is None:
            found.append(None)
            continue
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(one.top[:most], start=1)]
        entries: dict[str, dict[str, Any]] = {}
        for token_id, logprob, rank in dict.fromkeys([*ranked, (one.token_id, one.logprob, one.rank)]):
            entries[str(token_id)] = {"logprob": logprob, "rank": rank, "decoded_token": read.spelling(token_id)}
        found.append(entries)
        read.push(one.token_id)
    return found


def authorship(steps: Sequence[TokenStep]) -> Json:
    """Who wrote which token."""
    return {
        "texts": [step.text for step in steps],
        "token_ids": [step.token_id for step in steps],
        "authors": [step.author for step in steps],
        "defer_probs": [step.defer_prob for step in steps],
        "stood_in": [step.stood_in for step in steps],
        "rejected": [step.rejected and step.rejected[1] for step in steps],
    }


def sse(body: Mapping[str, Any], event: str | None = None) -> bytes:
    """A server-sent event."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + encoded(body) + b"\n\n"


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def encoded(body: Mapping[str, Any]) -> bytes:
    return _ENCODER.encode(body).encode()
