"""The requests that one HTTP request submits to a worker, and their outputs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from collm.core.types import TokenStep
from collm.decoding.engine import RequestOutput
from collm.decoding.request import Request
from collm.serving.errors import APIError, of_failure


@dataclass(frozen=True)
class TokenOutput:
    """A token of request number `index` of a submission. The last token has a `finish_reason`."""

    index: int
    step: TokenStep
    finish_reason: str | None


class Owner(Protocol):
    """The worker that decodes a submission. Its name is that of the collaboration."""

    name: str

    def drop(self, submission: Submission) -> None:
        """Drop the unfinished requests of a submission."""

    def finish(self, submission: Submission) -> None:
        """Count a finished request of a submission."""


class Submission:
    """Requests that begin and end together. Methods must be called in the event loop's thread.

    Attributes:
        requests: the requests by index.
        unfinished: number of running and waiting requests.
    """

    def __init__(self, requests: Sequence[Request], owner: Owner) -> None:
        self.requests = requests
        self.unfinished = len(requests)
        self._owner = owner
        self._outputs: list[TokenOutput] = []
        self._failure: APIError | None = None
        self._arrived = asyncio.Event()

    async def outputs(self) -> list[TokenOutput]:
        """Wait for new tokens. Returns all tokens since the last call, or none if all requests are finished.

        Raises:
            APIError: the submission failed.
        """
        if self.unfinished or self._failure:
            await self._arrived.wait()
        self._arrived.clear()
        outputs, self._outputs = self._outputs, []
        if self._failure is not None:
            raise self._failure
        return outputs

    def fail(self, error: APIError) -> None:
        """End the requests with an error. Their slots are free before the next step."""
        if self.unfinished:
            self._failure = error
            self._arrived.set()
            self.close()

    def close(self) -> None:
        """Drop the unfinished requests."""
        if self.unfinished:
            self._owner.drop(self)

    def receive(self, index: int, output: RequestOutput) -> None:
        """Handle an output of the engine."""
        if not self.unfinished:
            return
        if output.failure is not None:
            self.fail(of_failure(output.failure, self._owner.name))
            return
        assert output.step is not None
        finish_reason = output.completion.finish_reason if output.completion else None
        self._outputs.append(TokenOutput(index, output.step, finish_reason))
        self._arrived.set()
        if finish_reason is not None:
            self._owner.finish(self)
