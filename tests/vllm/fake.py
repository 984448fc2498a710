"""A server like vLLM 0.32's on this machine: a tiny model over HTTP, with its streams, and every way to fail.

What it says is computed by transformers and the plug-in's own rule, from scratch at every token.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from collm.vllm import NOTE
from collm.vllm.rows import decide

LATEST_S = 20.0
"""How long a test waits for something that is to happen, and a server for a test that let it hang."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    Attributes:
        status: answered with `headers` and `text` in place of an answer; 0 closes the connection.
        after: so many tokens are sent, then what `then` says happens.
        then: "drop" closes the connection, "hang" sends nothing more, "comments" and "empties" (pieces without
            tokens) go on for ever, "end" ends the stream without a finish_reason, a dict is sent as an event.
        change: of the choice of a piece or an answer, before it is sent.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    hang: bool = False
    after: int | None = None
    then: str | dict[str, Any] = "drop"
    change: Callable[[dict[str, Any]], Any] | None = None


DOWN = Fault(status=0)
HANG = Fault(hang=True)


def refusal(status: int, message: str = "no", **headers: str) -> Fault:
    """In vLLM's words."""
    error = {"error": {"message": message, "type": "Error", "param": None, "code": status}}
    return Fault(status=status, headers={k.replace("_", "-"): v for k, v in headers.items()}, text=json.dumps(error))


class Served:
    """A model with its tokenizer, and what the plug-in knows of it; logits of a text are computed once.

    Args:
        note: without one there is no plug-in.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, note: dict[str, Any] | None = None
    ) -> None:
        self.model, self.tokenizer, self.note = model.eval(), tokenizer, note
        self._logits: dict[tuple[int, ...], Tensor] = {}
        self._lock = threading.Lock()

    @classmethod
    def exported(cls, directory: Path) -> Served:
        """What `export_base` wrote, with the plug-in."""
        note = json.loads((directory / NOTE).read_text())
        model = AutoModelForCausalLM.from_pretrained(directory)
        return cls(model, AutoTokenizer.from_pretrained(directory), note)

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> Tensor:
        """fp32, shape (T, V)."""
        with self._lock:
            known = self._logits.get(tuple(token_ids))
            if known is None:
                known = self._logits[tuple(token_ids)] = self.model(torch.tensor([token_ids])).logits[0].float()
            return known


class FakeVllm:
    """Serves one model from a thread; a context manager.

    Args:
        pieces: how many tokens stand in the pieces of a stream, in turn.
        key: refuse requests without it.
        max_model_len: said and enforced.
        logprobs_mode: raw_logprobs as by default, or raw_logits.
        cards: in place of the one that says what is served.
        socket: where it listens, in place of a port.

    Attributes:
        faults: of the next completions, in turn.
        always: of all further completions, what a function of the body says.
        of_path: of requests to other paths.
        running, most_running: completions at a time.
        abandoned: bodies of streams that the client left before their end.
        gate: a stream waits before each piece until this is set.
    """

    def __init__(
        self,
        served: Served,
        *,
        name: str = "tiny",
        pieces: tuple[int, ...] = (1,),
        key: str | None = None,
        max_model_len: int | None = 128,
        logprobs_mode: str = "raw_logprobs",
        tokenizes: bool = True,
        cards: list[dict[str, Any]] | None = None,
        socket: Path | None = None,
    ) -> None:
        self.served, self.name, self.pieces, self.key = served, name, pieces, key
        self.max_model_len, self.logprobs_mode, self.tokenizes = max_model_len, logprobs_mode, tokenizes
        self.cards = [{"id": name, "object": "model", "max_model_len": max_model_len}] if cards is None else cards
        self.bodies: list[dict[str, Any]] = []
        self.faults: list[Fault] = []
        self.always: Callable[[dict[str, Any]], Fault | None] = lambda body: None
        self.of_path: dict[str, list[Fault]] = {"/v1/models": [], "/tokenize": []}
        self.connections = self.running = self.most_running = 0
        self.abandoned: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        self._generator = torch.Generator().manual_seed(0)
        self._loop = asyncio.new_event_loop()
        self.gate = asyncio.Event()
        self.gate.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-vllm")
        self.port = 0
        self.socket = socket

    @property
    def url(self) -> str:
        host = f"127.0.0.1:{self.port}" if self.socket is None else quote(str(self.socket), safe="")
        return f"http://{host}/v1"

    def __enter__(self) -> FakeVllm:
        self._thread.start()
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def up(self) -> None:
        """Listen, at the same port as before."""
        self._do(self._listen())

    def down(self) -> None:
        """Break all connections off and refuse further ones."""
        self._do(self._leave())

    def hold(self) -> None:
        """Let streams wait before their next piece."""
        self._loop.call_soon_threadsafe(self.gate.clear)
        self._do(asyncio.sleep(0))

    def let_go(self) -> None:
        self._loop.call_soon_threadsafe(self.gate.set)

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Until something holds of this server that is to happen."""
        with self.changed:
            assert self.changed.wait_for(holds, timeout=LATEST_S), "what the test waits for did not happen"

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(LATEST_S)

    async def _listen(self) -> None:
        if self.socket is not None:
            self._server = await asyncio.start_unix_server(self._accept, self.socket)
            return
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=256)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _leave(self) -> None:
        if self._server is not None:
            # asyncio leaves a connection open that it has accepted but not yet given to the server when that closes.
            for listening in self._server.sockets:
                self._loop.remove_reader(listening.fileno())
            await asyncio.sleep(0)
            self._server.close()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(others)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        assert self._server is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while self._server.is_serving() and (request := await _request(reader)) is not None:
                if not await self._answer(*request, reader, writer):
                    return
        except (OSError, asyncio.CancelledError):  # the client went away, or this server goes down
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(
        self,
        path: str,
        headers: dict[str, str],
        body: Any,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Answer one request; False to close the connection."""
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return await _send(writer, 401, {"error": f"Unauthorized: {headers.get('authorization')}"})
        if path == "/v1/completions":
            with self._counted(body):
                fault = self.faults.pop(0) if self.faults else self.always(body)
                return await self._complete(body, fault or Fault(), reader, writer)
        fault = self.of_path[path].pop(0) if self.of_path.get(path) else Fault()
        if fault.hang or fault.status is not None:
            return await self._fail(fault, writer)
        if path == "/v1/models":
            return await _send(writer, 200, {"object": "list", "data": self.cards})
        if path == "/tokenize" and self.tokenizes:
            token_ids = self.served.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])[
                "input_ids"
            ]
            answer = {"count": len(token_ids), "max_model_len": self.max_model_len, "tokens": token_ids}
            return await _send(writer, 200, {**answer, "token_strs": None})
        return await _send(writer, 404, {"detail": "Not Found"})

    @contextmanager
    def _counted(self, body: dict[str, Any]) -> Iterator[None]:
        with self.changed:
            self.bodies.append(body)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self.running -= 1
                self.changed.notify_all()

    async def _fail(self, fault: Fault, writer: asyncio.StreamWriter) -> bool:
        if fault.hang:
            await asyncio.sleep(LATEST_S)
        if not fault.status:
            return False
        return await _send(writer, fault.status, fault.text, fault.headers)

    async def _complete(
        self, body: dict[str, Any], fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        if fault.hang or fault.status is not None:
            return await self._fail(fault, writer)
        if (wrong := self._wrong(body)) is not None:
            error = {"message": wrong, "type": "BadRequestError", "param": None, "code": 400}
            return await _send(writer, 400, {"error": error})
        if body.get("stream"):
            return await self._stream(body, fault, reader, writer)
        while not self.gate.is_set():
            await self.gate.wait()
        written = list(self._written(body))
        choice: Any = self._choice(body, written, first=True)
        choice["prompt_logprobs"] = self._of_prompt(body)
        if fault.change is not None:
            choice = fault.change(choice)
        return await _send(writer, 200, {"object": "text_completion", "model": self.name, "choices": [choice]})

    def _wrong(self, body: dict[str, Any]) -> str | None:
        """What vLLM refuses."""
        prompt, rows = body["prompt"], self.served.model.config.vocab_size
        if body["model"] != self.name:
            return f"The model `{body['model']}` does not exist."
        if not prompt or not all(isinstance(one, int) and 0 <= one < rows for one in prompt):
            return "the prompt holds token ids out of vocabulary"
        if body["max_tokens"] < 1:
            return f"max_tokens must be at least 1, got {body['max_tokens']}."
        if self.max_model_len is not None and len(prompt) + body["max_tokens"] > self.max_model_len:
            return f"This model's maximum context length is {self.max_model_len} tokens."
        if body.get("logprob_token_ids") and body.get("logprobs") is None:
            return "when using `logprob_token_ids`, `logprobs` must be set."
        threshold = (body.get("vllm_xargs") or {}).get("defer_threshold", 0)
        if self.served.note is not None and not -1 <= threshold <= 1:
            return f"defer_threshold is {threshold}, expected a number from -1 to 1"
        return None

    def _written(self, body: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
        """Tokens, each with log-probabilities (V,) before anything was ruled out."""
        generator = self._generator
        if body.get("seed") is not None:
            generator = torch.Generator().manual_seed(body["seed"])
        text = list(body["prompt"])
        for _ in range(body["max_tokens"]):
            logits = self.served.logits(text)[-1].clone()
            said = logits.clone() if self.logprobs_mode == "raw_logits" else logits.log_softmax(-1)
            if self.served.note is not None:
                threshold = (body.get("vllm_xargs") or {}).get("defer_threshold", float("inf"))
                decide(logits[None], torch.tensor([threshold], dtype=torch.float64), self.served.note)
            text.append(_draw(logits, body, generator))
            yield text[-1], said
            if text[-1] in body.get("stop_token_ids", ()):
                return
            if not body.get("ignore_eos") and text[-1] == self.served.tokenizer.eos_token_id:
                return

    def _choice(self, body: dict[str, Any], written: list[tuple[int, Tensor]], *, first: bool) -> dict[str, Any]:
        """A whole answer or a piece, all but its finish_reason known here."""
        token_ids = [token_id for token_id, _ in written]
        ended = bool(token_ids) and token_ids[-1] in [
            *body.get("stop_token_ids", ()),
            *([] if body.get("ignore_eos") else [self.served.tokenizer.eos_token_id]),
        ]
        choice: dict[str, Any] = {"index": 0, "text": self.served.tokenizer.decode(token_ids, skip_special_tokens=True)}
        choice |= {"logprobs": None, "finish_reason": "stop" if ended else "length", "stop_reason": None}
        if body.get("logprobs") is not None:
            choice["logprobs"] = self._logprobs(body, written)
        if body.get("return_token_ids"):
            choice |= {"prompt_token_ids": body["prompt"] if first else None, "token_ids": token_ids}
        return choice

    def _logprobs(self, body: dict[str, Any], written: list[tuple[int, Tensor]]) -> dict[str, Any]:
        def named(token_id: int) -> str:
            if body.get("return_tokens_as_token_ids"):
                return f"token_id:{token_id}"
            return str(self.served.tokenizer.decode([token_id]))

        top = []
        for token_id, said in written:
            about = body.get("logprob_token_ids") or said.topk(body["logprobs"]).indices.tolist()
            top.append({named(one): max(said[one].item(), -9999.0) for one in [token_id, *about]})
        return {
            "text_offset": [0] * len(written),
            "token_logprobs": [max(said[token_id].item(), -9999.0) for token_id, said in written],
            "tokens": [named(token_id) for token_id, _ in written],
            "top_logprobs": top,
        }

    def _of_prompt(self, body: dict[str, Any]) -> Any:
        if body.get("prompt_logprobs") is None:
            return None
        logprobs = self.served.logits(body["prompt"]).log_softmax(-1)
        places: list[Any] = [None]
        for row, token_id in zip(logprobs[:-1], body["prompt"][1:], strict=True):
            likeliest = [token_id, *row.topk(body["prompt_logprobs"]).indices.tolist()]
            entries = [{"logprob": row[one].item(), "rank": 1, "decoded_token": f"w{one}"} for one in likeliest]
            places.append(dict(zip(map(str, likeliest), entries, strict=True)))
        return places

    async def _stream(
        self, body: dict[str, Any], fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        gone = asyncio.ensure_future(reader.read(1))  # nothing comes before the answer's end but the connection's
        try:
            async for event in self._events(body, fault):
                opened = asyncio.ensure_future(self.gate.wait())
                await asyncio.wait({gone, opened}, return_when=asyncio.FIRST_COMPLETED)
                opened.cancel()
                if gone.done():
                    with self.changed:
                        self.abandoned.append(body)
                    return False
                if event is None:
                    return False
                await _chunk(writer, event)
            await _chunk(writer, "data: [DONE]\n\n")
            await _chunk(writer, "")
            return not gone.done()
        finally:
            gone.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await gone

    async def _events(self, body: dict[str, Any], fault: Fault) -> AsyncIterator[str | None]:
        """Of a stream, up to [DONE]; None breaks the connection off."""
        sent, sizes, held = 0, 0, list[tuple[int, Tensor]]()
        tokens = self._written(body)
        coming = next(tokens, None)
        while coming is not None and sent + len(held) != fault.after:
            held.append(coming)
            coming = next(tokens, None)
            last = coming is None
            if last or len(held) == self.pieces[sizes % len(self.pieces)] or sent + len(held) == fault.after:
                choice: Any = self._choice(body, held, first=sent == 0)
                if not last:
                    choice |= {"finish_reason": None}
                sent, sizes, held = sent + len(held), sizes + 1, []
                if fault.change is not None:
                    choice = fault.change(choice)
                yield _event({"object": "text_completion", "model": self.name, "choices": [choice]})
                await asyncio.sleep(0)
        if fault.after is None:
            return
        if isinstance(fault.then, dict):
            yield _event(fault.then)
        elif fault.then == "hang":
            await asyncio.sleep(LATEST_S)
        elif fault.then in ("comments", "empties"):
            empty = _event({"choices": [{**self._choice(body, [], first=False), "finish_reason": None}]})
            while True:
                await asyncio.sleep(0.01)
                yield ": keep-alive\n\n" if fault.then == "comments" else empty
        elif fault.then == "drop":
            yield None


def _draw(logits: Tensor, body: dict[str, Any], generator: torch.Generator) -> int:
    """As vLLM's sampler: temperature, top_k with its ties, then top_p from the bottom up, then a race."""
    if body["temperature"] == 0:
        return int(logits.argmax())
    scaled = logits / body["temperature"]
    if body.get("top_k", 0) > 0:
        border = scaled.topk(min(body["top_k"], len(scaled))).values[-1]
        scaled = scaled.masked_fill(scaled < border, -torch.inf)
    ranked, order = scaled.sort()
    beyond = ranked.softmax(-1).cumsum(-1) <= 1 - body.get("top_p", 1.0)
    beyond[-1] = False
    scaled = scaled.index_fill(0, order[beyond], -torch.inf)
    race = torch.empty_like(scaled).exponential_(generator=generator)
    return int((scaled.softmax(-1) / race).argmax())


async def _request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], Any] | None:
    """Path, headers and JSON of the next request of a connection, None at its end."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    return first.split()[1], headers, json.loads(content) if content else None


async def _send(writer: asyncio.StreamWriter, status: int, answer: Any, headers: Mapping[str, str] = {}) -> bool:
    content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(content)}", *(f"{k}: {v}" for k, v in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode() + content)
    await writer.drain()
    return True


async def _chunk(writer: asyncio.StreamWriter, text: str) -> None:
    content = text.encode()
    writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
    await writer.drain()


def _event(content: Any) -> str:
    return f"data: {json.dumps(content)}\n\n"
