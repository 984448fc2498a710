"""The server's routes, and how a completion, chat or response is answered, whole or as a stream."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Any, cast

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from collm.collaboration import CoLLM
from collm.engine.request import Request as EngineRequest
from collm.serving import schemas
from collm.serving.errors import APIError, broken, invalid, refuse
from collm.serving.middleware import Metrics, Record, RequestMiddleware
from collm.serving.parsing import ParsedRequest, as_chat, read_chat, read_completion, read_messages, tool_choice
from collm.serving.responses import ResponseShape, as_chat_request
from collm.serving.service import Service, Target
from collm.serving.settings import Settings
from collm.serving.shapes import ChatShape, CompletionShape, Scored, Shape
from collm.serving.worker import Submission
from collm.text.chats import Chat
from collm.text.template import Prompt
from collm.version import __version__

_LOG = logging.getLogger(__name__)
_HEAD_S = 1.0
"""Longest wait for the first token before the head of a stream is sent, because proxies end silent requests."""
_COMMENT_S = 5.0
"""Longest silence of a stream."""
_COMMENT = b": nothing new\n\n"
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "Client error, as OpenAI's error object"},
    "5XX": {"description": "Server error, as OpenAI's error object"},
}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The completions, as OpenAI's object",
        "content": {"text/event-stream": {"schema": {"type": "string", "description": "Chunks, with stream."}}},
    }
}

Body = schemas.Sampled | schemas.CandidatesRequest | schemas.TokenizeRequest | schemas.DetokenizeRequest

router = APIRouter(responses=_ERRORS)
_PAGE = files("collm.serving").joinpath("playground.html").read_text(encoding="utf-8")


def _hash_of(element: str) -> str:
    """The hash of the page's only <element>, for the content security policy."""
    [content] = re.findall(f"<{element}>(.*?)</{element}>", _PAGE, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


_PAGE_HEADERS = {
    # Only the page's own script and style can run, not text that a model writes into the page.
    "Content-Security-Policy": (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {_hash_of('script')}; "
        f"style-src {_hash_of('style')}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def playground() -> Response:
    """The playground. It needs no API key because it has no data of the models."""
    return Response(_PAGE, media_type="text/html", headers=_PAGE_HEADERS)


@router.post("/v1/completions", responses=_STREAMED)
async def completions(body: schemas.CompletionRequest, http: Request) -> Response:
    """Continue prompts."""
    target = _target(http, body, body.prompt)
    return await _answer(http, target, read_completion(body, target), CompletionShape)


@router.post("/v1/chat/completions", responses=_STREAMED)
async def chat_completions(body: schemas.ChatRequest, http: Request) -> Response:
    """Answer a chat."""
    target = _target(http, body, [message.model_dump(exclude_unset=True) for message in body.messages])
    return await _answer(http, target, read_chat(body, target), ChatShape)


@router.post("/v1/responses", responses=_STREAMED)
async def responses(body: schemas.ResponsesRequest, http: Request) -> Response:
    """Answer text or a conversation. Responses are not stored."""
    chat = as_chat_request(body)
    target = _target(http, body, body.input)
    return await _answer(http, target, read_chat(chat, target, "input"), partial(ResponseShape, body=body))


@router.post("/tokenize")
async def tokenize(body: schemas.TokenizeRequest, http: Request) -> Any:
    """Token ids of a prompt or of messages."""
    target = _target(http, body)
    _check_either(body)
    prompt: str | Chat = body.prompt or ""
    if body.messages is not None:
        prompt = as_chat(body, tool_choice(body.tools, "auto", None, target))
    special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    token_ids = await _service(http).in_thread(partial(target.tokenize, prompt, special=special))
    return {
        "count": len(token_ids),
        "max_model_len": target.max_model_len,
        "tokens": token_ids,
        "token_strs": target.model.tokenizer.convert_ids_to_tokens(token_ids) if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(body: schemas.DetokenizeRequest, http: Request) -> Any:
    """The text of token ids, including special tokens."""
    target = _target(http, body)
    return {"prompt": await _service(http).in_thread(partial(target.detokenize, body.tokens))}


@router.get("/tokenizer_info")
async def tokenizer_info(http: Request, model: str | None = None) -> Any:
    """Tokenizer of a collaboration, by default of the first one. lm-evaluation-harness reads it."""
    target = _service(http).target(model)
    target.worker.check_open()
    tokenizer = target.model.tokenizer
    special = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")}
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **{name: None if token is None else str(token) for name, token in special.items()},
        "chat_template": target.model.template.chat,
    }


@router.get("/v1/models")
async def models(http: Request) -> Any:
    """List the collaborations, and each of their authors alone."""
    return {"object": "list", "data": [_listed(http, one) for one in _service(http).targets.values()]}


@router.get("/v1/models/{name:path}")
async def model(name: str, http: Request) -> Any:
    """A collaboration, or one of its authors alone."""
    return _listed(http, _service(http).target(name))


@router.get("/v1/collm/info")
async def info(http: Request) -> Any:
    """Authors, thresholds and calibrations of the collaborations."""
    return {"object": "list", "data": [one.info() for one in _service(http).collaborations]}


@router.post("/v1/collm/candidates")
async def candidates(body: schemas.CandidatesRequest, http: Request) -> Any:
    """The most probable tokens of each author at each token of an answer."""
    target = _target(http, body, body.prompt)
    _check_either(body)
    param = "prompt" if body.messages is None else "messages"
    prompt = cast(Prompt, body.prompt if body.messages is None else read_messages(body.messages))
    prompt_ids = await _service(http).in_thread(partial(target.encode, prompt, param))
    target.check_prompt([*prompt_ids.base, *body.token_ids], "token_ids")
    found = await target.worker.collect(target.model.candidates_in_chunks(prompt, body.token_ids, body.most))
    return {"author_names": target.model.author_names, "candidates": found}


@router.get("/health")
async def health() -> Any:
    """Liveness probe."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(http: Request) -> Any:
    """Readiness probe: the models are loaded and requests are accepted."""
    for one in _service(http).collaborations:
        one.worker.check_open()
    return {"status": "ok"}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(http: Request) -> Response:
    """Metrics in the Prometheus format."""
    found: Metrics = http.app.state.metrics
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)


def _service(http: Request) -> Service:
    return cast(Service, http.app.state.service)


def _target(http: Request, body: Body, prompt: object = None) -> Target:
    """The requested model, if it is ready. It is noted in the request's record."""
    service = _service(http)
    record: Record = http.scope["collm.record"]
    record.target = target = service.target(body.model)
    if body.model_extra and not service.settings.ignore_unknown:
        name = min(body.model_extra)
        message = f"{name[:80]} is no parameter of this server; leave it out, or start it with --ignore-unknown"
        raise invalid(message, name, "unknown_parameter")
    target.worker.check_open()
    record.prompt = prompt if service.settings.log_prompts else None
    return target


def _check_either(body: schemas.TokenizeRequest | schemas.CandidatesRequest) -> None:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("expected either prompt or messages; give one of them", "prompt")


def _listed(http: Request, target: Target) -> dict[str, Any]:
    own = {"id": target.name, "object": "model", "created": _service(http).started, "owned_by": "collm"}
    return {**own, "max_model_len": target.max_model_len}


async def _answer(http: Request, target: Target, parsed: ParsedRequest, shape_of: Callable[..., Shape]) -> Response:
    """Answer a request, whole or as a stream. An APIError is a failure before the first token."""
    service = _service(http)
    record: Record = http.scope["collm.record"]
    worker, scored = target.worker, list[Scored]()
    requests = await service.in_thread(partial(_encoded, target, parsed))
    for one in requests[:: parsed.n] if parsed.scored is not None else ():
        chunks = target.model.prompt_logprobs_in_chunks(one.prompt_ids, parsed.scored or 0, policy=one.policy)
        scored.append(await worker.collect(chunks))
    shape = await service.in_thread(partial(shape_of, target, parsed, requests, scored))
    submission = worker.submit(requests) if parsed.generates else Submission(requests, worker, generates=False)
    record.submission = submission
    if parsed.body.stream:
        await submission.wait(_HEAD_S)
        record.last_event = shape.broken_off
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return EventStream(_events(submission, shape, record), headers=headers)
    while submission.unfinished:
        await submission.wait()
    return Response(shape.reply(submission.take(), submission.authors), media_type="application/json")


def _encoded(target: Target, parsed: ParsedRequest) -> list[EngineRequest]:
    """One request for each completion, ordered by prompt."""
    params, keep_last = parsed.params, parsed.body.truncate_prompt_tokens
    target.check_params(params, parsed.form_param)
    encoded = [target.encode(prompt, parsed.param, keep_last) for prompt in parsed.prompts]
    prompts = [prompt for prompt in encoded for _ in range(parsed.n)]
    seeds = [None if params.seed is None else params.seed + i for i in range(len(prompts))]
    return [
        EngineRequest(prompt.base, replace(params, seed=seed), parsed.policy, prompt.assistants)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


class EventStream(StreamingResponse):
    """Server-sent events. It leaves disconnections to the middleware."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.stream_response(send)


async def _events(submission: Submission, shape: Shape, record: Record) -> AsyncIterator[bytes]:
    """All events, and comments while nothing comes. An error is the last event."""
    try:
        start = shape.begin()
        while not submission.ended:
            events = b"".join(shape.event(part, submission.authors) for part in submission.take())
            yield start + (events or _COMMENT)
            start = b""
            await submission.wait(_COMMENT_S)
        yield shape.end(submission.authors)
    except APIError as error:
        record.status = error.status
        yield shape.broken_off(error)
    except Exception:
        _LOG.exception("request %s failed", record.id)
        record.status = 500
        yield shape.broken_off(broken())


def create_app(models: Mapping[str, CoLLM], settings: Settings | None = None) -> FastAPI:
    """Create the app that serves collaborations by name. It loads their models when it starts."""
    service = Service(models, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="collm",
        version=__version__,
        lifespan=lifespan,
        generate_unique_id_function=lambda r: r.name,
        docs_url=None,  # these pages load scripts from other servers
        redoc_url=None,
    )
    app.include_router(router)
    app.state.service = service
    app.state.metrics = Metrics(service.collaborations)
    for kind in (APIError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, refuse)
    routes = {str(getattr(route, "path", "")) for route in router.routes}
    app.add_middleware(cast(Any, RequestMiddleware), service=service, metrics=app.state.metrics, routes=routes)
    if service.settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients add their own, such as x-stainless-os
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app
