"""The decoding loop across servers, which decode themselves: it starts requests and collects their outputs."""

from __future__ import annotations

import queue
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

from collm.engine.engine import RequestOutput
from collm.engine.request import Request, check_params, check_prompt
from collm.engine.sequence import Sequence
from collm.errors import CollmError, ConfigError, ModelFailure
from collm.models.assistant import Assistant
from collm.vllm.connections import Connections, Run

_STEP_WAIT_S = 0.02
"""Longest wait of a step for outputs. Requests can be added and cancelled between steps."""
_CLOSED = "the connections to the servers were closed during decoding; load the collaboration again"


@dataclass(eq=False)
class ServerEngine:
    """Decodes requests on servers, which batch concurrent requests. It has the interface of `engine.engine.Engine`.

    At most `max_batch` sequences are decoded at once; further requests wait.
    """

    connections: Connections
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    max_batch: int = 16

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ConfigError(f"max_batch is {self.max_batch}, expected at least 1")
        self._waiting: deque[Sequence] = deque()
        self._active: dict[int, Future[None]] = {}
        self._count = 0
        self._outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

    @property
    def has_work(self) -> bool:
        return bool(self._active or self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request and return its number.

        Raises:
            RequestError: the prompt is empty, holds unknown token ids or leaves no room in a model's context.
            ConfigError: the servers do not support the policy or a parameter.
        """
        check_prompt(self.connections.authors, self.connections.vocab_size, request.prompt_ids)
        check_params(request.params, self.connections.vocab_size)
        self.connections.check_request(request)
        self.connections.check_params(request.params)
        number, self._count = self._count, self._count + 1
        authors = cast("list[Assistant]", self.connections.authors)  # a sequence asks for their limits only
        self._waiting.append(Sequence(number, request, authors, self.tokenizer, self.eos_ids))
        return number

    def cancel(self, number: int) -> None:
        """Drop a running or waiting request and cancel its calls."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.number != number)
        running = self._active.pop(number, None)
        if running is not None:
            running.cancel()

    def close(self) -> None:
        """Drop all requests."""
        self._waiting.clear()
        for number in list(self._active):
            self.cancel(number)

    def step(self) -> list[RequestOutput]:
        """Start waiting requests and return new outputs in order. Waits briefly if there are none."""
        while self._waiting and len(self._active) < self.max_batch:
            sequence = self._waiting.popleft()
            run = Run(sequence, self.connections.authors, self._outputs.put)
            self._active[sequence.number] = self.connections.start(self._decode(run))
        outputs = []
        try:
            outputs.append(self._outputs.get(timeout=_STEP_WAIT_S))
            while True:
                outputs.append(self._outputs.get_nowait())
        except queue.Empty:
            pass
        outputs = [output for output in outputs if output.number in self._active]  # without dropped requests
        for output in outputs:
            if output.completion is not None or output.failure is not None:
                self._active.pop(output.number, None)
        cancelled = [number for number, running in self._active.items() if running.cancelled()]
        for number in cancelled:
            del self._active[number]
        return outputs + [RequestOutput(number, failure=ModelFailure(_CLOSED)) for number in cancelled]

    async def _decode(self, run: Run) -> None:
        try:
            while run.sequence.finish_reason is None:
                await self.connections.advance(run)
        except CollmError as error:
            self._outputs.put(RequestOutput(run.sequence.number, failure=error))
        except Exception as error:
            failure = ModelFailure(f"decoding across servers failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._outputs.put(RequestOutput(run.sequence.number, failure=failure))
