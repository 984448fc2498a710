"""Byte-level tokenizers with merges, and other ways to cut a text into their tokens than their own."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def merging_tokenizer(*texts: str, vocab_size: int = 340, across_words: bool = True) -> PreTrainedTokenizerFast:
    """Every byte and the commonest pieces of the texts, across words, digits and signs alike; <eos> is the last id."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text * 3 for text in texts], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    return tokenizer


def cut_anywhere(tokenizer: PreTrainedTokenizerFast, text: str, rng: random.Random) -> list[int]:
    """Some tokens that spell the text: at each byte any token that fits, not the one the tokenizer would choose."""
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    rest = "".join(piece for piece, _ in spelled)  # a sign for each byte
    vocabulary = tokenizer.get_vocab()
    token_ids = []
    while rest:
        fitting = [n for n in range(1, min(len(rest), 12) + 1) if rest[:n] in vocabulary]
        length = rng.choice(fitting)
        token_ids.append(vocabulary[rest[:length]])
        rest = rest[length:]
    return token_ids
