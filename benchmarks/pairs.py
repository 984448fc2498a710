"""Pairs of models to measure: real shapes, random weights, and texts and deferrals that can be set."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead
from collm.core.policies import Policy, StepView

SHAPES = {  # hidden, intermediate, layers, heads, key heads, vocabulary
    "25m": (384, 1024, 8, 6, 2, 16_384),
    "150m": (768, 2048, 16, 12, 4, 32_000),
    "1b": (2048, 8192, 16, 32, 8, 128_256),
    "7b": (4096, 11_008, 32, 32, 32, 32_000),
    "8b": (4096, 14_336, 32, 32, 8, 128_256),
    "34b": (8192, 22_016, 48, 64, 8, 32_000),
}


@dataclass(frozen=True)
class PatternPolicy(Policy):
    """Defers where a fixed pattern says so. The rate and the runs do not depend on the models."""

    deferred: tuple[bool, ...]

    def author(self, step: StepView) -> int:
        return int(self.deferred[step.position])


def pattern(rate: float, run: int, length: int, seed: int) -> PatternPolicy:
    """Defer a share `rate` of `length` tokens, independently (run 1) or in runs of `run` tokens on average."""
    rng = random.Random(seed)
    count = max(1, round(rate * length))
    if run == 1:
        chosen = set(rng.sample(range(length), count))
        return PatternPolicy(tuple(i in chosen for i in range(length)))
    runs = max(1, round(count / run))
    lengths = _parts(count, runs, rng)
    gaps = _parts(length - count + 2, runs + 1, rng)  # the outer gaps may be empty
    gaps[0], gaps[-1] = gaps[0] - 1, gaps[-1] - 1
    states: list[bool] = [False] * gaps[0]
    for deferred, kept in zip(lengths, gaps[1:], strict=True):
        states += [True] * deferred + [False] * kept
    return PatternPolicy(tuple(states))


def _parts(total: int, parts: int, rng: random.Random) -> list[int]:
    """Write `total` as a random sum of `parts` positive numbers."""
    parts = min(parts, total)
    cuts = sorted(rng.sample(range(1, total), parts - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def make_byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on the source of the standard library."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    library = sorted(Path(json.__file__).parent.parent.glob("*.py"))
    backend.train_from_iterator((path.read_text(encoding="utf-8", errors="ignore") for path in library), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    return tokenizer


def make_model(shape: str, vocab_size: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Create a model with random weights."""
    hidden, intermediate, layers, heads, key_heads, _ = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocab_size,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(hidden)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def make_predictable(model: PreTrainedModel, successors: list[int], seed: int) -> None:
    """Make successors[x] the argmax after token x, at unchanged cost. The layers then add nothing to the embedding of
    x.
    """
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    embedding.copy_(torch.randn(embedding.shape, generator=generator))
    head = model.get_output_embeddings().weight
    head[torch.tensor(successors)] = embedding / embedding.norm(dim=-1, keepdim=True)


def successors(vocab_size: int, agreement: float) -> tuple[list[int], list[int]]:
    """Next tokens of two models. Both are permutations, and they agree on a share `agreement` of the tokens."""
    rng = random.Random(0)
    first = rng.sample(range(vocab_size), vocab_size)
    second = list(first)
    differing = rng.sample(range(vocab_size), round((1 - agreement) * vocab_size))
    for here, there in zip(differing, differing[1:] + differing[:1], strict=True):
        second[here] = first[there]
    return first, second


def collaborate(
    base: PreTrainedModel,
    assistant: PreTrainedModel,
    *,
    eager: bool = False,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> CoLLM:
    tokenizer = tokenizer or make_tokenizer(base.config.vocab_size)
    return CoLLM(base, [assistant], DeferralHead(base.config.hidden_size), tokenizer, eager=eager)


def prompts_of(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, vocab_size, (batch, length), generator=generator).tolist()
