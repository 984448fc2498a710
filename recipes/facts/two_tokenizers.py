"""Models with different tokenizers: base and experts tokenize names differently."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from collm.atomic import atomic_directory
from collm.text.text_tokenizer import TextTokenizer
from recipes.facts.lessons import IGNORED, Example, shuffled_forever
from recipes.facts.tiny_models import (
    CONTEXT_TOKENS,
    EOS,
    PAD,
    ModelPaths,
    OnStep,
    Progress,
    Recipe,
    save_model,
    trained_model,
)
from recipes.facts.world import DemoWorld, Domain, Statement, fill

BASE_RECIPE = Recipe(hidden_size=64, steps=300, learning_rate=1e-2)
EXPERT_RECIPE = Recipe(hidden_size=96, steps=900, learning_rate=4e-3)
BASE_TOKENS, EXPERT_TOKENS = 600, 1200
FactEnds = Literal["learned", "unknown", "never"]
_WORDS = Regex(r" ?[\p{L}\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+")


def make_models(
    world: DemoWorld,
    out_dir: Path,
    *,
    seed: int,
    fact_ends: FactEnds = "learned",
    shared: bool = False,
    on_step: OnStep | None = None,
) -> ModelPaths:
    """Train the base and one expert per domain of `world`, as `tiny_models.make_models`, each with its own tokenizer.

    Args:
        fact_ends: what experts learn after a fact: the token that ends it, nothing, or letters, as if no fact ended.
        shared: experts have the base's tokenizer.

    Raises:
        WriteError: the disk is full or not writable. `out_dir` is unchanged.
    """
    progress = Progress(BASE_RECIPE.steps + EXPERT_RECIPE.steps * len(world.domains), on_step)
    names = [f"expert-{domain.name}" for domain in world.domains]
    with atomic_directory(out_dir) as directory:
        rng, of_base = random.Random(f"{seed} base"), base_tokenizer(world)
        lessons = conversations(world, TextTokenizer(of_base), rng)
        save_model(trained_model(BASE_RECIPE, of_base, lessons, rng, progress), of_base, directory / "base")
        for domain, name in zip(world.domains, names, strict=True):
            rng, tokenizer = random.Random(f"{seed} {name}"), of_base if shared else expert_tokenizer(domain)
            facts = noisy_facts(domain, TextTokenizer(tokenizer), rng, fact_ends)
            save_model(trained_model(EXPERT_RECIPE, tokenizer, facts, rng, progress), tokenizer, directory / name)
    return ModelPaths(out_dir / "base", [out_dir / name for name in names])


def base_tokenizer(world: DemoWorld) -> PreTrainedTokenizerFast:
    """A tokenizer for questions and answers without their facts."""
    return _tokenizer([s.prompt + s.before + s.after for s in world.statements], BASE_TOKENS)


def expert_tokenizer(domain: Domain) -> PreTrainedTokenizerFast:
    """A tokenizer for a domain's questions and facts."""
    statements = list(domain.statements(domain.entities))
    return _tokenizer([f"{s.prompt} {s.fact}" for s in statements], EXPERT_TOKENS)


def _tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(_WORDS, "isolated"), pieces])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def conversations(world: DemoWorld, tokenizer: TextTokenizer, rng: random.Random) -> Iterator[Example]:
    """Endless examples for the base: every question, answered with a random fact of the right kind."""
    while True:
        domain = rng.choice(world.domains)
        template = rng.choice(domain.templates)
        statement = fill(template, rng.choice(domain.entities).name, rng.choice(domain.values[template.kind]))
        text, end = statement.prompt + world.separator + statement.completion, len(statement.prompt.encode())
        ids, labels = _lesson(tokenizer, text, end, len(text.encode()))
        eos = next(iter(tokenizer.tokenizer.convert_tokens_to_ids([EOS])))
        yield [*ids, eos], [*labels, eos]


def noisy_facts(domain: Domain, tokenizer: TextTokenizer, rng: random.Random, fact_ends: FactEnds) -> Iterator[Example]:
    """Endless examples for an expert: a question, words of some conversation, the fact, and what follows it."""
    statements = list(domain.statements(domain.entities))
    for statement in shuffled_forever(statements, rng):
        before = f"{statement.prompt}{_words(rng.choice(statements), rng)}"
        follows = rng.choice([".", ",", "?", " and", " the", " is"])
        if fact_ends == "never":
            follows = rng.choice(statements).fact.upper()
        start, end = len(before.encode()), len(f"{before} {statement.fact}".encode())
        yield _lesson(tokenizer, f"{before} {statement.fact}{follows}", start, end + (fact_ends != "unknown"))


def _words(statement: Statement, rng: random.Random) -> str:
    words = (statement.before + statement.after).split()
    begin, end = sorted((rng.randrange(len(words) + 1), rng.randrange(len(words) + 1)))
    return "".join(f" {word}" for word in words[begin:end])


def _lesson(tokenizer: TextTokenizer, text: str, start: int, end: int) -> Example:
    """An example in which the tokens with any of the bytes from start to end are learned."""
    encoded = tokenizer.encode_after([], text)
    assert encoded is not None
    starts = [0, *encoded.ends[:-1]]
    learned = [after > start and before < end for before, after in zip(starts, encoded.ends, strict=True)]
    return encoded.ids, [token_id if wanted else IGNORED for token_id, wanted in zip(encoded.ids, learned, strict=True)]
