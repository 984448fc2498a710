"""The server's routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from collm.collaboration import CoLLM
from collm.serving.answering import answer
from collm.serving.collaborations import Target
from collm.serving.errors import APIError, invalid, refusal_of, unknown
from collm.serving.middleware import RequestMiddleware
from collm.serving.parsing import as_chat, read_chat, read_completion, read_messages, tool_choice
from collm.serving.playground import playground
from collm.serving.request_log import Metrics, Record
from collm.serving.responses import ResponseShape, as_chat_request
from collm.serving.schemas import (
    CandidatesRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    Sampled,
    TokenizeRequest,
    unknown_fields,
)
from collm.serving.service import Service
from collm.serving.settings import Settings
from collm.serving.shapes import ChatShape, CompletionShape
from collm.text.template import Prompt
from collm.version import __version__

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

router = APIRouter(responses=_ERRORS)
router.add_route("/", playground, include_in_schema=False)


@router.post("/v1/completions", responses=_STREAMED)
async def completions(body: CompletionRequest, http: Request) -> Response:
    """Continue prompts."""
    service, target = _asked(http, body, body.prompt)
    reading = read_completion(body, target, service.settings)
    return await answer(http, service, target, reading, body, CompletionShape)


@router.post("/v1/chat/completions", responses=_STREAMED)
async def chat_completions(body: ChatRequest, http: Request) -> Response:
    """Answer a chat."""
    service, target = _asked(http, body, [message.model_dump(exclude_unset=True) for message in body.messages])
    reading = read_chat(body, target, service.settings)
    return await answer(http, service, target, reading, body, partial(ChatShape, calls=reading.calls))


@router.post("/v1/responses", responses=_STREAMED)
async def responses(body: ResponsesRequest, http: Request) -> Response:
    """Answer text or a conversation. Responses are not stored."""
    asked = as_chat_request(body)
    service, target = _asked(http, body, body.model_dump(exclude_unset=True)["input"])
    reading = replace(read_chat(asked, target, service.settings), param="input")
    return await answer(http, service, target, reading, asked, partial(ResponseShape, body=body, calls=reading.calls))


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, http: Request) -> Any:
    """Token ids of a prompt or of messages."""
    service, target = _service(http), _target(http, body)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("expected either prompt or messages; give one of them", "prompt")
    if body.messages is None:
        special = body.add_special_tokens is not False
        token_ids = await service.in_thread(partial(target.tokenize, body.prompt or "", special=special))
    else:
        tools = tool_choice(body.tools, "auto", None, target)
        chat = as_chat(body, tools)
        token_ids = await service.in_thread(partial(target.render, chat, special=bool(body.add_special_tokens)))
    limits = [one.max_length for one in target.served.model.runners if one.max_length is not None]
    names = target.served.model.tokenizer.convert_ids_to_tokens(token_ids) if body.return_token_strs else None
    return {
        "count": len(token_ids),
        "max_model_len": min(limits, default=None),
        "tokens": token_ids,
        "token_strs": names,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, http: Request) -> Any:
    """The text of token ids, including special tokens."""
    target = _target(http, body)
    return {"prompt": await _service(http).in_thread(partial(target.detokenize, body.tokens))}


@router.get("/tokenizer_info")
async def tokenizer_info(http: Request, model: str | None = None) -> Any:
    """Tokenizer of a collaboration, by default of the first one. lm-evaluation-harness reads it."""
    served = _service(http).collaborations.target(model).served
    served.worker.check_open()
    tokenizer = served.model.tokenizer
    special = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")}
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **{name: None if token is None else str(token) for name, token in special.items()},
        "chat_template": served.model.template.chat,
    }


@router.get("/v1/models")
async def models(http: Request) -> Any:
    """List the collaborations, and each of their authors alone."""
    service = _service(http)
    entries = [
        {"id": name, "object": "model", "created": service.started, "owned_by": "collm"}
        for name in service.collaborations.targets
    ]
    return {"object": "list", "data": entries}


@router.get("/v1/models/{name:path}")
async def model(name: str, http: Request) -> Any:
    """A collaboration, or one of its authors alone."""
    service = _service(http)
    found = service.collaborations.target(name).name
    return {"id": found, "object": "model", "created": service.started, "owned_by": "collm"}


@router.get("/v1/collm/info")
async def info(http: Request) -> Any:
    """Authors, thresholds and calibrations of the collaborations."""
    return {"object": "list", "data": [one.info() for one in _service(http).collaborations.served]}


@router.post("/v1/collm/candidates")
async def candidates(body: CandidatesRequest, http: Request) -> Any:
    """The most probable tokens of each author at each token of an answer."""
    service, target = _asked(http, body, body.prompt)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("expected either prompt or messages; give one of them", "prompt")
    prompt = cast(Prompt, body.prompt if body.messages is None else read_messages(body.messages))
    param = "prompt" if body.messages is None else "messages"
    prompt_ids = await service.in_thread(partial(target.encode, prompt, param, service.settings.max_prompt_tokens))
    model = target.served.model
    target.check([*prompt_ids.base, *body.token_ids], "token_ids")
    found = await target.served.worker.collect(model.candidates_in_chunks(prompt, body.token_ids, body.most))
    return {"author_names": target.served.author_names, "candidates": found}


@router.get("/health")
async def health() -> Any:
    """Liveness probe."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(http: Request) -> Any:
    """Readiness probe: the models are loaded and requests are accepted."""
    service = _service(http)
    for one in service.collaborations.served:
        one.worker.check_open()
    return {"status": "ok"}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(http: Request) -> Response:
    """Metrics in the Prometheus format."""
    found: Metrics = http.app.state.metrics
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)


def _service(http: Request) -> Service:
    service: Service = http.app.state.service
    return service


def _asked(http: Request, body: Sampled | CandidatesRequest, prompt: object) -> tuple[Service, Target]:
    """The service and the requested model, which is ready. Both are noted in the request's record."""
    service = _service(http)
    record: Record = http.scope["collm.record"]
    target = _target(http, body)
    if service.settings.log_prompts:
        record.prompt = prompt
    return service, target


def _target(http: Request, body: Sampled | CandidatesRequest | TokenizeRequest | DetokenizeRequest) -> Target:
    service = _service(http)
    record: Record = http.scope["collm.record"]
    target = service.collaborations.target(body.model)
    record.model, record.author_names = target.name, target.served.author_names
    strangers = unknown_fields(body)
    if strangers and not service.settings.ignore_unknown:
        raise unknown(strangers)
    target.served.worker.check_open()
    return target


async def _refused(http: Request, error: Any) -> Response:
    refusal = refusal_of(error, f"{http.method} {http.url.path}")
    return JSONResponse(refusal.content, refusal.status, refusal.headers)


def create_app(models: Mapping[str, CoLLM], settings: Settings | None = None) -> FastAPI:
    """Create the app that serves collaborations by name. It loads their models when it starts.

    Raises:
        ConfigError: no collaboration, or an invalid name.
    """
    settings = settings or Settings()
    service = Service(models, settings)

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
    app.state.metrics = Metrics(service.collaborations.served)
    for kind in (APIError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _refused)
    _add_middleware(app, service)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
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
