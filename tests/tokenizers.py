"""Byte-level tokenizers with merges, and other ways to cut a text into their tokens than their own."""

from __future__ import annotations

import json
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
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


SEVEN_TOKENS = ["a", "b", "ab", "c", "abc", "ba", "<eos>"]


def seven_tokens() -> PreTrainedTokenizerFast:
    """Few enough tokens that all of them can be looked at; several of them spell the same text."""
    vocabulary = {token: token_id for token_id, token in enumerate(SEVEN_TOKENS)}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "c"), ("b", "a")]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


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


def sentencepiece_tokenizer(*texts: str) -> PreTrainedTokenizerFast:
    """Merges of characters as in Llama 2: a space is part of a token, and rare characters become bytes."""
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=tokens, show_progress=False)
    backend.train_from_iterator([text * 3 for text in texts], trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]  # bytes are no tokens that a text may spell
    backend = Tokenizer.from_str(json.dumps(content))
    roles = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)
