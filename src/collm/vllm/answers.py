"""Strict parsing of servers' answers: token ids with log-probabilities. A ValueError says what is wrong."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from collm.engine.candidates import Likely

_ROUNDING_NATS = 1e-3
_ENDINGS = (None, "stop", "length")


@dataclass(frozen=True)
class GeneratedToken:
    """A token that a server generated.

    Attributes:
        token_id: the token.
        logprob: its log-probability, in nats.
        about: log-probabilities of the tokens that the request named, in nats, by token id.
    """

    token_id: int
    logprob: float
    about: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """A complete answer, or one event of a stream.

    Attributes:
        written: the tokens; may be empty.
        last: whether the answer ends here.
    """

    written: list[GeneratedToken]
    last: bool


class ErrorEventError(Exception):
    """A server sent an error in place of an answer."""

    def __init__(self, error: Any) -> None:
        super().__init__(str(error)[:300])
        code = error.get("code") if isinstance(error, dict) else None
        self.status = code if isinstance(code, int) and code >= 400 else 500


def read_piece(text: str, prompt: Sequence[int], vocab_size: int) -> Piece:
    """Parse a complete answer or one event of a stream.

    Args:
        prompt: the token ids that were sent. An answer that echoes other ids is refused.
        vocab_size: all token ids must be below this number.

    Raises:
        ErrorEventError: the server reported an error.
        ValueError: the answer has another format.
    """
    choice = _choice(text)
    if choice is None:
        return Piece([], last=False)
    try:
        echoed, ending = choice.get("prompt_token_ids"), choice.get("finish_reason")
        logprobs = choice.get("logprobs") or {"token_logprobs": []}
        token_ids, values = choice["token_ids"], logprobs["token_logprobs"]
        about = logprobs.get("top_logprobs") or [{}] * len(token_ids)
        triples = list(zip(token_ids, values, about, strict=True))
        wrong = [token for token in token_ids if type(token) is not int or token < 0]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not a token id")
        written = [GeneratedToken(token, _logprob(value), _logprobs(top)) for token, value, top in triples]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} {error} in {text[:200]}") from error
    if echoed is not None and echoed != list(prompt):
        raise ValueError("the answer's prompt_token_ids are not the token ids that were sent")
    if ending not in _ENDINGS:
        raise ValueError(f"the answer ended with finish_reason {ending!r}, expected 'stop' or 'length'")
    outside = [one.token_id for one in written if one.token_id >= vocab_size]
    if outside:
        raise ValueError(f"got token id {outside[0]}, expected ids below {vocab_size}; the server has another model")
    return Piece(written, last=ending is not None)


def read_likely(text: str, count: int) -> list[Likely]:
    """Parse the most probable tokens, with their probabilities, at each of the last `count` tokens of a prompt.

    Raises:
        ErrorEventError, ValueError: as in `read_piece`.
    """
    choice = _choice(text) or {}
    try:
        positions = choice["prompt_logprobs"][-count:]
        logprobs = [{int(token): _logprob(entry["logprob"]) for token, entry in at.items()} for at in positions]
        if len(logprobs) != count:
            raise ValueError(f"got log-probabilities at {len(logprobs)} positions, expected {count}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} {error} in {text[:200]}") from error
    ranked = [sorted(at.items(), key=lambda item: -item[1]) for at in logprobs]
    return [[(token, math.exp(logprob)) for token, logprob in at] for at in ranked]


async def event_data(lines: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """Yield the data of server-sent events of one line each, as OpenAI's are. The final [DONE] is left out."""
    async for line in lines:
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield data


def retry_after_s(value: str) -> float:
    """Parse a Retry-After header: seconds or a date. Returns seconds; 0 if it is neither."""
    with suppress(ValueError, TypeError):
        return float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    return 0.0


def _choice(text: str) -> dict[str, Any] | None:
    """The first choice of an answer; None for an event without choices, such as usage."""
    try:
        event = json.loads(text)
        if event.get("error"):
            raise ErrorEventError(event["error"])
        return event["choices"][0] if event["choices"] else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the answer has no choices: {text[:200]}") from error


def _logprob(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value <= _ROUNDING_NATS:
        raise ValueError(f"{value!r} is not a log-probability; start vLLM with its default --logprobs-mode")
    return float(value)


def _logprobs(top: dict[str, Any]) -> dict[int, float]:
    return {int(key.removeprefix("token_id:")): _logprob(value) for key, value in top.items()}
