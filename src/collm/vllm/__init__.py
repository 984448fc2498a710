"""Decoding on vLLM. This file holds names that collm also reads inside vLLM, so it imports nothing."""

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
"""Key of a request's `vllm_xargs`, for one engine only.

If true, the second log-probability at each token describes its author: the token id encodes the author (`author_of`),
and the value is the logarithm of the defer prob.
"""

HEAD = "defer_head"
"""Key of a request's `vllm_xargs`, for one engine only: the digest of the head that the engine must have
(`export.head_digest`).
"""

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


def author_token(author: int, taken: set[int]) -> int:
    """Return the token id that encodes the author of a token.

    It is the least id that is not taken and has the author's number modulo 2.

    Args:
        author: 0 for the base, 1 for the assistant.
        taken: ids that the reply already lists for this token. A reply lists each id once.
    """
    while author in taken:
        author += 2
    return author


def author_of(token_id: int) -> int:
    """Return the author that `author_token` encoded: 0 for the base, 1 for the assistant."""
    return token_id % 2
