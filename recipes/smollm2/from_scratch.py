"""A small model trained from scratch on problems with their solutions, for a tokenizer that has no small model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from collm.atomic import atomic_directory

CONTEXT_TOKENS = 1024
"""The longest text of GSM8K, problem and solution, has 614 tokens."""
BATCH_TOKENS = 2048
LEARNING_RATE = 4e-3
_POOL = 512  # texts that are sorted by length to make batches
_PADDING = -100


def make_base(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, out: Path, *, steps: int, seed: int) -> None:
    """Train a model on whole texts, each to its EOS, and save it with its tokenizer to the directory `out`."""
    rng = random.Random(f"{seed} base")
    documents = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    model: Any = _untrained(tokenizer, seed=rng.getrandbits(32))
    _train(model, _batches([[*document, tokenizer.eos_token_id] for document in documents], rng), steps)
    with atomic_directory(out) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _untrained(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _train(model: Any, batches: Iterator[Tensor], steps: int) -> None:
    """Minimise the mean NLL per token."""
    groups = [
        {"params": [one for one in model.parameters() if one.ndim > 1], "weight_decay": 0.1},
        {"params": [one for one in model.parameters() if one.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for labels in islice(batches, steps):
        optimizer.zero_grad()
        targets = labels[:, 1:]
        learned = targets != _PADDING
        hidden = model.base_model(input_ids=labels.clamp(min=0), use_cache=False).last_hidden_state[:, :-1]
        torch.autograd.backward(F.cross_entropy(model.lm_head(hidden[learned]), targets[learned]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _batches(documents: Sequence[list[int]], rng: random.Random) -> Iterator[Tensor]:
    """Endless batches of texts with similar lengths, shape (B, T), padded on the right, where causal attention never
    reads it.
    """

    def shuffled() -> Iterator[list[int]]:
        while True:
            yield from rng.sample(documents, len(documents))

    endless = shuffled()
    while True:
        groups: list[list[list[int]]] = [[]]
        for document in sorted(islice(endless, _POOL), key=len):
            if groups[-1] and (len(groups[-1]) + 1) * len(document) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(document)
        for group in rng.sample(groups, len(groups)):
            yield pad_sequence([torch.tensor(one) for one in group], batch_first=True, padding_value=_PADDING)
