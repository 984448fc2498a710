"""What servers answer, read strictly: token ids with log-probabilities. A ValueError says what is wrong."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from collm.decoding.candidates import Likely

_ROUNDING_NATS = 1e-3
_ENDINGS = (None, "stop", "length")


@dataclass(frozen=True)
class Written:
    """A token that a server wrote, its log-probability in nats, and those of the tokens that were asked about."""

    token_id: int
    logprob: float
    about: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """An answer or a piece of one.

    Attributes:
        written: tokens, perhaps none.
        last: nothing follows.
    """

    written: list[Written]
    last: bool


class ErrorEventError(Exception):
    """A server reported an error in the place of an answer."""

    def __init__(self, error: Any) -> None:
        super().__init__(str(error)[:300])
        code = error.get("code") if isinstance(error, dict) else None
        self.status = code if isinstance(code, int) and code >= 400 else 500


def read_piece(text: str, prompt: Sequence[int], vocab_size: int) -> Piece:
    """The tokens of an event or a whole answer.

    Args:
        prompt: token ids that were sent; an answer that repeats others is refused.
        vocab_size: ids that may come.

    Raises:
        ErrorEventError: it says that there was an error.
        ValueError: it is something else.
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
        written = [Written(_token(token), _logprob(value), _about(of)) for token, value, of in triples]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} {error} in {text[:200]}") from error
    if echoed is not None and echoed != list(prompt):
        raise ValueError("its prompt_token_ids are not the token ids that were sent")
    if ending not in _ENDINGS:
        raise ValueError(f"it ended with finish_reason {ending!r}")
    outside = [one.token_id for one in written if one.token_id >= vocab_size]
    if outside:
        raise ValueError(f"token id {outside[0]}, expected ids below {vocab_size}: it serves another model")
    return Piece(written, last=ending is not None)


def read_likely(text: str, count: int) -> list[Likely]:
    """The most probable tokens, with their probabilities, at each of the last `count` tokens of a prompt.

    Raises:
        ErrorEventError, ValueError: as of `read_piece`.
    """
    choice = _choice(text) or {}
    try:
        places = choice["prompt_logprobs"][-count:]
        read = [{int(token): _logprob(entry["logprob"]) for token, entry in place.items()} for place in places]
        if len(read) != count:
            raise ValueError(f"{len(read)} places for {count} tokens")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} {error} in {text[:200]}") from error
    ranked = [sorted(place.items(), key=lambda item: -item[1]) for place in read]
    return [[(token, math.exp(logprob)) for token, logprob in place] for place in ranked]


async def event_data(lines: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """The data of server-sent events that have one line each, as OpenAI's have, without the last, [DONE]."""
    async for line in lines:
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield data


def retry_after_s(value: str) -> float:
    """What a Retry-After header says in seconds or as a date; 0 if neither."""
    with suppress(ValueError, TypeError):
        return float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    return 0.0


def _choice(text: str) -> dict[str, Any] | None:
    """None of an event about something else, usage for example."""
    try:
        event = json.loads(text)
        if event.get("error"):
            raise ErrorEventError(event["error"])
        return event["choices"][0] if event["choices"] else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no choices in {text[:200]}") from error


def _token(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no token id")
    return value


def _logprob(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value <= _ROUNDING_NATS:
        raise ValueError(f"{value!r} is no log-probability; a vLLM needs its default --logprobs-mode")
    return float(value)


def _about(of: dict[str, Any]) -> dict[int, float]:
    return {int(key.removeprefix("token_id:")): _logprob(value) for key, value in of.items()}
