"""Calls to OpenAI-compatible servers: time limits, retries, the API key, errors, and strict reading of answers."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

import anyio

from collm.errors import ConfigError, LoadError, ModelFailure

if TYPE_CHECKING:
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_URL = re.compile(r"https?://[^\s/@?#]+(/[^\s@?#]*)?")
_SOCKET = re.compile(r"http://(%2[Ff][^/]+)")
_LONGEST_PAUSE_S = 30.0
TRIPS_AFTER, COOLS_S = 3, 10.0
_IDLE_S = 3.0
"""Time until an unused connection is closed. vLLM closes it after five seconds, perhaps at the moment of a request."""
_OUTAGES = {408, 429, 502, 503, 504}
"""Status codes that concern the server and not the request."""
_NOT_IMPLEMENTED = 501
_MALFORMED = (LookupError, TypeError, AttributeError, RecursionError)
_LEAST_LOGPROB, _ROUNDING_NATS = -3.4e38, 1e-3


class Unreachable(ModelFailure):
    """A server that did not answer in any attempt."""


class Refused(ModelFailure):
    """A request that a server refused: its `status`, and the server's `reason`."""

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class FailedAttempt(Exception):  # noqa: N818
    """A failed attempt that may succeed if it is repeated. In an `outage` the server serves nobody."""

    def __init__(self, reason: str, *, outage: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.outage, self.wait_s = outage, wait_s


class CircuitBreaker:
    """Blocks calls for ten seconds after three failures in a row, then admits one trial call."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures = 0
        self._clock = clock
        self._open_until = 0.0

    @property
    def tripped(self) -> bool:
        """Whether an admitted call is a trial call."""
        return self.failures >= TRIPS_AFTER

    def shut_s(self) -> float:
        """Return for how many seconds calls are blocked. 0 admits one call, which blocks others while it is a trial."""
        left = self._open_until - self._clock()
        if not self.tripped:
            return 0.0
        if left <= 0:
            self._open_until = self._clock() + COOLS_S
        return max(left, 0.0)

    def failed(self) -> None:
        self.failures += 1
        self._open_until = self._clock() + COOLS_S

    def succeeded(self) -> None:
        self.failures = 0


@dataclass(frozen=True)
class CallSettings:
    """Settings for calls. Raises a ConfigError if one is out of range.

    Attributes:
        timeout_s: longest wait for an answer.
        retries: number of further attempts.
        api_key_env: environment variable that holds the API key. If None, no key is sent.
        waits_s: the longest first pause, and the longest of all.
        sleep: awaited between attempts, with the seconds to wait.
    """

    timeout_s: float
    retries: int
    api_key_env: str | None = None
    waits_s: tuple[float, float] = (0.5, 3600.0)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError(f"timeout_s is {self.timeout_s}, expected a finite number of seconds above 0")
        if self.retries < 0:
            raise ConfigError(f"retries is {self.retries}, expected at least 0")


class HttpClient:
    """Calls to one server, for use in one event loop. `aclose` closes the connections.

    A call is repeated after a connection error, a timeout, status 429 or 5xx, or an unusable answer. The pauses double,
    or follow Retry-After. `CircuitBreaker` counts calls in a row without an answer. Failures that concern one request,
    such as status 500 or an unusable answer, do not count.

    Args:
        name: the server's name in messages.
        url: the base URL. The host `%2Ftmp%2Fbase.sock` is the Unix socket /tmp/base.sock.
    """

    def __init__(self, name: str, url: str, settings: CallSettings) -> None:
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # every version re-exports it

        self.url = url
        self.where = f"{name} at {url}"
        self.settings = settings
        self.sleep = settings.sleep
        self.breaker = CircuitBreaker()
        self._key = read_key(settings.api_key_env)
        self._random = random.Random()
        self._httpx = httpx
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_S)
        options: Any = {"transport": socket_transport(url, limits=limits), "verify": url.startswith("https")}
        self._client: httpx.AsyncClient = httpx.AsyncClient(headers=headers, timeout=None, limits=limits, **options)
        self.aclose = self._client.aclose

    async def call(self, url: str, body: Any, read: Callable[[str], T]) -> T:
        """POST `body`, or GET if it is None, with retries. If `read` raises a ValueError, the answer is unusable.

        Raises:
            Unreachable: no attempt was answered.
            Refused: the server refuses the request.
            ModelFailure: the server gives no usable answer.
        """
        return await self.with_retries(lambda: self.attempt(url, body, read))

    async def attempt(self, url: str, body: Any, read: Callable[[str], T], *, limit_s: float | None = None) -> T:
        """Call once. Raises FailedAttempt if a repetition may succeed."""
        limit_s = self.settings.timeout_s if limit_s is None else limit_s
        with self.translated_errors(limit_s):
            with anyio.fail_after(limit_s):
                async with aclosing(self.events(url, body)) as texts:
                    text = await anext(texts)
            return read_strictly(text, read)

    async def with_retries(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat an attempt until it succeeds, fails for good or there are no retries left. Raises as `call` does."""
        self.check_breaker()
        failed = 0
        while True:
            try:
                result = await attempt()
            except FailedAttempt as failure:
                failed += 1
                await self.pause(failure, failed)
            except ModelFailure:
                self.breaker.succeeded()
                raise
            else:
                self.breaker.succeeded()
                return result

    async def events(self, url: str, body: Any) -> AsyncGenerator[str, None]:
        """POST `body`, or GET if it is None. Yield the data of server-sent events of one line each, or the whole text
        of any other answer.
        """
        async with self._client.stream("GET" if body is None else "POST", url, json=body) as reply:
            if reply.status_code == 200 and "event-stream" in reply.headers.get("Content-Type", ""):
                async for line in reply.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        yield data
                return
            await reply.aread()
            if reply.status_code != 200:
                raise self._error(reply.status_code, reply.text, _retry_after_s(reply.headers.get("Retry-After", "")))
            yield reply.text

    # Attempts

    def check_breaker(self) -> None:
        """Raise Unreachable while the circuit breaker blocks calls."""
        shut_s = self.breaker.shut_s()
        if shut_s:
            raise Unreachable(
                f"{self.where} did not answer {self.breaker.failures} calls in a row and is not called for "
                f"{shut_s:.0f} s; check that the server runs"
            )

    async def pause(self, failure: FailedAttempt, failed: int) -> None:
        """Wait before the next attempt, or raise if there is none."""
        if failed > self.settings.retries or (self.breaker.tripped and failure.outage):
            count, last = f"{failed} time{'s' * (failed > 1)}", f"the last time: {failure}; check"
            if failure.outage:
                self.breaker.failed()
                raise Unreachable(f"{self.where} failed {count}, {last} that the server runs") from None
            self.breaker.succeeded()
            problem = f"gave no usable answer {count}, expected token ids with log-probabilities"
            raise ModelFailure(f"{self.where} {problem}, {last} which model it serves") from None
        first_s, longest_s = self.settings.waits_s
        pause_s = min(first_s * 2.0 ** (failed - 1), _LONGEST_PAUSE_S, longest_s) * self._random.uniform(0.5, 1.0)
        wait_s = min(max(pause_s, failure.wait_s), longest_s)
        attempts = self.settings.retries + 1
        _LOG.warning("%s: %s; attempt %d of %d in %.1f s", self.where, failure, failed + 1, attempts, wait_s)
        await self.sleep(wait_s)

    @contextmanager
    def translated_errors(self, limit_s: float) -> Iterator[None]:
        """Translate the exceptions of an attempt into `FailedAttempt`."""
        try:
            yield
        except TimeoutError as error:
            raise FailedAttempt(f"no answer within {limit_s:g} s", outage=True) from error
        except self._httpx.TransportError as error:
            raise FailedAttempt(f"{type(error).__name__} {error}".strip(), outage=True) from error
        except (self._httpx.HTTPError, ValueError) as error:
            raise FailedAttempt(self.redacted(str(error))) from error

    def _error(self, status: int, text: str, wait_s: float = 0.0) -> Exception:
        """The exception for a status other than 200."""
        reason = f"status {status} {' '.join(self.redacted(text).split())[:300]}".strip()
        if status in _OUTAGES or (status >= 500 and status != _NOT_IMPLEMENTED):
            return FailedAttempt(reason, outage=status in _OUTAGES, wait_s=wait_s)
        advice = "check the address, which ends in /v1 for vLLM, and the model that it serves"
        if status in (401, 403):
            variable = self.settings.api_key_env
            advice = f"check the key in {variable}" if variable else "name the key's environment variable (api_key_env)"
        return Refused(f"{self.where} refuses a request: {reason}; {advice}", status, reason)

    def redacted(self, text: str) -> str:
        """The text without the API key."""
        return text.replace(self._key, "***") if self._key else text

    # Answers

    def first_choice(self, text: str) -> dict[str, Any] | None:
        """The first choice of a completion or of an event; None for an event without choices, such as usage.

        Raises a ValueError if the text is neither, and FailedAttempt or Refused if it reports an error.
        """
        try:
            event = json.loads(text)
            error = event.get("error")
            if not error:
                return event["choices"][0] if event["choices"] else None
        except (ValueError, *_MALFORMED) as failure:
            raise ValueError(f"the answer has no choices: {text[:200]}") from failure
        code = error.get("code") if isinstance(error, dict) else None
        raise self._error(code if isinstance(code, int) and code >= 400 else 500, str(error)[:300])

    def models(self, text: str) -> dict[str, Any]:
        """Read a list of models: names, with the largest length that vLLM states. Raises a LoadError if it is none."""
        try:
            return {str(card["id"]): card.get("max_model_len") for card in json.loads(text)["data"]}
        except (ValueError, *_MALFORMED):
            raise LoadError(f"GET {self.url}/models returned no list of models; check the address") from None


def read_strictly(text: str, read: Callable[[str], T]) -> T:
    """Call `read`. Raises a ValueError if the text has another form."""
    try:
        return read(text)
    except _MALFORMED as error:
        raise ValueError(f"{type(error).__name__} {error} in {text[:200]}") from error


def logprob(value: Any) -> float:
    """Check a log-probability, in nats. Raises a ValueError if it is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not _LEAST_LOGPROB <= value <= _ROUNDING_NATS:
        raise ValueError(f"{value!r} is not a log-probability; start vLLM with its default --logprobs-mode")
    return float(value)


def check_echo(choice: dict[str, Any], prompt: Sequence[int]) -> None:
    """Raise a ValueError if an answer repeats other token ids than were sent."""
    if choice.get("prompt_token_ids") not in (None, list(prompt)):
        raise ValueError("the answer's prompt_token_ids are not the token ids that were sent")


def check_url(name: str, url: str) -> None:
    """Raise a ConfigError without the text, which may hold a key, if it is not the base URL of a server."""
    with suppress(ValueError):
        if _URL.fullmatch(url) and urlsplit(url).port != 0:
            return
    raise ConfigError(
        f"{name} is not a URL like http://localhost:8001/v1 without a user or key; pass a key with api_key_env"
    )


def read_key(variable: str | None) -> str:
    """The API key in an environment variable; empty if None is named. Raises a ConfigError if it holds no key."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not (key and key.isascii() and key.isprintable()):
        raise ConfigError(f"the environment variable {variable} holds no key (printable ASCII); set it")
    return key


def socket_transport(url: str, **options: Any) -> httpx.AsyncHTTPTransport | None:
    """The transport to a server that listens on a Unix socket; None for another server."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    host = _SOCKET.match(url)
    return httpx.AsyncHTTPTransport(uds=unquote(host[1]), **options) if host else None


def _retry_after_s(value: str) -> float:
    """Parse a Retry-After header: seconds or a date. Returns seconds; 0 if it is neither."""
    with suppress(ValueError, TypeError):
        return float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    return 0.0
