"""Answer a parsed request: encode and score prompts, submit completions, write the response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from collm.core.types import PromptLogprob
from collm.decoding.request import Request as EngineRequest
from collm.errors import CollmError
from collm.serving.collaborations import Target
from collm.serving.errors import of_failure
from collm.serving.parsing import ParsedRequest
from collm.serving.schemas import Asked
from collm.serving.service import Service
from collm.serving.shapes import Extras, Part, Shape
from collm.serving.streaming import Answer, prompt_tokens, unwritten
from collm.serving.token_texts import TokenTexts, spelled_prompt

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
    usage = bool(body.stream_options and body.stream_options.include_usage)
    extras = await service.in_thread(partial(_extras, target, requests, reading, scored, usage))
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
            try:
                found[id(one.prompt_ids)] = await target.served.worker.collect(chunks)
            except CollmError as error:
                raise of_failure(error, target.served.name) from error
    return [found[id(one.prompt_ids)] for one in requests]


def _extras(
    target: Target, requests: Sequence[EngineRequest], reading: ParsedRequest, scored: list[Scored] | None, usage: bool
) -> Extras:
    tokenizer, extras = target.served.model.tokenizer, Extras(include_usage=usage)
    of_each: Sequence[Scored | None] = scored if scored is not None else [None] * len(requests)
    if reading.logprobs:
        extras.spellers = [
            TokenTexts(tokenizer, one.prompt_ids, reading.params.logprobs, of_prompt if reading.echo else None)
            for one, of_prompt in zip(requests, of_each, strict=True)
        ]
    if reading.echo:
        texts = [target.text_of(prompt) for prompt in reading.prompts]
        extras.echoed = [text for text in texts for _ in range(reading.n)]
    most = reading.params.prompt_logprobs
    if scored is not None and most is not None:
        extras.prompt_logprobs = [spelled_prompt(tokenizer, of_prompt, most) for of_prompt in scored]
    return extras
