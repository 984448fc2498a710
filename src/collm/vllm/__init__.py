"""Collaborations on vLLM. Names here are also read inside vLLM, so this file imports nothing."""

NOTE = "collm_vllm.json"
"""File beside an exported base that says which rows of its output layer mean whom."""

NOTE_FORMAT = 1

ROW_SCALE = 0.125
"""What rows hold of a defer logit, less its bias: a row at its full size would drown the tokens in the normaliser that
a server's log-probabilities share. A power of two, so nothing is rounded."""

THRESHOLD = "defer_threshold"
"""Key of a request's `vllm_xargs`: the base defers where its defer prob exceeds this."""

POLICY = "defer_policy"
"""Key of a request's `vllm_xargs` to one engine: another rule than the threshold, as `core.named` reads it."""

AUTHORS = "defer_authors"
"""Key of a request's `vllm_xargs` to one engine: true if the second log-probability of each token is to say who wrote
it (`author_of`) and hold the logarithm of the defer prob there."""

HEAD = "defer_head"
"""Key of a request's `vllm_xargs` to one engine: the head that it must hold (`export_manifest.head_digest`)."""

OF_ONE_ENGINE = (POLICY, AUTHORS, HEAD)
"""What other servers do not understand."""

PREFIX = "defer_"
"""Of all keys above."""

PROPOSER = "collm.vllm.inline.Proposer"
"""What vLLM's `speculative_config` calls the base inside one engine."""

FAILED = -1
"""What a worker of one engine says of a request's NaNs, to have the scheduler end it with an error."""

SETTINGS = "collm"
"""Key of vLLM's `additional_config` for what one engine needs to know."""


def author_token(author: int, taken: set[int]) -> int:
    """A token id that says who wrote a token: of those with the author's number modulo 2 the least that is not taken.

    Args:
        taken: the tokens beside it, of which the reply has each once.
    """
    while author in taken:
        author += 2
    return author


def author_of(token_id: int) -> int:
    """The author that `author_token` named: 0 the base, 1 the assistant."""
    return token_id % 2
