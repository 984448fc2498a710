"""The recipe's tokenizer and language models, trained from scratch: a base, and an expert in arithmetic."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from collm.atomic import atomic_directory
from collm.errors import DataError
from collm.training.data import Row
from recipes.gsm8k_calculator.data import Arithmetic, Problems, text_of

EOS = "<|endoftext|>"
VOCAB_SIZE = 2000
CONTEXT_TOKENS = 1024
"""Context length of both models. The longest text of GSM8K, problem and solution, has 614 tokens."""

LONE_STEPS = 0.65
"""Share of the expert's training steps that use marks alone. In the later steps, marks stand between pieces of text."""
LONE_LATER = 0.3
"""Share of lone marks among the examples of the later steps."""
LEARNED_EXPRESSIONS = 0.1
"""Share of marks that are learned from `<<` on. In the others only the part after `=` is learned, because only that
part can be known.
"""
FILLER = 24
"""Largest number of tokens between two marks. Before the first mark of a sequence it is half the sequence."""

_WARM_UP = 0.1  # of the steps
_IGNORED = -100
_POOL = 512  # examples that are sorted by length to make batches
_ENCODED_AT_ONCE = 1000
_REPORTS = 20

Example = tuple[list[int], list[int]]
"""Token ids and labels. A label is the token id, or -100 where nothing is learned."""

Batch = tuple[Tensor, Tensor]
"""Token ids and labels, both shape (B, T), padded on the right."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Training:
    """Hyperparameters of one model's training.

    Attributes:
        steps: number of updates.
        batch_tokens: largest number of tokens per update, including padding.
        learning_rate: peak, reached after a tenth of the steps and followed by half a cosine.
    """

    steps: int
    batch_tokens: int
    learning_rate: float


@dataclass(frozen=True)
class Size:
    """Shape of both models, and their training.

    Attributes:
        initializer_range: standard deviation of the initial weights.
        base: training of the base.
        arithmetic: training of the expert.
        window: length of the expert's sequences of marks within text, in tokens.
        bf16: whether to compute in bf16, with weights in fp32.
        threads: number of CPU threads. Using more threads than free cores is very slow. Another
            number may round differently.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    initializer_range: float
    base: Training
    arithmetic: Training
    window: int = 256
    weight_decay: float = 0.1
    bf16: bool = False
    device: str = "cpu"
    threads: int = 1


SIZES = {
    "small": Size(
        hidden_size=128,
        intermediate_size=384,
        num_layers=3,
        num_heads=4,
        initializer_range=0.05,
        base=Training(steps=2300, batch_tokens=2048, learning_rate=4e-3),
        arithmetic=Training(steps=2300, batch_tokens=1024, learning_rate=2e-3),
    ),
    "gpu": Size(
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        initializer_range=0.02,
        base=Training(steps=800, batch_tokens=16_384, learning_rate=6e-4),
        arithmetic=Training(steps=2000, batch_tokens=32_768, learning_rate=6e-4),
        bf16=True,
        device="cuda",
    ),
}


def make_models(problems: Problems, size: Size, out_dir: Path, *, seed: int) -> Path:
    """Train the tokenizer, the base and the arithmetic expert on the training rows. The same seed gives the same
    models.

    Args:
        problems: GSM8K.
        size: shape of both models, and their training.
        out_dir: receives the directories `base` and `arithmetic`, each with a model and the same tokenizer.
        seed: seed of weights, order and random operands. The global random state is not changed.

    Returns:
        `out_dir`.

    Raises:
        DataError: a text exceeds the models' context, or the training rows contain no calculator mark.
        WriteError: the models could not be written; existing models are unchanged.
    """
    texts = [text_of(row) for row in problems.train]
    tokenizer = train_tokenizer(texts)
    save(make_base(problems.train, tokenizer, size, seed=seed), tokenizer, out_dir / "base")
    save(make_arithmetic(problems.train, tokenizer, size, seed=seed), tokenizer, out_dir / "arithmetic")
    return out_dir


def train_tokenizer(texts: Sequence[str], *, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train byte-level BPE in which digits, `<<`, `>>` and `=` merge with nothing, except for a space before `=`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|<<|>>| ?="), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def make_base(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, size: Size, *, seed: int) -> PreTrainedModel:
    """Train a model on whole problems with their solutions, each from its first token to EOS.

    Raises:
        DataError: a text exceeds the model's context.
    """
    rng = random.Random(f"{seed} base")
    eos = cast(int, tokenizer.eos_token_id)
    documents = [[*token_ids, eos] for token_ids in _encode(tokenizer, [text_of(row) for row in rows])]
    for row, document in zip(rows, documents, strict=True):
        if len(document) > CONTEXT_TOKENS:
            raise DataError(f"{row.where}: the text has {len(document)} tokens, expected at most {CONTEXT_TOKENS}")
    model = _new_model(size, tokenizer, seed=rng.getrandbits(32))
    examples = ((document, document) for document in _shuffled_forever(documents, rng))
    train(model, _batches(examples, size.base.batch_tokens, rng), size.base, size, name="base")
    return model


def make_arithmetic(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, size: Size, *, seed: int
) -> PreTrainedModel:
    """Train a model on calculator marks with new operands, anywhere in a text, and on nothing else.

    Raises:
        DataError: the rows contain no calculator mark.
    """
    rng = random.Random(f"{seed} arithmetic")
    texts = [text_of(row) for row in rows]
    marks = _marks(Arithmetic(texts).lines(seed), tokenizer, rng)
    model = _new_model(size, tokenizer, seed=rng.getrandbits(32))
    plan = size.arithmetic
    lone = _lone_marks(marks, tokenizer)
    mixed = _mixed(lone, _marks_in_text(marks, _encode(tokenizer, texts), size.window, rng), rng)
    begin = islice(_batches(lone, plan.batch_tokens, rng), int(LONE_STEPS * plan.steps))
    train(model, chain(begin, _batches(mixed, plan.batch_tokens, rng)), plan, size, name="arithmetic")
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out_dir: Path) -> None:
    """Replace `out_dir` by the model with its tokenizer.

    Raises:
        WriteError: the model could not be written; `out_dir` is unchanged.
    """
    with atomic_directory(out_dir) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def train(model: PreTrainedModel, batches: Iterator[Batch], training: Training, size: Size, *, name: str) -> None:
    """Train with AdamW on the mean loss per learned token. Prints progress to stderr."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": size.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        lr=training.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, int(_WARM_UP * training.steps), training.steps)
    progress = _Progress(name, training.steps)
    model.to(size.device).train()
    with _threads(size.threads):
        for token_ids, labels in islice(batches, training.steps):
            optimizer.zero_grad()
            loss = _mean_nll(model, token_ids.to(size.device), labels.to(size.device), bf16=size.bf16)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.step(loss.detach(), token_ids.numel())
    model.eval()


def _new_model(size: Size, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        initializer_range=size.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator
        torch.manual_seed(seed)
        return cast(PreTrainedModel, LlamaForCausalLM(config))


def _mean_nll(model: PreTrainedModel, token_ids: Tensor, labels: Tensor, *, bf16: bool) -> Tensor:
    """Mean loss in nats per learned token. Both inputs have shape (B, T). Logits are computed at learned positions
    only.
    """
    targets = labels[:, 1:]
    learned = targets != _IGNORED
    with torch.autocast(token_ids.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, H)
        logits = model.get_output_embeddings()(hidden[learned])
    return F.cross_entropy(logits.float(), targets[learned])


def _marks(lines: Iterator[str], tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Iterator[Example]:
    """Marks such as <<48/2=24>>24. In most of them, only the part after = is learned."""
    (equals,) = _encode(tokenizer, ["="])[0]
    while True:
        for token_ids in _encode(tokenizer, list(islice(lines, _ENCODED_AT_ONCE))):
            known = 0 if rng.random() < LEARNED_EXPRESSIONS else token_ids.index(equals) + 1
            yield token_ids, [_IGNORED] * known + token_ids[known:]


def _lone_marks(marks: Iterator[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    """Each mark after a line break."""
    line_break = _encode(tokenizer, ["\n"])[0]
    for token_ids, labels in marks:
        yield line_break + token_ids, line_break + labels


def _marks_in_text(
    marks: Iterator[Example], texts: Sequence[list[int]], window: int, rng: random.Random
) -> Iterator[Example]:
    """Sequences of `window` tokens in which marks stand between pieces of text. The text is not learned."""
    while True:
        token_ids = _piece(rng.choice(texts), window // 2, rng)
        labels = [_IGNORED] * len(token_ids)
        while len(token_ids) < window:
            mark, mark_labels = next(marks)
            filler = _piece(rng.choice(texts), FILLER, rng)
            token_ids, labels = token_ids + mark + filler, labels + mark_labels + [_IGNORED] * len(filler)
        yield token_ids[:window], labels[:window]


def _piece(text: list[int], most: int, rng: random.Random) -> list[int]:
    length = rng.randint(1, most)
    begin = rng.randrange(max(1, len(text) - length))
    return text[begin : begin + length]


def _mixed(lone: Iterator[Example], in_text: Iterator[Example], rng: random.Random) -> Iterator[Example]:
    while True:
        yield next(lone if rng.random() < LONE_LATER else in_text)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return cast("list[list[int]]", tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])


def _shuffled_forever(items: Sequence[_T], rng: random.Random) -> Iterator[_T]:
    while True:
        yield from rng.sample(items, len(items))


def _batches(examples: Iterator[Example], batch_tokens: int, rng: random.Random) -> Iterator[Batch]:
    """Yield batches of examples with similar lengths, endlessly. `examples` must be endless."""
    while True:
        groups: list[list[Example]] = [[]]
        for example in sorted(islice(examples, _POOL), key=lambda example: len(example[0])):
            if groups[-1] and (len(groups[-1]) + 1) * len(example[0]) > batch_tokens:
                groups.append([])
            groups[-1].append(example)
        for group in rng.sample(groups, len(groups)):
            token_ids, labels = ([torch.tensor(one) for one in part] for part in zip(*group, strict=True))
            # With padding on the right, causal attention never reads it, so its token does not matter.
            yield pad_sequence(token_ids, batch_first=True), pad_sequence(labels, True, _IGNORED)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Progress:
    """Prints a line to stderr `_REPORTS` times: the mean loss since the last line, and the speed so far."""

    def __init__(self, name: str, steps: int) -> None:
        self._name, self._steps, self._every = name, steps, max(1, steps // _REPORTS)
        self._begun, self._done, self._tokens = time.monotonic(), 0, 0
        self._losses: list[Tensor] = []

    def step(self, loss: Tensor, tokens: int) -> None:
        self._done, self._tokens = self._done + 1, self._tokens + tokens
        self._losses.append(loss)
        if self._done % self._every == 0 or self._done == self._steps:
            mean = torch.stack(self._losses).mean().item()
            speed = self._tokens / (time.monotonic() - self._begun)
            line = f"{self._name}: step {self._done}/{self._steps}, {mean:.3f} nats/token, {speed:,.0f} tokens/s"
            print(line, file=sys.stderr, flush=True)
            self._losses = []
