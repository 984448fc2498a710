"""Train tiny Llama models: a fluent base that knows no facts, and experts that only know facts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from collm.atomic import atomic_directory
from collm.core.sampling import seeded
from collm.errors import ConfigError, DataError
from collm.models.loading import ModelSpec, load_model, load_tokenizer
from recipes.facts.lessons import (
    IGNORED,
    Example,
    answered,
    batches,
    conversations,
    encoder,
    noisy_facts,
    shuffled_forever,
)
from recipes.facts.world import PUNCTUATION, DemoWorld, split_words

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CONTEXT_TOKENS = 128
_SPACE = "▁"

OnStep = Callable[[int, int], None]
"""Called after each training step with (steps done, steps in all)."""


@dataclass(frozen=True)
class Recipe:
    """Size and training of a tiny model; the learning rate is the peak of a one-cycle schedule."""

    hidden_size: int
    steps: int
    learning_rate: float
    batch_size: int = 48


BASE_RECIPE = Recipe(hidden_size=64, steps=200, learning_rate=1e-2)
EXPERT_RECIPE = Recipe(hidden_size=96, steps=400, learning_rate=4e-3)
FINE_TUNE_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class ModelPaths:
    """Directories of the tiny models, each with its tokenizer; the experts in the order of the domains."""

    base: Path
    experts: list[Path]


def make_models(world: DemoWorld, out_dir: Path, *, seed: int, on_step: OnStep | None = None) -> ModelPaths:
    """Train the base and one expert per domain of `world` and save them below `out_dir`.

    The base has seen every question, but answered with random facts. An expert has seen its domain's true facts, each
    after its question and some unrelated conversation, and was never asked for a token that is no fact.
    The same seed gives the same models; the global random state is left as it was.

    Args:
        world: the facts and questions.
        out_dir: replaced, when all models are done, by a directory with `base` and `expert-<domain>`.
        seed: of the weights and of the order of the examples.
        on_step: called with the progress over all models.

    Raises:
        WriteError: the disk is full or not writable. `out_dir` is unchanged.
    """
    tokenizer = make_tokenizer(world)
    encode = encoder(tokenizer)
    progress = Progress(BASE_RECIPE.steps + EXPERT_RECIPE.steps * len(world.domains), on_step)
    names = [f"expert-{domain.name}" for domain in world.domains]
    with atomic_directory(out_dir) as directory:
        rng = random.Random(f"{seed} base")
        lessons = conversations(world.domains, encode, _eos_token_id(tokenizer), rng)
        base = trained_model(BASE_RECIPE, tokenizer, lessons, rng, progress)
        save_model(base, tokenizer, directory / "base")
        for domain, name in zip(world.domains, names, strict=True):
            rng = random.Random(f"{seed} {name}")
            expert = trained_model(EXPERT_RECIPE, tokenizer, noisy_facts(domain, encode, rng), rng, progress)
            save_model(expert, tokenizer, directory / name)
    return ModelPaths(out_dir / "base", [out_dir / name for name in names])


def fine_tune(base_dir: Path, rows: Sequence[dict[str, str]], out_dir: Path, *, seed: int, epochs: int) -> Path:
    """Plain supervised fine-tuning of all weights: loss on completion and EOS. Returns `out_dir`.

    Args:
        base_dir: a causal LM with its tokenizer.
        rows: {"prompt", "completion"}; their tokens are simply joined.
        out_dir: replaced by the tuned model with the same tokenizer.
        seed: of the order of the rows.
        epochs: passes over the rows, at least 1.

    Raises:
        ConfigError: fewer than 1 epoch.
        DataError: no rows.
        LoadError: no model or tokenizer at `base_dir`.
        WriteError: the disk is full or not writable. `out_dir` is unchanged.
    """
    if epochs < 1:
        raise ConfigError(f"epochs is {epochs}, expected at least 1")
    if not rows:
        raise DataError("there are no rows to fine-tune on; expected at least one {'prompt', 'completion'}")
    spec = ModelSpec(str(base_dir), dtype="float32", device="cpu")
    model, tokenizer = load_model(spec), load_tokenizer(spec)
    encode, rng = encoder(tokenizer), seeded(seed)
    eos = _eos_token_id(tokenizer)
    examples = [answered(encode(row["prompt"]), [*encode(row["completion"]), eos]) for row in rows]
    batch_size = min(BASE_RECIPE.batch_size, len(examples))
    steps = ceil(epochs * len(examples) / batch_size)
    endless = batches(shuffled_forever(examples, rng), batch_size, rng)
    _train(model, endless, steps, FINE_TUNE_LEARNING_RATE, Progress(steps))
    with atomic_directory(out_dir) as directory:
        save_model(model, tokenizer, directory)
    return out_dir


def make_tokenizer(world: DemoWorld) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word and punctuation mark of the whole world.

    Spaces are rebuilt, not stored: before every word, before no punctuation mark. So a prompt and its completion have
    the same tokens apart as together, with or without a space between.
    """
    texts = (text for statement in world.statements for text in statement.row.values())
    words = sorted({word for text in texts for word in split_words(text)})
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *(_SPACE + word for word in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(f"[{PUNCTUATION}]"), "isolated"),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=False),
        ]
    )
    glue = [decoders.Replace(_SPACE + mark, mark) for mark in PUNCTUATION]
    tokenizer.decoder = decoders.Sequence([*glue, decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


@dataclass
class Progress:
    """The number of finished training steps."""

    total: int
    on_step: OnStep | None = None
    done: int = 0

    def step(self) -> None:
        self.done += 1
        if self.on_step is not None:
            self.on_step(self.done, self.total)


def trained_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterator[Example],
    rng: random.Random,
    progress: Progress,
) -> PreTrainedModel:
    """Train a randomly initialized model."""
    model = _random_model(recipe.hidden_size, tokenizer, seed=rng.getrandbits(32))
    train_model(model, recipe, examples, rng, progress)
    return model


def train_model(
    model: PreTrainedModel, recipe: Recipe, examples: Iterator[Example], rng: random.Random, progress: Progress
) -> None:
    """Train the weights of a model that have gradients."""
    _train(model, batches(examples, recipe.batch_size, rng), recipe.steps, recipe.learning_rate, progress)


def _random_model(hidden_size: int, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.07,  # models this narrow learn several times slower from the usual 0.02
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator
        torch.manual_seed(seed)
        return cast(PreTrainedModel, LlamaForCausalLM(config))


def _train(
    model: PreTrainedModel,
    endless: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    learning_rate: float,
    progress: Progress,
) -> None:
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(free, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    with _one_thread():
        for token_ids, labels in islice(endless, steps):
            optimizer.zero_grad()
            torch.autograd.backward(_mean_nll(model, token_ids, labels))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.step()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: small matrices are not faster with more, and the results depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _mean_nll(model: PreTrainedModel, token_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean nats per learned token; both inputs (B, T). Logits are made at learned positions only."""
    hidden = model.get_decoder()(input_ids=token_ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, H)
    wanted = labels[:, 1:]
    learned = wanted != IGNORED
    return F.cross_entropy(model.get_output_embeddings()(hidden[learned]), wanted[learned])


def _eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return cast(int, tokenizer.eos_token_id)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a model and its tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
