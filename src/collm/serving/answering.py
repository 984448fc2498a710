"""Answer a parsed request, whole or as a stream: encode and score prompts, submit completions, write the response."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from collm.core.types import PromptLogprob
from collm.decoding.request import Request as EngineRequest
from collm.serving.collaborations import Target
from collm.serving.errors import APIError, broken
from collm.serving.parsing import ParsedRequest
from collm.serving.request_log import Record
from collm.serving.schemas import Asked
from collm.serving.service import Service
from collm.serving.shapes import Extras, Json, Part, Shape, usage_of
from collm.serving.token_texts import TokenTexts, spelled_prompt
from collm.serving.worker import Submission, TokenOutput

Scored = list[PromptLogprob | None]


async def answer(
    http: Request,
    service: Service,
    target: Target,
    reading: ParsedRequest,
    body: Asked,
    make_shape: Callable[[str, Sequence[str], Extras], Shape],
) -> Response:
    """Answer a request, whole or as a stream.

    Args:
        make_shape: creates the shape of the response from the model's name, the authors' names and the extras.

    Raises:
        APIError: an invalid prompt or parameter, a full queue, or a failure before the first token.
    """
    longest = service.settings.max_prompt_tokens

    def prepared() -> list[EngineRequest]:
        target.check_params(reading.params, _form_of(body, reading))
        return reading.requests(lambda prompt, param, last: target.encode(prompt, param, longest, last))

    requests = await service.in_thread(prepared)
    scored = await _scored(target, requests, reading) if reading.scored is not None else None
    extras = await service.in_thread(partial(_extras, target, requests, reading, scored, body))
    shape = make_shape(target.name, target.served.author_names, extras)
    if not reading.generates:
        parts = [Part(index, finish_reason="length") for index in range(len(requests))]
        return unwritten(shape, parts, prompt_tokens(requests), stream=bool(body.stream))
    submission = target.served.worker.submit(requests)
    running = Answer(submission, shape, http.scope["collm.record"])
    return await (running.stream() if body.stream else running.whole())


def _form_of(body: Asked, reading: ParsedRequest) -> str:
    """The parameter with the structured output."""
    if reading.calls is not None and reading.calls.constraint is not None:
        return "tools"
    return "response_format" if body.structured_outputs is None else "structured_outputs"


async def _scored(target: Target, requests: Sequence[EngineRequest], reading: ParsedRequest) -> list[Scored]:
    """The log-probabilities of each completion's prompt. Prompts are scored one by one."""
    model, found = target.served.model, dict[int, Scored]()
    for one in requests:
        if id(one.prompt_ids) not in found:
            chunks = model.prompt_logprobs_in_chunks(one.prompt_ids, reading.scored or 0, policy=one.policy)
            found[id(one.prompt_ids)] = await target.served.worker.collect(chunks)
    return [found[id(one.prompt_ids)] for one in requests]


def _extras(
    target: Target, requests: Sequence[EngineRequest], reading: ParsedRequest, scored: list[Scored] | None, body: Asked
) -> Extras:
    tokenizer, options = target.served.model.tokenizer, body.stream_options
    usage = bool(options and options.include_usage)
    extras = Extras(include_usage=usage, usage_so_far=usage and bool(options and options.continuous_usage_stats))
    of_each: Sequence[Scored | None] = scored if scored is not None else [None] * len(requests)
    if reading.logprobs:
        extras.spellers = [
            TokenTexts(
                tokenizer,
                one.prompt_ids,
                reading.params.logprobs,
                of_prompt if reading.echo else None,
                as_ids=bool(body.return_tokens_as_token_ids),
            )
            for one, of_prompt in zip(requests, of_each, strict=True)
        ]
    if reading.echo:
        texts = [target.text_of(prompt) for prompt in reading.prompts]
        extras.echoed = [text for text in texts for _ in range(reading.n)]
    most = reading.params.prompt_logprobs
    if scored is not None and most is not None:
        extras.prompt_logprobs = [spelled_prompt(tokenizer, of_prompt, most) for of_prompt in scored]
    return extras


_LOG = logging.getLogger(__name__)
_HEAD_S = 1.0
"""Longest wait for the first token before the head of a stream is sent, because proxies end silent requests."""
_COMMENT_S = 5.0
"""Longest silence of a stream."""
_COMMENT = b": nothing new\n\n"


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
        """The response as a stream. An error within the first second is an HTTP error."""
        return EventStream(self, await self._outputs(_HEAD_S))

    async def events(self, outputs: Sequence[TokenOutput] | None) -> AsyncIterator[bytes]:
        """All events of the stream, and comments while nothing comes. An error is the last event."""
        begun: set[int] = set()
        try:
            start = self.shape.begin()
            while outputs is None or outputs:
                parts = _parts(outputs or (), begun)
                usage = self._usage()
                yield start + (b"".join(self.shape.event(part, usage) for part in parts) or _COMMENT)
                start = b""
                outputs = await self._outputs(_COMMENT_S)
            yield start + self.shape.end(self._usage())
        except APIError as error:
            self.record.status = error.status
            yield self.shape.broken_off(error)
        except Exception:
            _LOG.exception("request %s failed", self.record.id)
            self.record.status = 500
            yield self.shape.broken_off(broken())

    async def _outputs(self, seconds: float | None = None) -> list[TokenOutput] | None:
        outputs = await self._submission.outputs(seconds)
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
    events = shape.begin() + b"".join(shape.event(part, usage) for part in parts) + shape.end(usage)
    return Response(events, media_type=EventStream.media_type)


def prompt_tokens(requests: Sequence[EngineRequest]) -> int:
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

    def __init__(self, answer: Answer, first: Sequence[TokenOutput] | None) -> None:
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
