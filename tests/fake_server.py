"""A server like vLLM's on this machine: a tiny model's true log-probabilities over HTTP, and every way to fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

THREAD = "fake-server"


@dataclass(frozen=True)
class Refuse:
    """Answer with this status; a `body` that is no string becomes JSON."""

    status: int
    body: Any = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Drop:
    """Close the connection without an answer."""


@dataclass(frozen=True)
class Hang:
    """Answer nothing until the server closes."""


@dataclass(frozen=True)
class Trickle:
    """Answer one byte at a time until the server closes."""


Failure = Refuse | Drop | Hang | Trickle


def error(message: str, status: int = 400) -> Refuse:
    """A refusal in vLLM's words."""
    return Refuse(status, {"error": {"message": message, "type": "BadRequestError", "code": status}})


class FakeServer:
    """Serves `GET /v1/models` and `POST /v1/completions`, the latter for prompts of token ids; a context manager.

    Args:
        module: answers.
        model: its name.
        max_model_len: said in the list of models if given, and enforced.
        key: refuse requests without it.

    Attributes:
        failures: of the next requests, path -> in turn, before any answer is right.
        alter: changes an answer to a completion before it is sent.
        before: called with the prompt before it is answered.
        prompts: of the completions asked for, in the order in which they came.
        requests: bodies of the same.
        most_in_flight: completions at a time.
        answered: how many completions were answered.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        *,
        model: str = "tiny",
        max_model_len: int | None = None,
        key: str | None = None,
    ) -> None:
        self.module, self.model, self.max_model_len, self.key = module, model, max_model_len, key
        self.failures: dict[str, list[Failure]] = {"/v1/models": [], "/v1/completions": []}
        self.alter: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.before: Callable[[list[int]], None] = lambda prompt: None
        self.requests: list[dict[str, Any]] = []
        self.most_in_flight = self.answered = self._in_flight = 0
        self.closing = threading.Event()
        self.changed = threading.Condition()
        self._http = _Server(self)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @property
    def prompts(self) -> list[list[int]]:
        return [request["prompt"] for request in self.requests]

    def fail(self, *failures: Failure, path: str = "/v1/completions") -> None:
        self.failures[path] += failures

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """For `before`: until something holds of this server, 5 seconds at most."""
        with self.changed:
            assert self.changed.wait_for(holds, timeout=5), "what the test waits for did not happen"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), name=THREAD).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def models(self) -> dict[str, Any]:
        card: dict[str, Any] = {"id": self.model, "object": "model", "owned_by": "vllm"}
        if self.max_model_len is not None:
            card["max_model_len"] = self.max_model_len
        return {"object": "list", "data": [card]}

    def complete(self, body: dict[str, Any]) -> Any:
        with self.changed:
            self._in_flight += 1
            self.requests.append(body)
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            self.changed.notify_all()
        try:
            if (failure := self._refuses(body)) is not None:
                return failure
            self.before(body["prompt"])
            with self.changed:
                return self.alter(self._answer(body))
        finally:
            with self.changed:
                self._in_flight -= 1
                self.answered += 1
                self.changed.notify_all()

    def _refuses(self, body: dict[str, Any]) -> Failure | None:
        prompt, limit, vocab = body["prompt"], self.max_model_len, self.module.config.vocab_size
        if self.failures["/v1/completions"]:
            return self.failures["/v1/completions"].pop(0)
        if body["model"] != self.model:
            return error(f"The model `{body['model']}` does not exist.", 404)
        if limit is not None and len(prompt) + body["max_tokens"] > limit:
            return error(f"This model's maximum context length is {limit} tokens. Please reduce the input prompt.")
        if max(prompt) >= vocab:
            return error(f"Token id {max(prompt)} is out of vocabulary")
        return None

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM: of each position the token itself and the `prompt_logprobs` best."""
        ids = torch.tensor(body["prompt"])
        with torch.inference_mode():
            logprobs = self.module(ids[None]).logits[0].float().log_softmax(-1)
        positions: list[Any] = [None]
        for row, token_id in zip(logprobs[:-1], ids[1:].tolist(), strict=True):
            rank = int((row >= row[token_id]).sum())
            best = row.topk(body["prompt_logprobs"]).indices.tolist()
            positions.append({str(one): _entry(row, one, r) for one, r in [(token_id, rank), *_ranked(best)]})
        choice = {"index": 0, "text": " w1", "finish_reason": "length", "prompt_logprobs": positions}
        if body.get("return_token_ids"):
            choice |= {"prompt_token_ids": body["prompt"], "token_ids": [1]}
        return {"object": "text_completion", "model": self.model, "choices": [choice]}


def _ranked(token_ids: Iterable[int]) -> list[tuple[int, int]]:
    return [(token_id, rank) for rank, token_id in enumerate(token_ids, start=1)]


def _entry(row: torch.Tensor, token_id: int, rank: int) -> dict[str, Any]:
    return {"logprob": row[token_id].item(), "rank": rank, "decoded_token": f"w{token_id}"}


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 64

    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        fake = self.server.fake
        failures = fake.failures["/v1/models"]
        self._send(failures.pop(0) if failures else fake.models())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._send(self.server.fake.complete(json.loads(body)))

    def _send(self, answer: Any) -> None:
        fake = self.server.fake
        if isinstance(answer, Hang):
            fake.closing.wait(10)
        if isinstance(answer, Trickle):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not fake.closing.wait(0.02):
                self.wfile.write(b" ")
        if isinstance(answer, Hang | Drop | Trickle):
            self.close_connection = True
            return
        if fake.key is not None and self.headers.get("Authorization") != f"Bearer {fake.key}":
            answer = error(f"Incorrect API key: {self.headers.get('Authorization')}", 401)
        refusal = answer if isinstance(answer, Refuse) else Refuse(200, answer)
        content = (refusal.body if isinstance(refusal.body, str) else json.dumps(refusal.body)).encode()
        self.send_response(refusal.status)
        for name, value in refusal.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it has
        """Nothing on stderr."""
