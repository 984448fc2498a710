"""The recipe's models with a tokenizer each: what they are taught, before they are trained."""

from __future__ import annotations

import random
from itertools import islice
from typing import get_args

import pytest

from collm.text.alignment import Alignment
from collm.text.text_tokenizer import TextTokenizer
from recipes.facts.lessons import IGNORED
from recipes.facts.two_tokenizers import FactEnds, base_tokenizer, conversations, expert_tokenizer, noisy_facts
from recipes.facts.world import DemoWorld


@pytest.fixture(scope="module")
def world() -> DemoWorld:
    return DemoWorld(seed=0, separator=" ")


@pytest.fixture(scope="module")
def tokenizers(world: DemoWorld) -> list[TextTokenizer]:
    made = base_tokenizer(world), expert_tokenizer(world.domains[0])
    return [TextTokenizer(one, eos_ids=[one.eos_token_id]) for one in made]


def test_names_break_into_other_pieces(world: DemoWorld, tokenizers: list[TextTokenizer]) -> None:
    facts = sorted({" " + statement.fact for statement in world.statements})
    pieces = [[one.tokenizer.tokenize(fact) for fact in facts] for one in tokenizers]
    assert sum(a != b for a, b in zip(*pieces, strict=True)) > len(facts) / 2
    assert sum(map(len, pieces[0])) > 1.5 * sum(map(len, pieces[1]))


def test_words_of_answers_are_segments(world: DemoWorld, tokenizers: list[TextTokenizer]) -> None:
    alignment = Alignment(tokenizers)
    for row in world.test[:50]:
        answer = row["completion"].encode()
        boundaries = set(alignment.boundaries(answer))
        words = [at for at in range(1, len(answer)) if answer[at : at + 1] == b" "]
        assert set(words) <= boundaries


def test_the_base_learns_answers_and_their_ends(world: DemoWorld, tokenizers: list[TextTokenizer]) -> None:
    base = tokenizers[0]
    for ids, labels in islice(conversations(world, base, random.Random(0)), 20):
        learned = [label for label in labels if label != IGNORED]
        assert ids[-len(learned) :] == learned
        assert learned[-1] in base.eos_ids
        answer = (base.spell(learned[:-1]) or b"").decode()
        assert answer.startswith(" ")
        assert any(statement.before in answer for statement in world.statements)


@pytest.mark.parametrize("fact_ends", get_args(FactEnds))
def test_an_expert_learns_facts_and_where_they_end(
    world: DemoWorld, tokenizers: list[TextTokenizer], fact_ends: FactEnds
) -> None:
    expert, facts = tokenizers[1], {statement.fact for statement in world.statements}
    for _, labels in islice(noisy_facts(world.domains[0], expert, random.Random(0), fact_ends), 40):
        learned = [label for label in labels if label != IGNORED]
        fact, rest = (learned, []) if fact_ends == "unknown" else (learned[:-1], learned[-1:])
        assert (expert.spell(fact) or b"").decode().strip() in facts
        if rest:
            assert (expert.spell(rest) or b"").decode()[0].isalnum() == (fact_ends == "never")
