"""Statistics of a collaboration's answers: deferred tokens, the length of their runs, and answers that got worse."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from collm.core.types import BASE
from collm.evaluation.answers import Answer

NUM_EXAMPLES = 12
"""Maximum number of answers of a kind in a report."""

CLASSES = ("number", "word begins", "word goes on", "punctuation", "white space", "no text")


@dataclass(frozen=True)
class DeferralCount:
    """How often assistants wrote a token or a class of tokens.

    Attributes:
        deferred: number of times that an assistant wrote it.
        total: number of times that any author wrote it.
    """

    name: str
    deferred: int
    total: int

    @property
    def share(self) -> float:
        return self.deferred / self.total


def token_class(text: str) -> str:
    """One of CLASSES for a token's text. "no text" is an EOS or a part of a character."""
    if not text:
        return "no text"
    word = text.strip()
    if not word:
        return "white space"
    if re.fullmatch(r"[\d.,]*\d[\d.,]*%?", word):
        return "number"
    if not any(letter.isalnum() for letter in word):
        return "punctuation"
    return "word begins" if text[0].isspace() else "word goes on"


def deferred_tokens(answers: Sequence[Answer], most: int = 20) -> list[DeferralCount]:
    """The texts of the tokens that assistants wrote most often."""
    return _counted(answers, lambda text: text)[:most]


def deferred_classes(answers: Sequence[Answer]) -> list[DeferralCount]:
    """All classes of tokens in the answers, the most often deferred first."""
    return _counted(answers, token_class, everything=True)


def _counted(
    answers: Sequence[Answer], name_of: Callable[[str], str], *, everything: bool = False
) -> list[DeferralCount]:
    written = [
        (name_of(text), author)
        for answer in answers
        for text, author in zip(answer.token_texts, answer.authors, strict=True)
    ]
    total = Counter(name for name, _ in written)
    deferred = Counter(name for name, author in written if author != BASE)
    names = total if everything else deferred
    return sorted(
        (DeferralCount(name, deferred[name], total[name]) for name in names), key=lambda one: (-one.deferred, one.name)
    )


def run_lengths(answers: Sequence[Answer]) -> dict[int, int]:
    """The number of runs of assistant tokens, by length."""
    lengths = Counter(
        len(list(run)) for answer in answers for author, run in groupby(answer.authors, lambda a: a != BASE) if author
    )
    return dict(sorted(lengths.items()))


def shown(
    own: Sequence[Answer], base: Mapping[str, Answer], measure: str | None
) -> tuple[Sequence[Answer], Sequence[Answer]]:
    """The answers that a report shows token by token: the first ones, and the first that were led astray."""
    return own[:NUM_EXAMPLES], led_astray(own, base, measure or "")[:NUM_EXAMPLES]


def led_astray(own: Sequence[Answer], base: Mapping[str, Answer], measure: str) -> list[Answer]:
    """Answers with assistant tokens that score lower than those of the base alone."""
    return [
        answer
        for answer in own
        if any(author != BASE for author in answer.authors)
        and answer.id in base
        and measure in answer.scores
        and answer.scores[measure] < base[answer.id].scores.get(measure, 0.0)
    ]
