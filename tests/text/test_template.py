"""The template: training shows a prompt with exactly the tokens that decoding starts from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from collm.errors import ConfigError, DataError, RequestError
from collm.text.template import Encoded, PromptTemplate

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
FORGETS_THOUGHTS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}hm, {% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "the cat sat"},
    {"role": "assistant", "content": "on the mat"},
    {"role": "user", "content": "and the dog"},
    {"role": "assistant", "content": "sat on the cat"},
]
CORPUS = [
    "the cat sat on the mat and the dog sat on the cat",
    "on the mat\n\n\nthe dog 12 34\n\n\n",
    "Question: 12\nAnswer: 34",
]


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    _train(backend)
    return _fast(backend)


def with_word_starts() -> PreTrainedTokenizerFast:
    """Like SentencePiece: a text's first word gets a space of its own."""
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    _train(backend)
    return _fast(backend)


def closing() -> PreTrainedTokenizerFast:
    """A tokenizer that ends every text with EOS."""
    made = byte_level()
    eos = made.eos_token
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, made.eos_token_id)]
    )
    return made


def _train(backend: Tokenizer) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)


def _fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
        clean_up_tokenization_spaces=False,
    )


BYTE_LEVEL = byte_level()
TOKENIZERS = {"byte-level": BYTE_LEVEL, "word starts": with_word_starts(), "closing": closing()}


def targets_of(encoded: Encoded) -> list[int]:
    return [token for token, target in zip(encoded.token_ids, encoded.is_target, strict=True) if target]


def turns_of(encoded: Encoded) -> Iterator[tuple[list[int], list[int]]]:
    """(all tokens before, tokens) of each run of targets."""
    first = 0
    for is_target, run in itertools.groupby(encoded.is_target):
        last = first + len(list(run))
        if is_target:
            yield encoded.token_ids[:first], encoded.token_ids[first:last]
        first = last


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("the cat", " sat"), ("the c", "at"), ("Answer: ", "34"), ("on\n", "\nthe"), ("the cat sat", "on"), ("x", "é")],
)
def test_training_shows_the_prompt_that_decoding_starts_from(name: str, prompt: str, completion: str) -> None:
    tokenizer, template = TOKENIZERS[name], PromptTemplate("Question: {prompt}")
    encoded = template.encode_completion(tokenizer, prompt, completion)
    ((before, (*targets, last)),) = turns_of(encoded)
    assert before == template.encode_prompt(tokenizer, prompt)
    assert last == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in encoded.token_ids[:-1]
    if name != "word starts":
        assert tokenizer.decode(targets) == completion
    assert tokenizer.decode([*before, *targets]) == f"Question: {prompt}{completion}"


@given(
    prompt=st.text("ab cthe\n<|end|>:1é", min_size=1, max_size=12),
    completion=st.text("ab cthe\n:1é", min_size=1, max_size=12),
)
def test_any_border_keeps_the_prompt_and_the_text(prompt: str, completion: str) -> None:
    template = PromptTemplate()
    encoded = template.encode_completion(BYTE_LEVEL, prompt, completion)
    ((before, _),) = turns_of(encoded)
    assert before == template.encode_prompt(BYTE_LEVEL, prompt)
    assert BYTE_LEVEL.decode(encoded.token_ids) == prompt + completion + "<|end|>"
    assert encoded.is_target == sorted(encoded.is_target)


def test_a_completion_that_ends_with_eos_gets_no_second_one() -> None:
    for tokenizer in (TOKENIZERS["byte-level"], TOKENIZERS["closing"]):
        encoded = PromptTemplate().encode_completion(tokenizer, "the cat", " sat<|end|>")
        assert encoded == PromptTemplate().encode_completion(tokenizer, "the cat", " sat")


def test_every_assistant_turn_of_a_chat_is_a_target_up_to_its_eos() -> None:
    template = PromptTemplate(chat=CHATML)
    (encoded,) = template.encode_chat(BYTE_LEVEL, CHAT)
    turns = list(turns_of(encoded))
    assert [BYTE_LEVEL.decode(tokens) for _, tokens in turns] == ["on the mat<|end|>", "sat on the cat<|end|>"]
    assert [before for before, _ in turns] == [template.encode_prompt(BYTE_LEVEL, CHAT[:i]) for i in (1, 3)]
    assert BYTE_LEVEL.decode(encoded.token_ids).endswith("sat on the cat<|end|>\n")


@pytest.mark.parametrize(
    ("chat_template", "second"),
    [(FORGETS_THOUGHTS, "the cat"), (CHATML, "\n\nthe cat")],
    ids=["template rewrites earlier turns", "a token spans the border"],
)
def test_turns_that_one_sequence_cannot_show_get_one_each(chat_template: str, second: str) -> None:
    template = PromptTemplate(chat=chat_template)
    chat = [*CHAT[:3], {"role": "assistant", "content": second}]
    encoded = template.encode_chat(BYTE_LEVEL, chat)
    assert len(encoded) == 2
    for one, index in zip(encoded, (1, 3), strict=True):
        ((before, tokens),) = turns_of(one)
        assert before == template.encode_prompt(BYTE_LEVEL, chat[:index])
        assert BYTE_LEVEL.decode(tokens).endswith(chat[index]["content"] + "<|end|>")


def test_a_template_whose_finished_turn_does_not_follow_the_opened_one_is_refused() -> None:
    opens_a_thought = CHATML.replace("<|start|>assistant\n{% endif %}", "<|start|>assistant\n<think>{% endif %}")
    with pytest.raises(DataError, match=r"opens the turn of message 2 with .*<think>"):
        PromptTemplate(chat=opens_a_thought).encode_chat(BYTE_LEVEL, CHAT)


def test_chats_that_cannot_be_rendered_are_refused() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        PromptTemplate().encode_prompt(BYTE_LEVEL, CHAT)
    with pytest.raises(DataError, match="no assistant turn"):
        PromptTemplate(chat=CHATML).encode_chat(BYTE_LEVEL, CHAT[:1])
    with pytest.raises(RequestError, match="rejects the messages"):
        PromptTemplate(chat="{{ raise_exception('no') }}").encode_prompt(BYTE_LEVEL, CHAT)


def test_token_ids_pass_unchanged_and_other_things_are_refused() -> None:
    template = PromptTemplate("never {prompt} seen")
    assert template.encode_prompt(BYTE_LEVEL, [5, 6]) == [5, 6]
    for empty in ("", []):
        with pytest.raises(RequestError, match="the prompt is empty"):
            template.encode_prompt(BYTE_LEVEL, empty)
    for wrong in (b"ab", None, 3, ["a"], {"role": "user"}):
        with pytest.raises(RequestError, match="expected a string, a list of messages or token ids"):
            template.encode_prompt(BYTE_LEVEL, wrong)  # type: ignore[arg-type]


def test_braces_in_a_prompt_are_text() -> None:
    template = PromptTemplate("Q: {prompt} {x}")
    assert BYTE_LEVEL.decode(template.encode_prompt(BYTE_LEVEL, "{prompt} {y}")) == "Q: {prompt} {y} {x}"


@pytest.mark.parametrize("text", ["no place", "{prompt} twice {prompt}"])
def test_a_template_needs_the_prompt_once(text: str) -> None:
    with pytest.raises(ConfigError, match="exactly once"):
        PromptTemplate(text)


def test_a_tokenizer_without_eos_cannot_end_a_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no EOS token"):
        PromptTemplate().encode_completion(bare, "w1", "w2")
