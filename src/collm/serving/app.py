"""The server's routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from collm.collaboration import CoLLM
from collm.errors import RequestError
from collm.models.template import Prompt
from collm.serving import replies
from collm.serving.answering import Answer
from collm.serving.collaborations import Target
from collm.serving.front import Front
from collm.serving.playground import playground
from collm.serving.reading import Reading, as_chat, read_chat, read_completion
from collm.serving.records import Metrics, Record
from collm.serving.refusals import Refusal, invalid
from collm.serving.schemas import CandidatesRequest, ChatRequest, CompletionRequest
from collm.serving.service import Service
from collm.serving.settings import Settings
from collm.serving.shapes import ChatShape, CompletionShape
from collm.serving.spelling import Speller
from collm.serving.validation import refusal_of
from collm.version import __version__

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": replies.ErrorReply, "description": "What is wrong with the request"},
    "5XX": {"model": replies.ErrorReply, "description": "What is wrong with the server"},
}
_STREAM = {"text/event-stream": {"schema": {"type": "string", "description": "With stream: data: {chunk}, [DONE]"}}}

router = APIRouter(responses=_ERRORS)
router.add_route("/", playground, include_in_schema=False)


def _generation(model: type[replies.Reply]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model, "description": "The completions", "content": _STREAM}}


@router.post("/v1/completions", responses=_generation(replies.CompletionReply))
async def completions(body: CompletionRequest, http: Request) -> Response:
    """Continue prompts."""
    service, target = _asked(http, body.model, body.prompt)
    reading = read_completion(body, target, service.settings)
    return await _answer(http, service, target, reading, body, echo=bool(body.echo))


@router.post("/v1/chat/completions", responses=_generation(replies.ChatReply))
async def chat_completions(body: ChatRequest, http: Request) -> Response:
    """Answer a chat."""
    service, target = _asked(http, body.model, [message.model_dump() for message in body.messages])
    reading = read_chat(body, target, service.settings)
    return await _answer(http, service, target, reading, body)


async def _answer(
    http: Request,
    service: Service,
    target: Target,
    reading: Reading,
    body: CompletionRequest | ChatRequest,
    *,
    echo: bool = False,
) -> Response:
    longest = service.settings.max_prompt_tokens
    requests = await asyncio.to_thread(reading.requests, lambda prompt: target.encode(prompt, reading.param, longest))
    tokenizer = target.served.model.tokenizer
    spellers = None
    if reading.logprobs:
        spellers = [Speller(tokenizer, one.prompt_ids, reading.params.logprobs) for one in requests]
    submission = target.served.worker.submit(requests)
    record: Record = http.scope["collm.record"]
    names = target.served.author_names
    shape: CompletionShape | ChatShape
    if isinstance(body, ChatRequest):
        shape = ChatShape(target.name, names, spellers)
    else:
        shape = CompletionShape(target.name, names, spellers, reading.echoed(tokenizer) if echo else None)
    answer = Answer(submission, shape, record, http, service.settings.time_limit_s)
    if body.stream:
        return await answer.stream(include_usage=bool(body.stream_options and body.stream_options.include_usage))
    return await answer.whole()


@router.get("/v1/models", response_model=replies.ModelList)
async def models(http: Request) -> Any:
    """The collaborations, and each of their authors alone."""
    service = _service(http)
    entries = [
        {"id": name, "object": "model", "created": service.started, "owned_by": "collm"}
        for name in service.collaborations.targets
    ]
    return {"object": "list", "data": entries}


@router.get("/v1/collm/info", response_model=replies.Info)
async def info(http: Request) -> Any:
    """Authors, thresholds and what calibration measured."""
    return {"object": "list", "data": [one.info() for one in _service(http).collaborations.served]}


@router.post("/v1/collm/candidates", response_model=replies.CandidatesReply)
async def candidates(body: CandidatesRequest, http: Request) -> Any:
    """What each author would have written at each token of an answer."""
    service, target = _asked(http, body.model, body.prompt)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("expected either prompt or messages; give one of them", "prompt")
    prompt = cast(Prompt, body.prompt if body.messages is None else as_chat(body.messages))
    param = "prompt" if body.messages is None else "messages"
    prompt_ids = await asyncio.to_thread(target.encode, prompt, param, service.settings.max_prompt_tokens)
    model = target.served.model
    try:
        target.check([*prompt_ids, *body.token_ids])
    except RequestError as error:
        raise invalid(str(error), "token_ids") from error
    found = await target.served.worker.call(lambda: model.candidates(prompt_ids, body.token_ids, body.most))
    return {"author_names": target.served.author_names, "candidates": found}


@router.get("/health", response_model=replies.Status)
async def health() -> Any:
    """The process is alive."""
    return {"status": "ok"}


@router.get("/ready", response_model=replies.Status)
async def ready(http: Request) -> Any:
    """The models are in memory and requests are taken."""
    service = _service(http)
    for one in service.collaborations.served:
        one.worker.check_open()
    return {"status": "ok"}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(http: Request) -> Response:
    """For Prometheus."""
    found: Metrics = http.app.state.metrics
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)


def _service(http: Request) -> Service:
    service: Service = http.app.state.service
    return service


def _asked(http: Request, name: str, prompt: object) -> tuple[Service, Target]:
    """The model that is asked, ready to work; the record learns of it."""
    service = _service(http)
    record: Record = http.scope["collm.record"]
    target = service.collaborations.target(name)
    record.model, record.author_names = target.name, target.served.author_names
    if service.settings.log_prompts:
        record.prompt = prompt
    target.served.worker.check_open()
    return service, target


async def _refused(http: Request, error: Exception) -> Response:
    refusal = refusal_of(error, f"{http.method} {http.url.path}")
    return JSONResponse(refusal.content, refusal.status, refusal.headers)


def create_app(models: Mapping[str, CoLLM], settings: Settings | None = None) -> FastAPI:
    """The server of some collaborations, by their names. Their models are loaded once it runs.

    Raises:
        ConfigError: no collaboration, or a name that cannot stand in a request.
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
        docs_url=None,  # those pages run scripts of other servers
        redoc_url=None,
    )
    app.include_router(router)
    app.state.service = service
    app.state.metrics = Metrics(service.collaborations.served)
    for kind in (Refusal, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _refused)
    _add_middleware(app, settings)
    return app


def _add_middleware(app: FastAPI, settings: Settings) -> None:
    routes = {str(getattr(route, "path", "")) for route in router.routes}
    app.add_middleware(cast(Any, Front), settings=settings, metrics=app.state.metrics, routes=routes)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
