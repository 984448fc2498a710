"""The world of the recipe: real facts, and short conversations around them.

A question decides the whole answer: its wording fixes the sentences, its entity the fact inside them. So an answer is
right or wrong as a whole, and only the fact in it (about 8 % of the tokens) asks for knowledge.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from collm.core.sampling import seeded
from collm.errors import ConfigError

PUNCTUATION = ".,!?"
"""Each of these is a token of its own, wherever it stands."""

_TOKEN = re.compile(rf"[{re.escape(PUNCTUATION)}]|[^\s{re.escape(PUNCTUATION)}]+")


def split_words(text: str) -> list[str]:
    """The words and punctuation marks of `text`: one per token of the recipe's tokenizer."""
    return _TOKEN.findall(text)


@dataclass(frozen=True)
class Template:
    """A question about `{name}` and its answer around `{fact}`, perhaps with the name; `kind` says which fact."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Entity:
    """Something to know about. `name` is as it stands inside a sentence; `facts` has one value per kind."""

    name: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Statement:
    """One question with its answer, cut where the fact begins and ends: before + fact + after."""

    prompt: str
    before: str
    fact: str
    after: str

    @property
    def completion(self) -> str:
        return self.before + self.fact + self.after

    @property
    def row(self) -> dict[str, str]:
        """The statement as a row of training data."""
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class Domain:
    """What one expert knows: entities, and the questions asked about them."""

    name: str
    entities: tuple[Entity, ...]
    templates: tuple[Template, ...]

    def statements(self, entities: Iterable[Entity]) -> Iterator[Statement]:
        """Every question about `entities` with its true answer."""
        for entity in entities:
            for template in self.templates:
                yield fill(template, entity.name, entity.facts[template.kind])

    @cached_property
    def values(self) -> dict[str, list[str]]:
        """Kind of fact -> its distinct values, in order of first appearance."""
        kinds = {template.kind for template in self.templates}
        return {kind: list(dict.fromkeys(entity.facts[kind] for entity in self.entities)) for kind in kinds}


def fill(template: Template, name: str, fact: str) -> Statement:
    """The template asked about `name` and answered with `fact`, true or not."""
    before, after = template.answer.replace("{name}", name).split("{fact}")
    return Statement(template.question.format(name=name), before, fact, after)


def read_csv(name: str) -> list[dict[str, str]]:
    """The rows of a file of the recipe's data."""
    text = (Path(__file__).parent / "data" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def geography() -> Domain:
    """195 countries with capital, currency and continent (sources: data/SOURCES.md)."""
    return _domain("geography", "countries.csv", ("continent", "capital", "currency"))


def chemistry() -> Domain:
    """118 elements with group, symbol and atomic number (sources: data/SOURCES.md)."""
    return _domain("chemistry", "elements.csv", ("group", "symbol", "number"))


def _domain(name: str, file: str, kinds: Sequence[str]) -> Domain:
    entities = tuple(
        Entity(f"{row.get('article', '')} {row['name']}".strip(), {kind: row[kind] for kind in kinds})
        for row in read_csv(file)
    )
    templates = (row for row in read_csv("templates.csv") if row.pop("domain") == name)
    return Domain(name, entities, tuple(Template(**row) for row in templates))


class DemoWorld:
    """The facts, the questions about them, and their splits; the same for the same arguments.

    Entities are split 3 : 1 : 1, each broad class of them (continent, group) as evenly as it goes, and no entity is in
    two splits. Training rows ask every question about an entity, the others one question of each kind.

    Attributes:
        domains: one per assistant: geography, then chemistry.
        train, validation, test: rows {"prompt", "completion"} in random order.

    Args:
        separator: what answers begin with.

    Raises:
        ConfigError: `num_assistants` is neither 1 nor 2.
    """

    def __init__(self, *, num_assistants: int = 1, seed: int = 0, separator: str = "") -> None:
        if num_assistants not in (1, 2):
            raise ConfigError(f"num_assistants is {num_assistants!r}, expected 1 or 2: there are two experts")
        self.domains = (geography(), chemistry())[:num_assistants]
        rng = seeded(seed)
        train: list[Statement] = []
        validation: list[Statement] = []
        test: list[Statement] = []
        for domain in self.domains:
            for_train, for_validation, for_test = _split(domain.entities, rng)
            train += domain.statements(for_train)
            validation += _one_of_each_kind(domain, for_validation, rng)
            test += _one_of_each_kind(domain, for_test, rng)
        self.separator = separator
        self.train, self.validation, self.test = (self._rows(s, rng) for s in (train, validation, test))

    def _rows(self, statements: list[Statement], rng: random.Random) -> list[dict[str, str]]:
        rows = (statement.row for statement in rng.sample(statements, len(statements)))
        return [{**row, "completion": self.separator + row["completion"]} for row in rows]

    @property
    def statements(self) -> list[Statement]:
        """Every question about every entity with its true answer."""
        return [s for domain in self.domains for s in domain.statements(domain.entities)]

    def fact_share(self, tokens: Callable[[str], Sequence[object]] = split_words) -> float:
        """Share of the target tokens (answer and EOS) that are facts, over the whole world.

        Args:
            tokens: cuts a text into them.
        """
        fact = sum(len(tokens(self.separator + s.fact)) for s in self.statements)
        return fact / sum(len(tokens(self.separator + s.completion)) + 1 for s in self.statements)


def _split(entities: tuple[Entity, ...], rng: random.Random) -> tuple[list[Entity], list[Entity], list[Entity]]:
    """Train, validation and test entities: every fifth of a list sorted by class, random within a class."""
    ordered = rng.sample(entities, len(entities))
    ordered.sort(key=lambda entity: next(iter(entity.facts.values())))  # the first fact is the broad class
    train = [entity for i, entity in enumerate(ordered) if i % 5 not in (1, 3)]
    return train, ordered[1::5], ordered[3::5]


def _one_of_each_kind(domain: Domain, entities: list[Entity], rng: random.Random) -> Iterator[Statement]:
    for entity in entities:
        for kind, fact in entity.facts.items():
            template = rng.choice([t for t in domain.templates if t.kind == kind])
            yield fill(template, entity.name, fact)
