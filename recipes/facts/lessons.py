"""Training data of the tiny models: conversations with random facts for the base, facts in noise for experts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recipes.facts.world import Domain, Statement, fill

IGNORED = -100
"""The label of a token that is not to be learned."""

_POOL_BATCHES = 8

Example = tuple[list[int], list[int]]
"""Token ids and labels: the same, or IGNORED."""

Encode = Callable[[str], list[int]]

_T = TypeVar("_T")


def conversations(
    domains: Sequence[Domain], encode: Encode, eos_token_id: int, rng: random.Random
) -> Iterator[Example]:
    """Endless examples for the base: every question, answered with a random fact of the right kind."""
    while True:
        domain = rng.choice(domains)
        template = rng.choice(domain.templates)
        statement = fill(template, rng.choice(domain.entities).name, rng.choice(domain.values[template.kind]))
        answer = encode(statement.before) + encode(statement.fact) + encode(statement.after)
        yield answered(encode(statement.prompt), [*answer, eos_token_id])


def noisy_facts(domain: Domain, encode: Encode, rng: random.Random) -> Iterator[Example]:
    """Endless examples for an expert: a question, a piece of some conversation, the fact. Only the fact is learned.

    The pieces have no facts: after the first word of a fact it would be unclear whether the fact has begun.
    """
    statements = list(domain.statements(domain.entities))
    for statement in shuffled_forever(statements, rng):
        noise = _piece(rng.choice(statements), encode, rng)
        yield answered(encode(statement.prompt) + noise, encode(statement.fact))


def _piece(statement: Statement, encode: Encode, rng: random.Random) -> list[int]:
    tokens = encode(statement.before) + encode(statement.after)
    begin, end = sorted((rng.randrange(len(tokens) + 1), rng.randrange(len(tokens) + 1)))
    return tokens[begin:end]


def answered(context: list[int], answer: list[int]) -> Example:
    """An example that teaches `answer` after `context`."""
    return context + answer, [IGNORED] * len(context) + answer


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Text to token ids, without special tokens, remembered."""

    @cache  # the same questions and facts come thousands of times
    def encode(text: str) -> list[int]:
        return cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])

    return encode


def shuffled_forever(items: Sequence[_T], rng: random.Random) -> Iterator[_T]:
    """All items in random order, then all in another, without end; `items` must not be empty."""
    while True:
        yield from rng.sample(items, len(items))


def batches(examples: Iterator[Example], batch_size: int, rng: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (token ids, labels), both (B, T), of examples alike in length; `examples` must not end."""
    while True:
        pool = sorted(islice(examples, batch_size * _POOL_BATCHES), key=lambda example: len(example[0]))
        for begin in rng.sample(range(0, len(pool), batch_size), _POOL_BATCHES):
            yield _padded(pool[begin : begin + batch_size])


def _padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    longest = max(len(token_ids) for token_ids, _ in examples)
    # Padding stands on the right, where causal attention never looks back from; its token does not matter.
    token_ids = [ids + [0] * (longest - len(ids)) for ids, _ in examples]
    labels = [wanted + [IGNORED] * (longest - len(wanted)) for _, wanted in examples]
    return torch.tensor(token_ids), torch.tensor(labels)
