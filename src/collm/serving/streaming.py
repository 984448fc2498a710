"""Respond to submitted requests, whole or as a stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from collm.decoding.request import Request
from collm.serving.errors import APIError, broken
from collm.serving.request_log import Record
from collm.serving.shapes import Json, Part, Shape, usage_of
from collm.serving.submission import Submission, TokenOutput

_LOG = logging.getLogger(__name__)


class Answer:
    """The response to a submission.

    Args:
        submission: the submitted requests.
        shape: writes the response.
        record: record of the HTTP request. With it, the submission ends.
    """

    def __init__(self, submission: Submission, shape: Shape, record: Record) -> None:
        self.shape = shape
        self.record = record
        self._submission = record.submission = submission
        self._authors: list[int] = []

    async def whole(self) -> Response:
        """The whole response."""
        parts = [Part(index) for index in range(len(self._submission.requests))]
        while outputs := await self._outputs():
            for one in outputs:
                parts[one.index].steps.append(one.step)
                parts[one.index].finish_reason = one.finish_reason
        return Response(self.shape.reply(parts, self._usage()), media_type="application/json")

    async def stream(self) -> Response:
        """The response as a stream. An error before the first token is an HTTP error."""
        return EventStream(self, await self._outputs())

    async def events(self, outputs: Sequence[TokenOutput]) -> AsyncIterator[bytes]:
        """All events of the stream. An error is the last event."""
        begun: set[int] = set()
        try:
            start = self.shape.begin()
            while outputs:
                parts = _parts(outputs, begun)
                yield start + b"".join(self.shape.event(part) for part in parts)
                start = b""
                outputs = await self._outputs()
            yield start + self.shape.end(self._usage())
        except APIError as error:
            self.record.status = error.status
            yield self.shape.broken_off(error)
        except Exception:
            _LOG.exception("request %s failed", self.record.id)
            self.record.status = 500
            yield self.shape.broken_off(broken())

    async def _outputs(self) -> list[TokenOutput]:
        outputs = await self._submission.outputs()
        if outputs:
            authors = [one.step.author for one in outputs]
            self._authors += authors
            self.record.wrote(authors)
        return outputs

    def _usage(self) -> Json:
        return usage_of(prompt_tokens(self._submission.requests), self._authors, self.shape.author_names)


def unwritten(shape: Shape, parts: Sequence[Part], read: int, *, stream: bool) -> Response:
    """The response to a request that generates nothing."""
    usage = usage_of(read, [], shape.author_names)
    if not stream:
        return Response(shape.reply(parts, usage), media_type="application/json")
    events = shape.begin() + b"".join(map(shape.event, parts)) + shape.end(usage)
    return Response(events, media_type=EventStream.media_type)


def prompt_tokens(requests: Sequence[Request]) -> int:
    """Number of tokens of all prompts. A prompt with several completions counts once."""
    read = {id(request.prompt_ids): len(request.prompt_ids) for request in requests}
    return sum(read.values())


def _parts(outputs: Sequence[TokenOutput], begun: set[int]) -> list[Part]:
    """One part for each completion with new tokens. `begun` are the completions with earlier parts."""
    parts: dict[int, Part] = {}
    for one in outputs:
        if one.index not in parts:
            parts[one.index] = Part(one.index, first=one.index not in begun)
            begun.add(one.index)
        parts[one.index].steps.append(one.step)
        parts[one.index].finish_reason = one.finish_reason
    return list(parts.values())


class EventStream(Response):
    """Server-sent events of a response."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, first: Sequence[TokenOutput]) -> None:
        self._answer = answer
        self._events = answer.events(first)
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._answer.record.last_event = self._answer.shape.broken_off
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
