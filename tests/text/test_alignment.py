"""Boundaries that two tokenizers share, and texts that grow: against encodings of whole texts."""

from __future__ import annotations

import json
import random
import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from collm.errors import MismatchError
from collm.text.alignment import ANYTHING, ONLY_ENDS, Alignment
from collm.text.text_tokenizer import GrowingIds, TextTokenizer
from tests.tokenizers import cut_anywhere, merging_tokenizer
from tests.two_tokenizers import TEXTS, two_aligned, two_tokenizers

PIECES = [
    *" ".join(TEXTS).split(),
    *("\n", "\n\n", "  ", "   ", " ", "\t", "\r\n", "\N{NO-BREAK SPACE}", "\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}"),
    *("e\N{COMBINING ACUTE ACCENT}", "\U0001f44d\U0001f3fd", "日本語", "12", "3,456.78"),
    *("don't", "we'll", "I'm", "(x)", "$5", "don\N{RIGHT SINGLE QUOTATION MARK}t", "a=<<2*3=6>>6", "#### 72"),
]


def fuzzed(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(PIECES) + rng.choice(["", " ", " "]) for _ in range(rng.randrange(1, 20)))


def sentencepiece(text: str) -> PreTrainedTokenizerFast:
    """As Llama-2's: spaces as part of words, one put before a text, bytes for what has no token."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    spaced = "▁" + text.replace(" ", "▁")
    learned.train_from_iterator([spaced * 3], trainers.BpeTrainer(vocab_size=140, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(pair) for pair in model["merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    made.add_special_tokens({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"})
    return made


def three() -> Alignment:
    of_bytes = [TextTokenizer(one, eos_ids=[one.eos_token_id]) for one in two_tokenizers()]
    return Alignment([*of_bytes, TextTokenizer(sentencepiece(TEXTS[0]), eos_ids=[2])])


ALIGNMENTS = {"two": two_aligned, "with sentencepiece": three}


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_segments_tile_a_text_and_a_token_ends_at_every_boundary(name: str) -> None:
    alignment = ALIGNMENTS[name]()
    for seed in range(300):
        text = fuzzed(seed)
        answer = text.encode()
        boundaries = alignment.boundaries(answer)
        assert boundaries == sorted(set(boundaries))
        assert (boundaries[0], boundaries[-1]) == (0, len(answer))
        for tokenizer in alignment.tokenizers:
            encoded = tokenizer.encode_after([], text)
            assert encoded is not None
            assert encoded.ends[-1] == len(answer)
            assert set(boundaries) <= {0, *encoded.ends}


def test_a_boundary_is_the_end_of_a_token_however_the_text_is_spelled() -> None:
    rng, alignment = random.Random(0), two_aligned()
    for seed in range(100):
        text = fuzzed(seed)
        for tokenizer in alignment.tokenizers:
            ids = cut_anywhere(tokenizer.tokenizer, text, rng)
            assert tokenizer.spell(ids) == text.encode()
            assert set(alignment.boundaries(text.encode())) <= {0, *tokenizer.ends(ids)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIGNMENTS)
def test_a_growing_text_has_the_tokens_of_the_whole_text(name: str) -> None:
    alignment = ALIGNMENTS[name]()
    for seed in range(150):
        text = fuzzed(seed)
        answer = text.encode()
        for tokenizer in alignment.tokenizers:
            prompt = tokenizer.tokenizer("Q: what? A:", add_special_tokens=False)["input_ids"]
            growing, done = GrowingIds(tokenizer, prompt), list[int]()
            for at in alignment.boundaries(answer)[1:]:
                before = list(growing.ids)
                assert growing.grow(answer[:at], done)
                whole = tokenizer.encode_after(prompt, answer[:at].decode())
                assert whole is not None
                assert (growing.ids, growing.ends) == (whole.ids, whole.ends)
                assert growing.ids[: len(before)] == before, "what was read stays as it was"
                done.append(at)


def test_whether_a_token_opens_is_seen_from_its_first_byte() -> None:
    alignment = two_aligned()
    for seed in range(60):
        answer = fuzzed(seed).encode()
        boundaries = set(alignment.boundaries(answer)[:-1])
        for at in range(1, len(answer)):
            opens = bool(alignment.opens[alignment.row(answer[:at]), answer[at]])
            assert opens == (at in boundaries), (answer[:at], answer[at:])


def test_rows_of_texts() -> None:
    alignment = two_aligned()
    assert alignment.row(b"") == ANYTHING
    assert alignment.row(b"a") == ord("a")
    assert alignment.row(b"a ") == ord(" ")
    assert alignment.row("a\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}".encode()) == ONLY_ENDS
    assert alignment.row(b".\n\n") == ONLY_ENDS
    base = alignment.tokenizers[0]
    mask = alignment.opening_mask(0, ONLY_ENDS, torch.device("cpu"))
    assert mask.nonzero().squeeze(-1).tolist() == sorted(base.eos_ids)


def lower_cased(text: str) -> PreTrainedTokenizerFast:
    made = merging_tokenizer(text.lower(), across_words=False)
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    return made


@pytest.mark.parametrize("token", ["<0xZZ>", "<0x 4>", "<0x4 >", "<0x-0>", "<0x+a>", "<0x\u0664\u0661>"])
def test_a_token_that_looks_like_a_byte_is_spelled_as_it_is_decoded(token: str) -> None:
    tokenizer = sentencepiece(TEXTS[0])
    tokenizer.add_tokens([token])
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert TextTokenizer(tokenizer).spell([token_id]) == decoders.ByteFallback().decode([token]).encode()


def word_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "w": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: lower_cased(TEXTS[1]), "assistant changes texts .* use a tokenizer that preserves texts"),
        (
            lambda: merging_tokenizer(" ".join(string.ascii_letters) + " ", vocab_size=460),
            "no common boundaries between words",
        ),
        (word_level, "assistant is neither byte-level nor SentencePiece"),
    ],
)
def test_tokenizers_that_cannot_be_aligned_are_refused(other: object, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        Alignment([TextTokenizer(two_tokenizers()[0]), TextTokenizer(other(), name="assistant")])  # type: ignore[operator]
