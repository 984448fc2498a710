"""Decoding on vLLM. This file holds names that collm also reads inside vLLM, so it imports nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTE = "collm_vllm.json"
"""File in the directory of an exported base that describes the added rows of its output layer."""

NOTE_FORMAT = 1

ROW_SCALE = 0.125
"""Factor by which an exported row scales its defer logit, without the bias.

At full size a row would dominate the softmax that a server's log-probabilities come from. The factor is a power of two,
so scaling does not round.
"""

THRESHOLD = "defer_threshold"
"""Key of a request's `vllm_xargs`: the base defers where its defer prob exceeds this value."""

POLICY = "defer_policy"
"""Key of a request's `vllm_xargs`, for one engine only: a policy's name (`core.named`), in place of a threshold."""

AUTHORS = "defer_authors"
"""Key of a request's `vllm_xargs`, for one engine only. If true, the second log-probability at each token describes its
author: the token id encodes the author (`author_of`), and the value is the logarithm of the defer prob.
"""

HEAD = "defer_head"
"""Key of a request's `vllm_xargs`, for one engine only: the digest (`export.head_digest`) of the head it must have."""

OF_ONE_ENGINE = (POLICY, AUTHORS, HEAD)
"""Keys that only an engine with base and assistant supports."""

PREFIX = "defer_"
"""Common prefix of all keys above."""

PROPOSER = "collm.vllm.inline.Proposer"
"""Class of the proposer in vLLM's `speculative_config` if one engine holds base and assistant."""

FAILED = -1
"""NaN count that a worker of one engine reports for a failed request. The scheduler then ends it with an error."""

SETTINGS = "collm"
"""Key of vLLM's `additional_config` for the settings of one engine."""


def read_threshold(xargs: Mapping[str, Any]) -> float | None:
    """The threshold in a request's `vllm_xargs`; None if there is none.

    Raises a ValueError if it is not a number from -1 to 1, or a key with our prefix is unknown.
    """
    known = (THRESHOLD, *OF_ONE_ENGINE)
    unknown = sorted(name for name in xargs if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise ValueError(f"vllm_xargs has the unknown key {unknown[0]!r}, expected any of {', '.join(known)}")
    if THRESHOLD not in xargs:
        return None
    value = xargs[THRESHOLD]
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1:
        raise ValueError(f"{THRESHOLD} is {value!r}, expected a number from -1 to 1")
    return value


def author_token(author: int, taken: set[int]) -> int:
    """Return the token id that encodes an author, 0 or 1: the least id with that number modulo 2 that is not taken.

    `taken` holds the ids that the reply already lists for this token. A reply lists each id once.
    """
    while author in taken:
        author += 2
    return author


def author_of(token_id: int) -> int:
    """Return the author that `author_token` encoded: 0 for the base, 1 for the assistant."""
    return token_id % 2
