"""Requests that one HTTP request makes of a worker, and what has come of them so far."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from collm.core.types import TokenStep
from collm.decoding.engine import RequestOutput
from collm.decoding.request import Request
from collm.errors import CollmError
from collm.serving.errors import APIError, of_failure

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenOutput:
    """A token of a submission's request number `index`; `finish_reason` comes with the last."""

    index: int
    step: TokenStep
    finish_reason: str | None


class Owner(Protocol):
    """Who decodes a submission, under the name of the collaboration."""

    name: str

    def drop(self, submission: Submission) -> None:
        """Forget what is unfinished of a submission."""

    def finish(self, submission: Submission) -> None:
        """One more request of it is finished."""


class Submission:
    """Requests that came together and end together. All methods are for the event loop's thread.

    Attributes:
        requests: in the order of their indices.
        unfinished: how many still run or wait.
    """

    def __init__(self, requests: Sequence[Request], owner: Owner) -> None:
        self.requests = requests
        self.unfinished = len(requests)
        self._owner = owner
        self._outputs: list[TokenOutput] = []
        self._failure: APIError | None = None
        self._arrived = asyncio.Event()

    async def outputs(self) -> list[TokenOutput]:
        """All tokens since the last call, at least one; nothing once everything is finished.

        Raises:
            APIError: the requests failed, or were failed.
        """
        if self.unfinished or self._failure:
            await self._arrived.wait()
        self._arrived.clear()
        outputs, self._outputs = self._outputs, []
        if self._failure is not None:
            raise self._failure
        return outputs

    def fail(self, refusal: APIError) -> None:
        """End the requests; their slots are free before the next step."""
        if self.unfinished:
            self._failure = refusal
            self._arrived.set()
            self.close()

    def close(self) -> None:
        """Nobody waits for the rest."""
        if self.unfinished:
            self._owner.drop(self)

    def hear(self, index: int, output: RequestOutput) -> None:
        """Take what the engine says of a request."""
        if not self.unfinished:
            return
        if output.failure is not None:
            self._failed(output.failure)
            return
        assert output.step is not None
        finish_reason = output.completion.finish_reason if output.completion else None
        self._outputs.append(TokenOutput(index, output.step, finish_reason))
        self._arrived.set()
        if finish_reason is not None:
            self._owner.finish(self)

    def _failed(self, failure: CollmError) -> None:
        refusal = of_failure(failure)
        if refusal.status >= 500:
            _LOG.error("a request to %s failed: %s", self._owner.name, failure, exc_info=failure)
        self.fail(refusal)
