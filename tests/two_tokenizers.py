"""Models that do not share a tokenizer: two byte-level BPEs, and tiny models that write plain text."""

from __future__ import annotations

from functools import cache

import torch
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from collm.text.alignment import Alignment
from collm.text.text_tokenizer import TextTokenizer
from tests.tokenizers import merging_tokenizer

TEXTS = (
    "Sure, the capital of it is called Gipil, I think. The small river runs from there to the sea, 48 miles long. ",
    "what is the name of the town? pilgrims went there; its capital was built on 12 hills. running, called, thinking ",
)


@cache
def two_tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Of a base and an assistant: they cut words differently."""
    base, assistant = (
        merging_tokenizer(text, vocab_size=330 + 30 * i, across_words=False) for i, text in enumerate(TEXTS)
    )
    return base, assistant


def writing_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, hidden_size: int = 32, ends: float = -2.0
) -> PhiForCausalLM:
    """Random weights, but it writes letters, digits, spaces and signs alone, which make whole characters.

    Args:
        ends: what is added to the logit of EOS.
    """
    torch.manual_seed(seed)
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = PhiForCausalLM(config).eval()
    spelled = TextTokenizer(tokenizer).token_bytes
    bias = model.lm_head.bias.data
    for token_id, token in enumerate(spelled):
        if token is None or any(byte >= 0x7F or byte < 0x20 for byte in token):
            bias[token_id] = -100.0
        elif token.startswith(b" "):
            bias[token_id] = 3.0
    bias[tokenizer.eos_token_id] = ends
    return model


@cache
def two_aligned() -> Alignment:
    """The alignment of `two_tokenizers`."""
    return Alignment(
        [
            TextTokenizer(one, name=name, eos_ids=[one.eos_token_id])
            for name, one in zip(("base", "assistant"), two_tokenizers(), strict=True)
        ]
    )
