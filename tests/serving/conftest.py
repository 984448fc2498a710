"""Real servers on loopback, and clients of them."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from transformers import PreTrainedTokenizerFast

from collm import CoLLM
from collm.core.calibration import Calibration, CalibrationPoint
from collm.engine.runner import ModelRunner
from collm.serving.run import APIServer
from collm.serving.settings import Settings
from collm.serving.worker import Worker
from collm.text.template import PromptTemplate
from collm.vllm.endpoint import Endpoint
from tests.engine.test_engine import random_head
from tests.tiny_models import make_model, tiny_config

CHAT = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}w9"
CALIBRATION = Calibration(
    [CalibrationPoint(1.0, 0.0, 0.2, 0.1, 0.3, 0.0, 0.0), CalibrationPoint(0.5, 0.4, 0.6, 0.5, 0.7, 0.3, 0.5)],
    "accuracy",
    20,
    {},
)


def open_slots(model: CoLLM) -> int:
    """Of all authors in memory."""
    return sum(
        runner.open_slots if isinstance(runner, ModelRunner) else len(runner._slots)
        for runner in model.runners
        if not isinstance(runner, Endpoint)
    )


class Running:
    """A server that answers, and what a test needs to reach it from outside and inside."""

    def __init__(self, models: Mapping[str, CoLLM], settings: Settings, port: int = 0) -> None:
        self.models = models
        self.server = APIServer(models, settings, host="127.0.0.1", port=port)
        self.service = self.server.service
        self.thread = threading.Thread(target=self.server.run)
        self.client = httpx.Client(timeout=30)

    def start(self) -> Running:
        up = threading.Event()
        starting = self.server.startup

        async def startup(sockets: Any = None) -> None:
            await starting(sockets)
            up.set()

        self.server.startup = startup  # type: ignore[method-assign]
        self.thread.start()
        assert up.wait(30)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.client.base_url = httpx.URL(self.url)
        self.until(lambda: all(one.worker.ready for one in self.service.collaborations))
        return self

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def until(self, holds: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for something that is to happen."""
        ticking = threading.Event()
        for _ in range(int(seconds / 0.005)):
            if holds():
                return
            ticking.wait(0.005)
        raise AssertionError("it did not happen")

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, **{"api_key": "none", **options})

    def connect(self) -> socket.socket:
        return socket.create_connection(self.server.servers[0].sockets[0].getsockname(), timeout=30)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})

    def worker(self, name: str = "pair") -> Any:
        return self.service.targets[name].worker

    @property
    def open_slots(self) -> int:
        return sum(open_slots(model) for model in self.models.values())

    def idle(self) -> bool:
        """Nothing runs, nothing waits, no slot is open."""
        workers = [one.worker for one in self.service.collaborations]
        return not any(one.running or one.waiting or one.outstanding for one in workers) and not self.open_slots


class Steps:
    """Lets the engine make a step only when told to; where there is nothing to step it waits for requests as ever."""

    def __init__(self, worker: Worker) -> None:
        self._permits = threading.Semaphore(0)
        self.engine = worker._engine
        self._step = self.engine.step
        self.engine.step = self._wait  # type: ignore[method-assign]

    def _wait(self) -> Any:
        assert self._permits.acquire(timeout=60)
        return self._step()

    def allow(self, count: int) -> None:
        self._permits.release(count)


def make_pair(tokenizer: PreTrainedTokenizerFast, assistants: int = 1, **options: Any) -> CoLLM:
    members = [make_model(tiny_config(hidden_size=48), seed) for seed in range(1, assistants + 1)]
    head = random_head(32, assistants, scale=1.0)
    return CoLLM(make_model(tiny_config(), 0), members, head, tokenizer, template=PromptTemplate(chat=CHAT), **options)


@pytest.fixture
def own_logging() -> Iterator[None]:
    """What a test does to the root logger ends with it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    """serve(models, **settings): a context manager of a running server."""

    @contextmanager
    def running(models: Mapping[str, CoLLM], **settings: Any) -> Iterator[Running]:
        server = Running(models, Settings(**settings)).start()
        try:
            yield server
        finally:
            server.stop()

    return running


@pytest.fixture
def later() -> Iterator[Callable[..., Future[Any]]]:
    """Call a function in a thread."""
    with ThreadPoolExecutor(40) as pool:
        yield pool.submit


@pytest.fixture
def serve_pair(tokenizer: PreTrainedTokenizerFast, serve: Callable[..., Any]) -> Callable[..., Any]:
    """serve_pair(**settings): a server of one's own, with the calibrated pair."""
    return lambda **settings: serve({"pair": make_pair(tokenizer, calibration=CALIBRATION)}, **settings)


@pytest.fixture(scope="session")
def server(tokenizer: PreTrainedTokenizerFast, serve: Callable[..., Any]) -> Iterator[Running]:
    """One server for all tests that leave it as it was: a calibrated pair, and three authors without calibration."""
    models = {"pair": make_pair(tokenizer, calibration=CALIBRATION), "three": make_pair(tokenizer, 2)}
    with serve(models) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


@pytest.fixture
def pair(tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    """The pair of `server`, to ask directly."""
    return make_pair(tokenizer, calibration=CALIBRATION)
