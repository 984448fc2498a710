"""Answer a parsed request, whole or as a stream: encode and score prompts, submit completions, write the response."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from collm.core.types import PromptLogprob
from collm.engine.request import Request as EngineRequest
from collm.serving.collaborations import Target
from collm.serving.errors import APIError, broken
from collm.serving.parsing import ParsedRequest
from collm.serving.request_log import Record
from collm.serving.schemas import Asked
from collm.serving.service import Service
from collm.serving.shapes import Extras, Json, Part, Shape, usage_of
from collm.serving.token_texts import TokenTexts, spelled_prompt
from collm.serving.worker import Submission, TokenOutput

_LOG = logging.getLogger(__name__)
_HEAD_S = 1.0
"""Longest wait for the first token before the head of a stream is sent, because proxies end silent requests."""
_COMMENT_S = 5.0
"""Longest silence of a stream."""
_COMMENT = b": nothing new\n\n"

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
        return _unwritten(shape, requests, stream=bool(body.stream))
    record: Record = http.scope["collm.record"]
    record.submission = submission = target.served.worker.submit(requests)
    if body.stream:
        return EventStream(submission, shape, record, await _outputs(submission, record, _HEAD_S))
    parts = [Part(index) for index in range(len(requests))]
    while outputs := await _outputs(submission, record):
        for one in outputs:
            parts[one.index].steps.append(one.step)
            parts[one.index].finish_reason = one.finish_reason
    return Response(shape.reply(parts, _usage(requests, record, shape)), media_type="application/json")


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


def _unwritten(shape: Shape, requests: Sequence[EngineRequest], *, stream: bool) -> Response:
    """The response to a request that generates nothing."""
    parts = [Part(index, finish_reason="length") for index in range(len(requests))]
    usage = usage_of(_prompt_tokens(requests), [], shape.author_names)
    if not stream:
        return Response(shape.reply(parts, usage), media_type="application/json")
    events = shape.begin() + b"".join(shape.event(part, None) for part in parts) + shape.end(usage)
    return Response(events, media_type=EventStream.media_type)


async def _outputs(
    submission: Submission, record: Record, seconds: float | None = None
) -> Sequence[TokenOutput] | None:
    """The next outputs, as `Submission.outputs` says. They are noted in the record."""
    outputs = await submission.outputs(seconds)
    if outputs:
        record.wrote([one.step.author for one in outputs])
    return outputs


def _usage(requests: Sequence[EngineRequest], record: Record, shape: Shape) -> Json:
    return usage_of(_prompt_tokens(requests), record.authors, shape.author_names)


def _prompt_tokens(requests: Sequence[EngineRequest]) -> int:
    """Number of tokens of all prompts. A prompt with several completions counts once."""
    return sum({id(request.prompt_ids): len(request.prompt_ids) for request in requests}.values())


class EventStream(Response):
    """Server-sent events of a response.

    Args:
        submission: the submitted requests.
        shape: writes the events.
        record: record of the HTTP request.
        first: the first outputs; None if there are none yet.
    """

    media_type = "text/event-stream"

    def __init__(
        self, submission: Submission, shape: Shape, record: Record, first: Sequence[TokenOutput] | None
    ) -> None:
        self._submission = submission
        self._shape = shape
        self._record = record
        self._first = first
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._record.last_event = self._shape.broken_off
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        """All events, and comments while nothing comes. An error is the last event."""
        outputs, begun = self._first, set[int]()
        try:
            start = self._shape.begin()
            while outputs is None or outputs:
                asked = self._shape.extras.usage_so_far
                usage = _usage(self._submission.requests, self._record, self._shape) if asked else None
                events = b"".join(self._shape.event(part, usage) for part in _parts(outputs or (), begun))
                yield start + (events or _COMMENT)
                start = b""
                outputs = await _outputs(self._submission, self._record, _COMMENT_S)
            yield start + self._shape.end(_usage(self._submission.requests, self._record, self._shape))
        except APIError as error:
            self._record.status = error.status
            yield self._shape.broken_off(error)
        except Exception:
            _LOG.exception("request %s failed", self._record.id)
            self._record.status = 500
            yield self._shape.broken_off(broken())


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
